"""Fat binaries: several images of one program, floor 3.

Owns: the container that the CUDA driver is given (header, entries, LZ4 and zstd) and the wrapper
that points to it. Promises: every length is checked against what is there and against config's
bounds before it is used; a rebuilt container differs only in the entries that were replaced.
Malformed is ImageRefused with the place. Called by image.py. It does not look into an entry.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from concordia import config
from concordia.errors import EnvironmentRefused, ImageRefused

CONTAINER_MAGIC: Final = 0xBA55ED50
WRAPPER_MAGIC: Final = 0x466243B1
_WRAPPER: Final = struct.Struct("<IIQQ")  # magic, version, address of the container, of a name
_CONTAINER: Final = struct.Struct("<IHHQ")  # magic, version, header bytes, bytes of all entries
# kind, ?, header bytes, payload bytes, packed bytes, options, version, architecture, name, name
# bytes, flags, ?, unpacked bytes
_ENTRY: Final = struct.Struct("<HHIQIIHHIIIQQQ")
_VERSION: Final = 1
_ALIGNMENT: Final = 8
_LZ4: Final = 0x2000
_ZSTD: Final = 0x8000
_EXACT: Final = 0x100000  # sm_90a: this architecture alone
_FAMILY: Final = 0x200000  # sm_100f
# places in an entry's header of what a raw payload changes
_AT_PAYLOAD: Final = 8
_AT_PACKED: Final = 16
_AT_FLAGS: Final = 40
_AT_UNPACKED: Final = 56


class EntryKind(enum.Enum):
    """What an entry holds, as its header says."""

    PTX = 1
    ELF = 2
    OTHER = 0


class Packing(enum.Enum):
    """How a payload is packed."""

    RAW = "raw"
    LZ4 = "lz4"
    ZSTD = "zstd"
    UNKNOWN = "unknown"  # stays as it is


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a container. Offsets are those in the whole image; `payload_bytes` is what lies
    there, with padding, `unpacked_bytes` what comes out at most.
    """

    index: int
    kind: EntryKind
    architecture: int  # 90 for sm_90
    suffix: str  # "a", "f" or nothing
    packing: Packing
    offset: int
    header_bytes: int
    payload_bytes: int
    packed_bytes: int
    unpacked_bytes: int
    flags: int

    @property
    def payload_offset(self) -> int:
        return self.offset + self.header_bytes

    @property
    def end(self) -> int:
        return self.payload_offset + self.payload_bytes


@dataclass(frozen=True, slots=True)
class Wrapper:
    """What a program's `.nvFatBinSegment` holds: addresses in that process."""

    version: int
    container_address: int
    name_address: int


def read_wrapper(data: bytes) -> Wrapper:
    """The wrapper at the beginning of these bytes."""
    if len(data) < _WRAPPER.size:
        raise ImageRefused(f"wrapper of a fatbin: {len(data)} bytes, it has {_WRAPPER.size}")
    magic, version, container, name = _WRAPPER.unpack_from(data)
    if magic != WRAPPER_MAGIC or version not in (1, 2):
        raise ImageRefused(f"wrapper of a fatbin: magic {magic:#x}, version {version}")
    return Wrapper(version, container, name)


def read_entries(data: bytes | memoryview) -> tuple[Entry, ...]:
    """The entries of the container at the beginning of these bytes; what follows it is nobody's."""
    if len(data) < _CONTAINER.size:
        raise ImageRefused(f"fatbin of {len(data)} bytes: its header has {_CONTAINER.size}")
    magic, version, header_bytes, size = _CONTAINER.unpack_from(data)
    if magic != CONTAINER_MAGIC or version != _VERSION:
        raise ImageRefused(f"fatbin: magic {magic:#x}, version {version}")
    if header_bytes < _CONTAINER.size or header_bytes + size > len(data):
        raise ImageRefused(
            f"fatbin: header of {header_bytes} and entries of {size} bytes in {len(data)}"
        )
    at, end = header_bytes, header_bytes + size
    entries: list[Entry] = []
    unpacked = 0
    while at < end:
        if len(entries) == config.FATBIN_ENTRIES_MAX:
            raise ImageRefused(f"fatbin: more than {config.FATBIN_ENTRIES_MAX} entries")
        entry = _read_entry(data, len(entries), at, end)
        unpacked += entry.unpacked_bytes
        if unpacked > config.FATBIN_UNPACKED_BYTES_MAX:
            raise ImageRefused(f"fatbin: unpacks to over {config.FATBIN_UNPACKED_BYTES_MAX} bytes")
        entries.append(entry)
        at = entry.end
    return tuple(entries)


def unpack(data: bytes, entry: Entry) -> bytes:
    """The payload, unpacked."""
    begin = entry.payload_offset
    if entry.packing is Packing.RAW:
        return data[begin : begin + entry.payload_bytes]
    if entry.packing is Packing.UNKNOWN:
        raise ImageRefused(f"fatbin entry {entry.index}: packed in an unknown way")
    packed = data[begin : begin + entry.packed_bytes]
    found = (_unpack_lz4 if entry.packing is Packing.LZ4 else _unpack_zstd)(packed, entry)
    if len(found) != entry.unpacked_bytes:
        raise ImageRefused(
            f"fatbin entry {entry.index}: unpacks to {len(found)} bytes, its header says "
            f"{entry.unpacked_bytes}"
        )
    return found


