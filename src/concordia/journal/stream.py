"""Reader of one stream: records in order, and what its end means, floor 3.

Owns: the place of a reader in a stream and the decision table of ends. Promises: what it yields is
a prefix of what the writer committed, each header proven by salt, sequence, chain and CRC; it never
skips a place. The first place that does not hold the next record is the end: OPEN while the writer
lives, else CLEAN (untouched), TORN (what a crash leaves) or CORRUPT (something committed lies
behind it, or the writer said that it was committed). Called by owner and tools. It does not check
payloads: `has_sound_payload` does, for restore and verify.
"""

from __future__ import annotations

import enum
from typing import Final, Protocol

import numpy as np

from concordia import abi
from concordia.journal import record
from concordia.journal.control import Lent
from concordia.journal.record import Record, SegmentStart

_LINE_WORDS: Final = abi.LINE_BYTES // 8
_SALT_WORD: Final = 1  # of a record header: magic, version and kind are the word before


class End(enum.Enum):
    """What the end of a stream means."""

    OPEN = "open"  # the writer may still append
    CLEAN = "clean"  # the next place is untouched
    TORN = "torn"  # the next record was begun and never committed: what a crash leaves
    CORRUPT = "corrupt"  # a committed record cannot be read: what a fault leaves


class PoolView(Protocol):
    """The part of a Pool that reading needs."""

    @property
    def view(self) -> memoryview: ...
    @property
    def segment_bytes(self) -> int: ...


class StreamReader:
    """Reads one stream as far as it is committed; call `read` again for what came since."""

    def __init__(self, pool: PoolView, stream: int) -> None:
        self.stream = stream
        self.lent: dict[int, Lent] = {}
        self.sequence = 0  # of the record that comes next
        self.ordinal = -1  # of the segment that is read, -1 before the first
        self.gaps = 0  # segments given back before we came
        self._pool = pool
        self._offset = 0
        self._end = 0
        self._salt = 0
        self._chain = 0  # hash of the header before the next record, in this segment
        self._last_hash = 0  # hash of the last record header of the stream

    def lend(self, lent: Lent) -> None:
        """The owner has lent another segment to the stream."""
        self.lent[lent.ordinal] = lent

    def read(self, limit: int) -> list[Record]:
        """At most `limit` further committed records."""
        found: list[Record] = []
        view = self._pool.view
        while len(found) < limit:
            parsed = record.parse_record(
                view, self._offset, end=self._end, salt=self._salt, sequence=self.sequence,
                previous_hash=self._chain,
            )  # fmt: skip
            if parsed is not None and record.is_committed(view, parsed):
                found.append(parsed)
                self.sequence += 1
                self._chain = self._last_hash = parsed.header_hash
                self._offset = parsed.end_offset
            elif not self._enter_next():
                break
        return found

    def classify(
        self, committed_count: int, *, is_final: bool, taken_count: int | None = None
    ) -> End:
        """What the place that stopped `read` means; `committed_count` was loaded before that
        read. `taken_count`: see `later_committed`.
        """
        if self.sequence < committed_count:
            return End.CORRUPT  # the hint is stored after the commit word, with release order
        if not is_final:
            return End.OPEN
        if self.later_committed(taken_count) is not None:
            return End.CORRUPT
        return End.TORN if self._is_touched() else End.CLEAN

    def later_committed(self, taken_count: int | None = None) -> Record | None:
        """A committed record at or after the sequence that cannot be read: proof of damage.

        A header alone proves nothing: the writer's fence orders it before its own commit word, not
        after the one before. A commit word does: its release covers everything before it, so also
        that its segment was taken. With the writer's `taken_count`, loaded after the last read, the
        segments that were only lent ahead are left out: gigabytes, where a prefill may come.
        """
        end = max(self.lent, default=-1) + 1 if taken_count is None else taken_count
        for ordinal in sorted(self.lent):
            if not self.ordinal <= ordinal < max(end, self.ordinal + 1):
                continue
            lent = self.lent[ordinal]
            base = lent.segment * self._pool.segment_bytes
            start = self._offset if ordinal == self.ordinal else base + record.HEADER_BYTES
            hit = self._search(start, base + self._pool.segment_bytes, lent.salt)
            if hit is not None:
                return hit
        return None

    def skip_gap(self) -> bool:
        """Go on behind segments that an owner took back before we came; for adoption and tools."""
        following = [ordinal for ordinal in self.lent if ordinal > self.ordinal]
        if not following or min(following) == self.ordinal + 1 or self.later_here() is not None:
            return False
        ordinal = min(following)
        start = self._start(ordinal)
        if start is None or start.first_sequence < self.sequence:
            return False
        self.gaps += ordinal - self.ordinal - 1
        self.sequence = start.first_sequence
        self._last_hash = start.predecessor_hash
        self._enter(start)
        return True

    def later_here(self) -> Record | None:
        """Like later_committed, in the present segment only."""
        if self.ordinal < 0:
            return None
        return self._search(self._offset, self._end, self._salt)

    def _enter_next(self) -> bool:
        start = self._start(self.ordinal + 1)
        if (
            start is None
            or start.first_sequence != self.sequence
            or start.predecessor_hash != self._last_hash
        ):
            return False
        self._enter(start)
        return True

    def _enter(self, start: SegmentStart) -> None:
        base = start.segment * self._pool.segment_bytes
        self.ordinal = start.ordinal
        self._offset = base + record.HEADER_BYTES
        self._end = base + self._pool.segment_bytes
        self._salt = start.salt
        self._chain = start.header_hash

    def _start(self, ordinal: int) -> SegmentStart | None:
        lent = self.lent.get(ordinal)
        if lent is None or (lent.segment + 1) * self._pool.segment_bytes > len(self._pool.view):
            return None
        start = record.parse_segment(self._pool.view, lent.segment, self._pool.segment_bytes)
        if (
            start is None
            or start.stream != self.stream
            or start.ordinal != ordinal
            or start.salt != lent.salt
        ):
            return None
        return start

    def _search(self, start: int, end: int, salt: int) -> Record | None:
        """The first committed record of this salt and a later sequence in [start, end)."""
        end = min(end, len(self._pool.view))
        count = (end - start) // abi.LINE_BYTES
        if count <= 0:
            return None
        words = np.frombuffer(self._pool.view, "<u8", count * _LINE_WORDS, start)
        for line in np.flatnonzero(words[_SALT_WORD::_LINE_WORDS] == np.uint64(salt)):
            offset = start + int(line) * abi.LINE_BYTES
            hit = record.parse_any_record(self._pool.view, offset, end=end, salt=salt)
            if hit and hit.sequence >= self.sequence and record.is_committed(self._pool.view, hit):
                return hit
        return None

    def _is_touched(self) -> bool:
        """Whether the next place carries the salt of this life: somebody began a record there."""
        if self.ordinal < 0 or self._offset + record.HEADER_BYTES > self._end:
            return False
        at = self._offset + 8 * _SALT_WORD
        return self._pool.view[at : at + 8] == self._salt.to_bytes(8, "little")


def has_sound_payload(view: memoryview, found: Record) -> bool:
    """Whether the payload is what the header promises."""
    payload = view[found.payload_offset : found.payload_offset + found.payload_bytes]
    return record.payload_hash(payload) == found.payload_hash
