"""Invariants: headers have exactly the layout of the ABI; what was packed is parsed; what is not expected, is damaged or does not fit
its segment is not a record; the tree hash is the documented one for every length."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash

from concordia import abi
from concordia.device.payload_hash import PayloadHash
from concordia.journal import record
from concordia.journal.record import Record, SegmentStart

SALT = 0x1234567890ABCDEF
RECORD = Record(
    kind=abi.KIND_KV_BLOCK, salt=SALT, sequence=7, previous_hash=(3 << 64) | 5, key=(11 << 64) | 13,
    incarnation=17, region=19, flags=16, token_start=32, token_end=48, payload_bytes=300,
    payload_hash=(23 << 64) | 29, handler_hash=31, layout_hash=37, step=41, stamp_ns=43, origin=47,
    model_hash=53, offset=128, header_hash=0,
)  # fmt: skip


def parse(raw: bytes, offset: int = 128, **changes: int) -> Record | None:
    wanted = {"end": 4096, "salt": SALT, "sequence": 7, "previous_hash": RECORD.previous_hash} | changes
    return record.parse_record(memoryview(bytes(offset) + raw.ljust(3968, b"\0")), offset, **wanted)


def test_record_header_has_the_layout_of_the_abi_when_packed() -> None:
    found = np.frombuffer(record.pack_record(RECORD), abi.RECORD_HEADER.dtype)[0]
    assert found["magic"] == abi.RECORD_MAGIC
    assert found["version"] == abi.ABI_VERSION
    for name in ("kind", "salt", "sequence", "incarnation", "region", "flags", "token_start", "token_end",
                 "payload_bytes", "handler_hash", "layout_hash", "step", "stamp_ns", "origin",
                 "model_hash"):  # fmt: skip
        assert found[name] == getattr(RECORD, name), name
    for name in ("previous_hash", "key", "payload_hash"):
        low, high = (int(half) for half in found[name])
        assert high << 64 | low == getattr(RECORD, name), name


def test_segment_header_has_the_layout_of_the_abi_when_packed() -> None:
    start = SegmentStart(3, 5, 7, 11, 13, (17 << 64) | 19, 4096, 0)
    raw = record.pack_segment(start)
    found = np.frombuffer(raw, abi.SEGMENT_HEADER.dtype)[0]
    assert found["magic"] == abi.SEGMENT_MAGIC
    for name in ("segment", "stream", "ordinal", "salt", "first_sequence", "segment_bytes"):
        assert found[name] == getattr(start, name), name
    assert [int(half) for half in found["predecessor_hash"]] == [19, 17]
    parsed = record.parse_segment(memoryview(bytes(3 * 4096) + raw), 3, 4096)
    assert parsed == start._replace(header_hash=xxhash.xxh3_128_intdigest(raw))


def test_record_comes_back_when_it_is_the_one_expected() -> None:
    raw = record.pack_record(RECORD)
    assert parse(raw) == RECORD._replace(header_hash=xxhash.xxh3_128_intdigest(raw))


@pytest.mark.parametrize(
    "changes",
    [{"salt": SALT + 1}, {"sequence": 6}, {"sequence": 8}, {"previous_hash": 5}, {"end": 128 + 767}],
)
def test_record_is_refused_when_it_is_not_the_one_expected(changes: dict[str, int]) -> None:
    assert parse(record.pack_record(RECORD), **changes) is None


def test_record_is_refused_when_its_length_is_absurd() -> None:
    for size in (1 << 63, (1 << 64) - 1, 4096):
        assert parse(record.pack_record(RECORD._replace(payload_bytes=size))) is None


def test_record_is_refused_when_any_bit_of_its_header_is_flipped() -> None:
    raw = record.pack_record(RECORD)
    for bit in range(len(raw) * 8):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        assert parse(bytes(damaged)) is None, bit


def test_record_is_refused_when_nothing_fits_behind_it() -> None:
    assert record.parse_record(memoryview(bytes(256)), 0, end=256, salt=0, sequence=0, previous_hash=0) is None


def reference_hash(payload: bytes) -> int:
    digests = b""
    for at in range(0, len(payload), 4096):
        value = xxhash.xxh3_128(payload[at : at + 4096].ljust(4096, b"\0")).intdigest()
        digests += (value & (1 << 64) - 1).to_bytes(8, "little") + (value >> 64).to_bytes(8, "little")
    size = max(256, (len(digests) + 63) // 64 * 64)
    return xxhash.xxh3_128(digests + bytes(size - len(digests))).intdigest()


def test_payload_hash_is_the_documented_tree_for_every_length() -> None:
    seed = 20261120
    print("seed", seed)
    data = random.Random(seed).randbytes(150_000)
    for size in (0, 1, 127, 128, 4095, 4096, 4097, 8192, 65536, 65537, 69632, 131072, 150_000):
        assert record.payload_hash(data[:size]) == reference_hash(data[:size]), size
        assert record.payload_hash(memoryview(data)[:size]) == reference_hash(data[:size]), size


def test_compiled_payload_hash_is_the_library_s_for_every_length_and_place() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    data = rng.randbytes(300_000)
    address = np.frombuffer(data, np.uint8).ctypes.data
    hasher = PayloadHash()  # its room grows and is used again
    sizes = (1, 127, 4095, 4096, 4097, 8192, 65537, 1, 250_000, *(rng.randrange(1, 250_000) for _ in range(60)))
    for size in sizes:
        at = rng.randrange(len(data) - size)
        assert hasher.of(address + at, size) == record.payload_hash(data[at : at + size]), (at, size)


def test_record_bytes_are_whole_lines_for_every_payload() -> None:
    for size in range(1000):
        total = record.record_bytes(size)
        assert total % abi.LINE_BYTES == 0
        assert 256 + size + 8 <= total <= 256 + size + 127 + 128
