"""A journal stream without an owner, in this process's memory, and a reader of its own.

The reader checks everything that a record promises (chain, CRC, commit word, padding, payload hash by the xxhash library) in plain Python,
independently of concordia.journal, so that device code and journal code are not wrong together.
"""

import ctypes
from dataclasses import dataclass

import google_crc32c
import numpy as np
import xxhash

from concordia import abi
from concordia.device.memory import Buffer, JournalTarget

STREAM = 0xABCDEF
LAYOUT = 0x1A_40_07


def tree_hash(payload: bytes) -> int:
    digests = b""
    for at in range(0, len(payload), 4096):
        leaf = payload[at : at + 4096]
        digests += xxhash.xxh3_128_intdigest(leaf + bytes(4096 - len(leaf))).to_bytes(16, "little")
    while len(digests) < 256 or len(digests) % 64:
        digests += b"\0"
    return xxhash.xxh3_128_intdigest(digests)


def wide(pair: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> int:
    return int(pair[1]) << 64 | int(pair[0])


@dataclass(frozen=True)
class ReadRecord:
    """A committed record: its header as numpy's record, its payload, and where it lay."""

    header: np.void
    payload: bytes
    segment: int
    offset: int


class ScratchStream:
    """A pool and a control page; segments are lent on demand."""

    def __init__(
        self, *, segments: int = 8, segment_bytes: int = 1 << 20, lend: int | None = None
    ) -> None:
        self.segment_bytes = segment_bytes
        self.pool = Buffer(segments * segment_bytes)
        self.pool.view[:] = (
            b"\xa5" * self.pool.size
        )  # another life's bytes: nothing relies on zeroes
        self.control = Buffer(abi.STREAM_CONTROL.size)
        words = np.zeros(1, dtype=abi.STREAM_CONTROL.dtype)
        words["state"], words["stream"], words["layout_hash"] = abi.STREAM_OPEN, STREAM, LAYOUT
        self.control.view[:] = words.tobytes()
        self.salts: list[int] = []
        self.lend(segments if lend is None else lend)

    @property
    def target(self) -> JournalTarget:
        return JournalTarget(
            self.pool.address, self.pool.size, self.segment_bytes, self.control.address
        )

    def word(self, name: str) -> int:
        at = abi.STREAM_CONTROL.offsets()[name]
        return int.from_bytes(self.control.view[at : at + 8], "little")

    def lend(self, count: int) -> None:
        """Lend the next segments; entries first, then the count."""
        offsets = abi.STREAM_CONTROL.offsets()
        for _ in range(count):
            index = len(self.salts)
            salt = xxhash.xxh3_64_intdigest(index.to_bytes(8, "little"))
            at = offsets["lent"] + 16 * (index % abi.LENT_CAPACITY)
            segment = index % (self.pool.size // self.segment_bytes)
            entry = (
                segment.to_bytes(4, "little")
                + index.to_bytes(4, "little")
                + salt.to_bytes(8, "little")
            )
            self.control.view[at : at + 16] = entry
            self.salts.append(salt)
        ctypes.c_uint64.from_address(self.control.address + offsets["lent_count"]).value = len(
            self.salts
        )

    def records(self) -> list[ReadRecord]:
        """All committed records, every promise checked; the pool must not have lapped."""
        found: list[ReadRecord] = []
        last_hash = 0
        for index in range(self.word("taken_count")):
            start = index * self.segment_bytes
            head = bytes(self.pool.view[start : start + 256])
            header = np.frombuffer(head, abi.SEGMENT_HEADER.dtype)[0]
            assert (header["magic"], header["version"]) == (abi.SEGMENT_MAGIC, abi.ABI_VERSION)
            assert (header["segment"], header["ordinal"], header["stream"]) == (
                index,
                index,
                STREAM,
            )
            assert (header["salt"], header["first_sequence"]) == (self.salts[index], len(found))
            assert header["segment_bytes"] == self.segment_bytes
            assert wide(header["predecessor_hash"]) == last_hash
            assert header["header_crc"] == google_crc32c.value(head[:252])
            last_hash = xxhash.xxh3_128_intdigest(head)
            offset = start + 256
            while (record := self._record(offset, index, len(found), last_hash)) is not None:
                found.append(record)
                last_hash = xxhash.xxh3_128_intdigest(bytes(self.pool.view[offset : offset + 256]))
                offset += 256 + (len(record.payload) + 127) // 128 * 128 + 128
        return found

    def _record(
        self, offset: int, segment: int, sequence: int, last_hash: int
    ) -> ReadRecord | None:
        end = (segment + 1) * self.segment_bytes
        if offset + 384 > end:
            return None
        head = bytes(self.pool.view[offset : offset + 256])
        header = np.frombuffer(head, abi.RECORD_HEADER.dtype)[0]
        if header["magic"] != abi.RECORD_MAGIC or header["salt"] != self.salts[segment]:
            return None
        assert (header["version"], header["sequence"]) == (abi.ABI_VERSION, sequence)
        assert header["header_crc"] == google_crc32c.value(head[:252])
        assert wide(header["previous_hash"]) == last_hash
        size = int(header["payload_bytes"])
        padded = (size + 127) // 128 * 128
        payload = bytes(self.pool.view[offset + 256 : offset + 256 + size])
        assert not any(self.pool.view[offset + 256 + size : offset + 256 + padded])
        at = offset + 256 + padded
        word = int.from_bytes(self.pool.view[at : at + 8], "little")
        assert word == abi.commit_word(self.salts[segment], sequence)
        assert wide(header["payload_hash"]) == tree_hash(payload)
        return ReadRecord(header, payload, segment, offset)

    def close(self) -> None:
        self.pool.close()
        self.control.close()
