"""What streams have committed, read into the index, floor 3.

Owns: reading on, and the judgement of where a stream ends. Promises: a round reads at most
SCAN_RECORDS_MAX records of a stream, so that no writer holds the others up; a place counts as
damaged only after it stayed unreadable for HINT_SETTLE_S, because a count may be seen before its
record; a stream found damaged is read no further, and said once. Called by streams. It seals
nothing and frees nothing.
"""

from __future__ import annotations

import time

from concordia import config
from concordia.journal.replay import ReplayIndex
from concordia.journal.stream import End
from concordia.journal.stream_state import Stream


class Intake:
    """One index and the streams that feed it."""

    def __init__(self, index: ReplayIndex, view: memoryview) -> None:
        self._index = index
        self._view = view
        self.corrupt_count = 0

    def scan(self, stream: Stream) -> int:
        """Read one stream; cheap when its writer did nothing."""
        hint = stream.control.committed_count
        if hint == stream.hint_seen and not stream.late_since:
            return 0
        count = self._read(stream, config.SCAN_RECORDS_MAX)
        if count == config.SCAN_RECORDS_MAX:
            return count
        stream.hint_seen = hint
        if stream.reader.classify(hint, is_final=False) is not End.CORRUPT:
            stream.late_since = 0.0
            return count
        # The count is stored without order, so for a moment it may run ahead of the record it
        # counts.
        now = time.monotonic()
        stream.late_since = stream.late_since or now
        if now - stream.late_since > config.HINT_SETTLE_S:
            self._mark_corrupt(stream)
        return count

    def read_to_end(self, stream: Stream) -> End:
        """Read what was committed when we began, however much it is, and say what stopped us."""
        reader = stream.reader
        # loaded once: a zombie that goes on cannot hold us here
        hint = stream.control.committed_count
        while reader.sequence < hint and self._read(stream, config.SCAN_RECORDS_MAX):
            pass  # finite, because the hint is, or the pool
        began = moved = time.monotonic()
        while (end := self._end_of(stream, hint)) is End.CORRUPT:
            # Count and search may have run ahead of what was read, so only a place that stays bad
            # is bad.
            is_moving = self._read(stream, config.SCAN_RECORDS_MAX) > 0
            now = time.monotonic()
            if is_moving:
                moved = now
                if reader.sequence >= hint and now - began > config.HINT_SETTLE_S:
                    return End.CLEAN  # a zombie appends as fast as we read: it is sealed here
            elif now - moved > config.HINT_SETTLE_S:
                self._mark_corrupt(stream)
                break
        return end

    def read_own(self, stream: Stream) -> None:
        """Follow our own writer, so that passed segments count as passed; the index knows
        already.
        """
        while stream.reader.read(config.SCAN_RECORDS_MAX):
            pass

    def report_damage(self, reason: str) -> None:
        """Something that no crash explains."""
        self.corrupt_count += 1
        self._index.events.note({"event": "corruption", "reason": reason})

    def _end_of(self, stream: Stream, hint: int) -> End:
        """A failover waits for it: only what the writer has taken is searched."""
        taken = stream.control.taken_count
        return stream.reader.classify(hint, is_final=True, taken_count=taken)

    def _read(self, stream: Stream, limit: int) -> int:
        records = stream.reader.read(limit)
        for record in records:
            self._index.ingest(record, stream.source, self._view)
        return len(records)

    def _mark_corrupt(self, stream: Stream) -> None:
        stream.end = End.CORRUPT
        self.report_damage(
            f"stream {stream.identity.stream:#x} ({stream.control.label}): record "
            f"{stream.reader.sequence} was committed and cannot be read"
        )
