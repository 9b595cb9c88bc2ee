"""Writer of one stream in Python: the cleaner's hand, and the reference that tests compare with,
floor 3.

Owns: the order of stores of one append, in the plainest form: payload, header, fence, commit word,
then the counters. Promises: never waits; without a lent segment it counts the loss and raises
JournalFull. Engines do not use it: theirs is compiled (runtime/executor). Here plain stores are
enough, because the only live reader is the same process (the owner tells others where to look,
through a socket), and a kill leaves exactly the stores made so far: `fence` marks where compiled
code needs more, and tests enumerate its orders.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from concordia import abi
from concordia.errors import JournalError, JournalFull
from concordia.journal import record
from concordia.journal.control import Control, Lent
from concordia.journal.record import Record, SegmentStart


class Entry(NamedTuple):
    """What a caller says about a record; the writer adds place, chain and hashes."""

    kind: int
    key: int
    incarnation: int = 0
    token_start: int = 0
    token_end: int = 0
    step: int = 0
    region: int = 0
    flags: int = 0
    layout_hash: int = 0
    handler_hash: int = 0
    stamp_ns: int = 0  # 0 for now; a copy keeps its original's
    origin: int = 0
    model_hash: int = 0


class StreamWriter:
    """Appends to one stream. Not thread-safe: a stream has one writer."""

    def __init__(
        self, pool: memoryview, control: Control, *, segment_bytes: int, stream: int
    ) -> None:
        self._pool = pool
        self._control = control
        self._segment_bytes = segment_bytes
        self._stream = stream
        self._sequence = 0
        self._bytes = 0
        self._taken = 0
        self._offset = 0
        self._end = 0
        self._salt = 0
        self._chain = 0
        self._last_hash = 0

    def append(
        self, entry: Entry, payload: bytes | memoryview, *, payload_hash: int | None = None
    ) -> Record:
        """Commit one record; raises JournalFull (and counts the loss) or JournalError (too
        large).
        """
        size = record.record_bytes(len(payload))
        if size > self._segment_bytes - record.HEADER_BYTES:
            raise JournalError(
                f"a record of {size} bytes does not fit a segment of {self._segment_bytes}"
            )
        if self._offset + size > self._end:
            self._take()
        hashed = record.payload_hash(payload) if payload_hash is None else payload_hash
        made = Record(
            entry.kind, self._salt, self._sequence, self._chain, entry.key, entry.incarnation,
            entry.region, entry.flags, entry.token_start, entry.token_end, len(payload), hashed,
            entry.handler_hash, entry.layout_hash, entry.step,
            entry.stamp_ns or time.monotonic_ns(), entry.origin, entry.model_hash, self._offset, 0,
        )  # fmt: skip
        header = record.pack_record(made)
        self.store(made.payload_offset, payload)
        padding = record.align(len(payload)) - len(payload)
        self.store(made.payload_offset + len(payload), bytes(padding))
        self.store(made.offset, header)
        self.fence()  # pairs with the reader, which judges the header only with its commit word
        word = abi.commit_word(self._salt, self._sequence)
        self.publish(made.end_offset - abi.LINE_BYTES, word)
        self._sequence += 1
        self._bytes += size
        self._offset = made.end_offset
        made = made._replace(header_hash=record.header_hash(header))
        self._chain = self._last_hash = made.header_hash
        self.fence()  # a reader that sees the count must find the record: StreamReader.classify
        self.count("committed_count", self._sequence)
        self.count("committed_bytes", self._bytes)
        self.count("segment_offset", self._offset % self._segment_bytes)
        return made

    def store(self, offset: int, data: bytes | memoryview) -> None:
        """Bytes into the pool; a test overrides this to see every store."""
        self._pool[offset : offset + len(data)] = data

    def publish(self, offset: int, word: int) -> None:
        """The commit word, in one aligned store; a test overrides this too."""
        self._pool[offset : offset + 8].cast("Q")[0] = word

    def count(self, name: str, value: int) -> None:
        """A word of the control; a test overrides this too."""
        self._control.store(name, value)

    def fence(self) -> None:
        """Everything stored before is seen before anything stored after."""

    def _take(self) -> None:
        """Go on in the next lent segment."""
        if self._taken >= self._control.lent_count:
            self.count("dropped_count", self._control.dropped_count + 1)
            raise JournalFull(f"stream {self._stream:#x} has no segment left after {self._taken}")
        lent = next(found for found in self._control.lent() if found.ordinal == self._taken)
        start = SegmentStart(
            lent.segment, self._stream, lent.ordinal, lent.salt, self._sequence, self._last_hash,
            self._segment_bytes, 0,
        )  # fmt: skip
        header = record.pack_segment(start)
        base = lent.segment * self._segment_bytes
        self.store(base, header)
        self._enter(lent, header)
        self._taken += 1
        self.count("taken_count", self._taken)

    def _enter(self, lent: Lent, header: bytes) -> None:
        base = lent.segment * self._segment_bytes
        self._offset = base + record.HEADER_BYTES
        self._end = base + self._segment_bytes
        self._salt = lent.salt
        self._chain = record.header_hash(header)
