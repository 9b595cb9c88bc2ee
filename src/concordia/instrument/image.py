"""What the CUDA driver can be given to load, floor 3.

Owns: telling a fatbin, cubin, relocatable object and PTX text from one another, and one way to
look at their parts and to put others in. Promises: what is not one of them is passed through as
OTHER; what claims to be one and is not raises ImageRefused with the facts; a rebuilt image differs
only in the parts that were replaced, and says where they lie. Called by rewrite and the offline
command. It changes no code.
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument import fatbin
from concordia.instrument.elf import EXECUTABLE, HEADER_BYTES, MACHINE, RELOCATABLE, architecture_of
from concordia.instrument.fatbin import Entry, EntryKind, Packing

_ELF_MAGIC: Final = b"\x7fELF"
# possessive: what a comment took is never given back, so a text without an end costs one look
_PTX: Final = re.compile(rb"(?>\s|//[^\n]*+\n|/\*.*?\*/)*+\.version\s+\d+\.\d+\s", re.DOTALL)
_PTX_TARGET: Final = re.compile(rb"^[ \t]*+\.target[ \t]+sm_(\d{2,3})([af]?)", re.MULTILINE)
_PTX_HEAD_BYTES: Final = 64 << 10  # of comments before the first directive


class ImageKind(enum.Enum):
    """What an image is, by its own first bytes."""

    FATBIN = "fatbin"
    CUBIN = "cubin"
    RELOCATABLE = "relocatable object"
    PTX = "PTX"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """An image with other parts, and the offset in it of each of those."""

    data: bytes
    offsets: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Image:
    """One image. A cubin or a PTX text is its own only entry; an object or something else has
    none.
    """

    kind: ImageKind
    data: bytes
    entries: tuple[Entry, ...]

    def payload(self, index: int) -> bytes:
        """An entry, unpacked; PTX without the NULs behind it."""
        entry = self.entries[index]
        found = fatbin.unpack(self.data, entry) if self.kind is ImageKind.FATBIN else self.data
        return found.rstrip(b"\0") if entry.kind is EntryKind.PTX else found

    def rebuild(self, payloads: Mapping[int, bytes]) -> Rebuilt:
        """The image with these payloads instead of those entries."""
        if not payloads:
            return Rebuilt(self.data, {})
        if self.kind is not ImageKind.FATBIN:
            assert list(payloads) == [0]
            return Rebuilt(payloads[0], {0: 0})
        ended = {
            index: payload + b"\0" * (self.entries[index].kind is EntryKind.PTX)
            for index, payload in payloads.items()
        }
        return Rebuilt(*fatbin.rebuild(self.data, self.entries, ended))


def read_image(data: bytes) -> Image:
    """Look at an image; raises ImageRefused for one that is malformed or too large."""
    if not data:
        raise ImageRefused("an image of no bytes")
    if len(data) > config.IMAGE_BYTES_MAX:
        raise ImageRefused(f"an image of {len(data)} bytes, at most {config.IMAGE_BYTES_MAX}")
    magic = int.from_bytes(data[:4], "little")
    if magic == fatbin.CONTAINER_MAGIC:
        return Image(ImageKind.FATBIN, data, fatbin.read_entries(data))
    if magic == fatbin.WRAPPER_MAGIC:
        wrapper = fatbin.read_wrapper(data)
        raise ImageRefused(
            "this is the wrapper of a fatbin, which lies elsewhere in its process (at "
            f"{wrapper.container_address:#x}): give the fatbin itself"
        )
    if data[:4] == _ELF_MAGIC:
        return _read_elf(data)
    if _PTX.match(data[:_PTX_HEAD_BYTES]):
        return _read_ptx(data)
    return Image(ImageKind.OTHER, data, ())


def _read_elf(data: bytes) -> Image:
    if len(data) < HEADER_BYTES:
        raise ImageRefused(f"an ELF file of {len(data)} bytes: its header has {HEADER_BYTES}")
    kind, machine = struct.unpack_from("<HH", data, 16)
    if machine != MACHINE or kind not in (RELOCATABLE, EXECUTABLE):
        return Image(ImageKind.OTHER, data, ())
    if kind == RELOCATABLE:
        return Image(ImageKind.RELOCATABLE, data, ())
    if len(data) > config.CUBIN_BYTES_MAX:
        raise ImageRefused(f"a cubin of {len(data)} bytes, at most {config.CUBIN_BYTES_MAX}")
    return Image(ImageKind.CUBIN, data, (_only(data, EntryKind.ELF, architecture_of(data), ""),))


def _read_ptx(data: bytes) -> Image:
    if len(data) > config.CUBIN_BYTES_MAX:
        raise ImageRefused(f"PTX of {len(data)} bytes, at most {config.CUBIN_BYTES_MAX}")
    if b"\0" in data.rstrip(b"\0"):
        raise ImageRefused("PTX with a NUL in its text")
    target = _PTX_TARGET.search(data[:_PTX_HEAD_BYTES])
    architecture, suffix = (int(target[1]), target[2].decode()) if target else (0, "")
    return Image(ImageKind.PTX, data, (_only(data, EntryKind.PTX, architecture, suffix),))


def _only(data: bytes, kind: EntryKind, architecture: int, suffix: str) -> Entry:
    return Entry(
        index=0,
        kind=kind,
        architecture=architecture,
        suffix=suffix,
        packing=Packing.RAW,
        offset=0,
        header_bytes=0,
        payload_bytes=len(data),
        packed_bytes=len(data),
        unpacked_bytes=len(data),
        flags=0,
    )
