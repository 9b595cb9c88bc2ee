"""One record of the journal: its header, its hashes and its place, floor 3.

Owns: packing and parsing of RecordHeader and SegmentHeader, the tree hash of payloads, the
arithmetic of places. Promises: `parse` copies the 256 bytes once and judges the copy, so a writer
that still stores cannot change what was judged; what it returns carries this salt, this sequence
and this chain, or it returns None. Called by stream (reading), writer (writing) and whoever checks
a payload. It never waits and it never looks at a commit word on its own: `is_committed` does, for
the stream.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import google_crc32c
import xxhash

from concordia import abi

HEADER_BYTES: Final = 256
RECORD_BYTES_MIN: Final = HEADER_BYTES + abi.LINE_BYTES  # a record without payload
_LOW: Final = 0xFFFFFFFFFFFFFFFF
_CRC_AT: Final = 252

# magic version kind | salt sequence previous(2) key(2) incarnation | region flags start end | bytes
# hash(2) handler layout step stamp origin model
_RECORD: Final = struct.Struct("<IHHQQQQQQQIIIIQQQQQQQQQ100xI")
# magic | version segment | stream ordinal salt first_sequence predecessor(2) segment_bytes
_SEGMENT: Final = struct.Struct("<QIIQQQQQQQ180xI")
_WORD: Final = struct.Struct("<Q")

if _RECORD.size != HEADER_BYTES or _SEGMENT.size != HEADER_BYTES:
    raise RuntimeError("record.py and the ABI disagree about the size of a header")


class Record(NamedTuple):
    """A record header as it was judged; 128-bit values are one int."""

    kind: int
    salt: int
    sequence: int
    previous_hash: int
    key: int
    incarnation: int
    region: int
    flags: int
    token_start: int
    token_end: int
    payload_bytes: int
    payload_hash: int
    handler_hash: int
    layout_hash: int
    step: int
    stamp_ns: int
    origin: int  # of a copy: the replica whose stream had the original
    model_hash: int  # of what computed the bytes: model, adapter, salt
    offset: int  # of the header, in the pool
    header_hash: int

    @property
    def payload_offset(self) -> int:
        """Where the payload begins in the pool."""
        return self.offset + HEADER_BYTES

    @property
    def end_offset(self) -> int:
        """Where the next record begins in the pool."""
        return self.offset + record_bytes(self.payload_bytes)


class SegmentStart(NamedTuple):
    """A segment header as it was judged."""

    segment: int
    stream: int
    ordinal: int
    salt: int
    first_sequence: int
    predecessor_hash: int
    segment_bytes: int
    header_hash: int


def align(size: int) -> int:
    """`size` rounded up to whole lines."""
    return -(-size // abi.LINE_BYTES) * abi.LINE_BYTES


def record_bytes(payload_bytes: int) -> int:
    """Bytes that a record occupies: header, padded payload, the line of the commit word."""
    return HEADER_BYTES + align(payload_bytes) + abi.LINE_BYTES


def payload_hash(payload: bytes | memoryview) -> int:
    """XXH3-128 per 4 KiB leaf and over the digests of the leaves, as the ABI lays down."""
    return root_hash(leaf_digests(payload))


def leaf_digests(payload: bytes | memoryview) -> bytes:
    """XXH3-128 of each 4 KiB leaf, the last one zero-padded; 16 bytes each."""
    view = memoryview(payload).cast("B")
    digests = bytearray()
    whole = len(view) // abi.LEAF_BYTES * abi.LEAF_BYTES
    leaf_digest = xxhash.xxh3_128_intdigest
    for at in range(0, whole, abi.LEAF_BYTES):
        digests += leaf_digest(view[at : at + abi.LEAF_BYTES]).to_bytes(16, "little")
    if whole < len(view):
        last = bytes(view[whole:]).ljust(abi.LEAF_BYTES, b"\0")
        digests += leaf_digest(last).to_bytes(16, "little")
    return bytes(digests)


def root_hash(digests: bytes) -> int:
    """The payload hash of leaves with these digests."""
    padded = max(abi.ROOT_BYTES_MIN, -(-len(digests) // 64) * 64)
    return xxhash.xxh3_128_intdigest(digests.ljust(padded, b"\0"))


def request_key(request: str) -> int:
    """The key that records of this request carry."""
    return xxhash.xxh3_128_intdigest(request.encode("utf-8"))


def pack_record(record: Record) -> bytes:
    """The 256 bytes of a header; `header_hash` and `offset` are not stored."""
    body = _RECORD.pack(
        abi.RECORD_MAGIC,
        abi.ABI_VERSION,
        record.kind,
        record.salt,
        record.sequence,
        *_halves(record.previous_hash),
        *_halves(record.key),
        record.incarnation,
        record.region,
        record.flags,
        record.token_start,
        record.token_end,
        record.payload_bytes,
        *_halves(record.payload_hash),
        record.handler_hash,
        record.layout_hash,
        record.step,
        record.stamp_ns,
        record.origin,
        record.model_hash,
        0,
    )
    return _with_crc(body)


def pack_segment(start: SegmentStart) -> bytes:
    """The 256 bytes at the beginning of a segment."""
    body = _SEGMENT.pack(
        abi.SEGMENT_MAGIC,
        abi.ABI_VERSION,
        start.segment,
        start.stream,
        start.ordinal,
        start.salt,
        start.first_sequence,
        *_halves(start.predecessor_hash),
        start.segment_bytes,
        0,
    )
    return _with_crc(body)


def parse_record(
    pool: memoryview, offset: int, *, end: int, salt: int, sequence: int, previous_hash: int
) -> Record | None:
    """The header at `offset` if it is the one expected there; `end` is where its segment ends."""
    if offset + RECORD_BYTES_MIN > end:
        return None
    raw = bytes(pool[offset : offset + HEADER_BYTES])
    (
        magic, version, kind, salt_found, sequence_found, previous_low, previous_high, key_low,
        key_high, incarnation, region, flags, token_start, token_end, size, hash_low, hash_high,
        handler, layout, step, stamp, origin, model, crc,
    ) = _RECORD.unpack(raw)  # fmt: skip
    if (
        magic != abi.RECORD_MAGIC
        or salt_found != salt
        or sequence_found != sequence
        or previous_high << 64 | previous_low != previous_hash
        or version != abi.ABI_VERSION
        or google_crc32c.value(raw[:_CRC_AT]) != crc
        or offset + record_bytes(size) > end
    ):
        return None
    return Record(
        kind, salt, sequence, previous_hash, key_high << 64 | key_low, incarnation, region, flags,
        token_start, token_end, size, hash_high << 64 | hash_low, handler, layout, step, stamp,
        origin, model, offset, xxhash.xxh3_128_intdigest(raw),
    )  # fmt: skip


def parse_any_record(pool: memoryview, offset: int, *, end: int, salt: int) -> Record | None:
    """The header at `offset` if it is any undamaged one of this salt, wherever it belongs."""
    if offset + RECORD_BYTES_MIN > end:
        return None
    raw = bytes(pool[offset : offset + HEADER_BYTES])
    found = _RECORD.unpack(raw)
    sequence, previous_hash = found[4], found[6] << 64 | found[5]
    return parse_record(
        pool, offset, end=end, salt=salt, sequence=sequence, previous_hash=previous_hash
    )


def is_committed(pool: memoryview, record: Record) -> bool:
    """Whether the commit word behind the payload is there."""
    at = record.end_offset - abi.LINE_BYTES
    word: int = _WORD.unpack_from(pool, at)[0]
    return word == abi.commit_word(record.salt, record.sequence)


def parse_segment(pool: memoryview, segment: int, segment_bytes: int) -> SegmentStart | None:
    """The header of a segment if it is undamaged and says that it lies where it lies."""
    at = segment * segment_bytes
    raw = bytes(pool[at : at + HEADER_BYTES])
    magic, version, index, stream, ordinal, salt, first, low, high, size, crc = _SEGMENT.unpack(raw)
    if (
        magic != abi.SEGMENT_MAGIC
        or version != abi.ABI_VERSION
        or index != segment
        or size != segment_bytes
        or google_crc32c.value(raw[:_CRC_AT]) != crc
    ):
        return None
    return SegmentStart(
        index, stream, ordinal, salt, first, high << 64 | low, size, xxhash.xxh3_128_intdigest(raw)
    )


def header_hash(header: bytes) -> int:
    """What the next header in the segment names as the one before it."""
    return xxhash.xxh3_128_intdigest(header)


def crc32c(data: bytes) -> int:
    """CRC32C of `data`."""
    value: int = google_crc32c.value(data)
    return value


def _halves(value: int) -> tuple[int, int]:
    return value & _LOW, value >> 64


def _with_crc(body: bytes) -> bytes:
    return body[:_CRC_AT] + crc32c(body[:_CRC_AT]).to_bytes(4, "little")