def rebuild(
    data: bytes, entries: tuple[Entry, ...], payloads: Mapping[int, bytes]
) -> tuple[bytes, dict[int, int]]:
    """The container with these payloads instead, raw, and where each begins."""
    header_bytes = _CONTAINER.unpack_from(data)[2]
    parts: list[bytes] = [data[:header_bytes]]
    length, offsets = header_bytes, {}
    end = header_bytes
    for entry in entries:
        end = entry.end
        payload = payloads.get(entry.index)
        if payload is None:
            parts.append(data[entry.offset : end])
            length += end - entry.offset
            continue
        padded = payload + bytes(-len(payload) % _ALIGNMENT)
        header = bytearray(data[entry.offset : entry.payload_offset])
        struct.pack_into("<Q", header, _AT_PAYLOAD, len(padded))
        struct.pack_into("<I", header, _AT_PACKED, 0)
        struct.pack_into("<Q", header, _AT_FLAGS, entry.flags & ~(_LZ4 | _ZSTD))
        struct.pack_into("<Q", header, _AT_UNPACKED, 0)
        offsets[entry.index] = length + len(header)
        parts += (bytes(header), padded)
        length += len(header) + len(padded)
    assert offsets.keys() == payloads.keys()
    head = bytearray(parts[0])
    struct.pack_into("<Q", head, 8, length - header_bytes)
    parts[0] = bytes(head)
    parts.append(data[end:])
    return b"".join(parts), offsets


def _read_entry(data: bytes | memoryview, index: int, at: int, end: int) -> Entry:
    where = f"fatbin entry {index} at {at}"
    if end - at < _ENTRY.size:
        raise ImageRefused(f"{where}: {end - at} bytes are left, a header has {_ENTRY.size}")
    fields = _ENTRY.unpack_from(data, at)
    kind, header_bytes, payload, packed = fields[0], fields[2], fields[3], fields[4]
    architecture, flags, unpacked = fields[8], fields[11], fields[13]
    if header_bytes < _ENTRY.size or header_bytes + payload > end - at:
        raise ImageRefused(
            f"{where}: header of {header_bytes} and payload of {payload} bytes, {end - at} are left"
        )
    packing = _packing(flags, where)
    if packing is Packing.RAW and (packed or unpacked):
        packing = Packing.UNKNOWN
    elif packing is Packing.RAW:
        packed, unpacked = payload, payload
    if packed > payload or not (packed or packing is Packing.UNKNOWN):
        raise ImageRefused(f"{where}: {packed} packed bytes in a payload of {payload}")
    if unpacked > config.CUBIN_BYTES_MAX:
        raise ImageRefused(f"{where}: {unpacked} bytes, at most {config.CUBIN_BYTES_MAX}")
    return Entry(
        index=index,
        kind=EntryKind(kind) if kind in (1, 2) else EntryKind.OTHER,
        architecture=architecture,
        suffix="a" if flags & _EXACT else "f" if flags & _FAMILY else "",
        packing=packing,
        offset=at,
        header_bytes=header_bytes,
        payload_bytes=payload,
        packed_bytes=packed,
        unpacked_bytes=unpacked,
        flags=flags,
    )


def _packing(flags: int, where: str) -> Packing:
    if flags & _LZ4 and flags & _ZSTD:
        raise ImageRefused(f"{where}: packed in two ways, flags {flags:#x}")
    return Packing.LZ4 if flags & _LZ4 else Packing.ZSTD if flags & _ZSTD else Packing.RAW


def _unpack_lz4(packed: bytes, entry: Entry) -> bytes:
    try:
        import lz4.block
    except ImportError as error:
        raise _missing(error) from error
    try:
        return bytes(lz4.block.decompress(packed, uncompressed_size=entry.unpacked_bytes))
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise ImageRefused(f"fatbin entry {entry.index}: LZ4: {error}") from error


def _unpack_zstd(packed: bytes, entry: Entry) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise _missing(error) from error
    unpacker = zstandard.ZstdDecompressor(max_window_size=config.CUBIN_BYTES_MAX)
    try:
        # A reader takes no more than it is asked for, whatever the frame says of itself.
        with unpacker.stream_reader(packed) as reader:
            found = bytearray()
            while part := reader.read(entry.unpacked_bytes + 1 - len(found)):
                found += part
    except (zstandard.ZstdError, ValueError) as error:
        raise ImageRefused(f"fatbin entry {entry.index}: zstd: {error}") from error
    return bytes(found)


def _missing(error: ImportError) -> EnvironmentRefused:
    return EnvironmentRefused(
        f"{error}: packed images need Concordia's extra 'instrument' (pip install "
        "'concordia[instrument]')"
    )
