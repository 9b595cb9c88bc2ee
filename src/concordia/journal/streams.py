"""Every stream of a journal as its owner keeps it: lending, reading, sealing, giving back, floor 3.

Owns: which segment belongs to whom, and the index that grows from what is read. Promises: a segment is lent only when it was marked
free; it is given back only when nothing in it is wanted, no restore was just told of it, and its writer has moved past it or is known
to be dead; nothing beyond a seal is ever read. Called by the owner's only thread, by the cleaner, and by desk for requests.
It does not know sockets or processes: the owner tells it which writers are gone.
"""

from __future__ import annotations

import secrets
import time
from collections import deque

from concordia import abi, config
from concordia.errors import JournalError, JournalFull
from concordia.journal.control import Control, Identity, Lent
from concordia.journal.coverage import Cut
from concordia.journal.ledger import Source
from concordia.journal.record import Record
from concordia.journal.replay import ReplayIndex
from concordia.journal.segment import Board, Pool
from concordia.journal.stream import End, StreamReader
from concordia.journal.survey import Survey, source_of
from concordia.journal.writer import StreamWriter


class Stream:
    """One writer's stream."""

    def __init__(self, control: Control, identity: Identity, reader: StreamReader, source: Source) -> None:
        self.control = control
        self.identity = identity
        self.reader = reader
        self.source = source
        self.segments: dict[int, int] = {entry.ordinal: entry.segment for entry in reader.lent.values()}
        self.is_sealed = False
        self.is_released = False  # its writer is known to be dead, or is this process
        self.end = End.OPEN
        self.ahead = 1  # segments to keep lent beyond what was taken
        self.dropped_seen = 0
        self.dropped_told = 0.0  # when
        self.hint_seen = -1
        self.late_since = 0.0  # since when the count is ahead of what can be read
        self.writer: StreamWriter | None = None  # the cleaner's own streams

    @property
    def is_read(self) -> bool:
        """Whether records may still come."""
        return not self.is_sealed and self.end is not End.CORRUPT and self.writer is None


class Streams:
    """All streams, all segments, and the index over them."""

    def __init__(self, pool: Pool, board: Board) -> None:
        self.pool = pool
        self.board = board
        self.index = ReplayIndex(pool.segment_bytes)
        self.by_slot: dict[int, Stream] = {}
        self.free: deque[int] = deque()
        self.corrupt_count = 0
        self._blocked: set[int] = set()  # slots that were found damaged
        self._pinned: dict[int, float] = {}  # segment: until when
        self._next = board.take() << 32  # stream ids of this owner; the epoch makes them unique

    def adopt(self, found: Survey) -> None:
        """Go on with what an owner before us left: seals stay, open streams stay open."""
        self.free.extend(found.free)
        self._blocked = found.blocked_slots
        for message in found.damage:
            self._report_damage(message)
        arrivals: list[tuple[int, Record, Source]] = []
        for old in found.streams:
            stream = Stream(old.control, old.identity, old.reader, old.source)
            self.by_slot[old.control.slot] = stream
            for message in old.damage:
                self._report_damage(message)
            stream.end = End.CORRUPT if old.end is End.CORRUPT else End.OPEN
            stream.dropped_seen = old.control.dropped_count
            if old.sealed_count != abi.NOT_SEALED:
                stream.is_sealed = stream.source.is_final = True
                old.control.seal(old.sealed_count)  # an owner that died half-way through a seal
            stamp = 0
            is_copy = old.identity.writer_kind == abi.WRITER_CLEANER
            for record in old.records:  # copies carry their originals' stamps: they sort beside them
                stamp = record.stamp_ns if is_copy else max(stamp, record.stamp_ns)
                arrivals.append((stamp, record, old.source))
            if is_copy:  # its writer was the owner before us
                if not stream.is_sealed:
                    self._finish(stream, old.reader.sequence)
                self.release(stream)
        for _, record, source in sorted(arrivals, key=lambda arrival: arrival[0]):
            self.index.ingest(record, source, self.pool.view)

    # --- writers

    def open(self, identity: Identity, label: str) -> Stream:
        """Give a slot to a new writer; raises JournalError when all are taken."""
        taken = self.by_slot.keys() | self._blocked
        is_own = identity.writer_kind == abi.WRITER_CLEANER
        capacity = abi.STREAM_CAPACITY - (0 if is_own else config.CLEANER_SLOTS)
        slot = next((s for s in range(abi.STREAM_CAPACITY) if s not in taken), None)
        if slot is None or len(taken) >= capacity:
            raise JournalError(f"all {capacity} stream slots are taken; {label} got none")
        self._next += 1
        identity = identity._replace(stream=self._next)
        control = self.board.control(slot)
        control.open(identity, label)
        stream = Stream(control, identity, StreamReader(self.pool, identity.stream), source_of(identity))
        self.by_slot[slot] = stream
        self.lend(stream)
        return stream

    def open_own(self, *, rank: int, world: int, layout_hash: int) -> Stream:
        """A stream of this process, for the cleaner."""
        identity = Identity(0, abi.WRITER_CLEANER, rank, world, self.board.owner_pid, 0, 0, layout_hash)
        stream = self.open(identity, "cleaner")
        stream.source.is_final = stream.is_released = True
        stream.writer = StreamWriter(
            self.pool.view, stream.control, segment_bytes=self.pool.segment_bytes, stream=stream.identity.stream
        )
        return stream

    def lend_all(self) -> None:
        """Keep every open stream supplied."""
        for stream in self.by_slot.values():
            if not stream.is_sealed and stream.writer is None:
                self.lend(stream)
                self._note_losses(stream)

    def lend(self, stream: Stream) -> None:
        """Lend ahead: much to ranks while there is much, one to everybody before two to anybody."""
        lent = stream.control.lent_count
        taken = min(stream.control.taken_count, lent)
        if taken == lent and taken > 0:
            stream.ahead *= 2  # it took faster than we looked
        open_count = sum(not other.is_sealed for other in self.by_slot.values())
        generous = len(self.free) // (8 * max(1, open_count))
        wanted = config.SEGMENTS_LENT if taken or stream.identity.writer_kind == abi.WRITER_RANK else 1
        if stream.identity.writer_kind == abi.WRITER_RANK:
            wanted = max(wanted, generous)
        stream.ahead = min(max(stream.ahead, wanted), abi.LENT_CAPACITY - 1)
        reserve = 0 if stream.identity.writer_kind == abi.WRITER_CLEANER else config.CLEANER_SEGMENTS
        while lent - taken < stream.ahead:
            spare = len(self.free) - reserve
            if spare <= 0 or (lent > taken and spare <= open_count):
                return
            self._lend_one(stream, lent)
            lent += 1

    def calm(self) -> None:
        """Half of what a hasty writer was lent ahead is enough once it is calm again."""
        for stream in self.by_slot.values():
            stream.ahead = max(1, stream.ahead // 2)

    def scan_all(self) -> int:
        """Read what every stream has committed since; the number of records."""
        return sum(self.scan(stream) for stream in list(self.by_slot.values()) if stream.is_read)

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
        # The count is stored without order, so for a moment it may run ahead of the record it counts.
        now = time.monotonic()
        stream.late_since = stream.late_since or now
        if now - stream.late_since > config.HINT_SETTLE_S:
            self._mark_corrupt(stream)
        return count

    def seal(self, stream: Stream) -> int:
        """The last record that will ever be read of this stream is fixed now; the number of records."""
        if stream.is_sealed:
            return stream.control.sealed_count()
        if stream.end is not End.CORRUPT:
            stream.end = self._read_to_end(stream)
        self._finish(stream, stream.reader.sequence)
        return stream.reader.sequence

    def release(self, stream: Stream) -> None:
        """The writer is dead for certain: its segments may serve others once nothing in them is wanted."""
        self.seal(stream)
        if not stream.is_released:
            stream.is_released = True
            stream.control.retract()
        self._free_if_empty(stream)

    def of_replica(self, replica: int) -> list[Stream]:
        """The streams that a replica opened."""
        return [s for s in self.by_slot.values() if s.identity.replica == replica]

    # --- room

    def pin(self, cut: Cut) -> None:
        """A restore is about to read these places."""
        until = time.monotonic() + config.CUT_PIN_S
        for pieces in cut.pieces.values():
            for piece in pieces:
                self._pinned[piece.pool_offset // self.pool.segment_bytes] = until

    def cleanable(self) -> list[tuple[int, int, Stream]]:
        """Segments that may be emptied: live bytes, segment, stream; the emptiest first."""
        now = time.monotonic()
        self._pinned = {segment: until for segment, until in self._pinned.items() if until > now}
        found = []
        for stream in self.by_slot.values():
            if stream.is_sealed and not stream.is_released:
                continue
            for ordinal, segment in stream.segments.items():
                is_passed = ordinal < stream.reader.ordinal or stream.is_sealed
                if is_passed and segment not in self._pinned:
                    found.append((self.index.ledger.live_bytes(segment), segment, stream))
        return sorted(found, key=lambda entry: entry[:2])

    @property
    def slots_free(self) -> int:
        """Slots that writers may still get."""
        return abi.STREAM_CAPACITY - config.CLEANER_SLOTS - len(self.by_slot) - len(self._blocked)

    def give_back_empty(self) -> int:
        """Take back every segment in which nothing is wanted; how many."""
        count = 0
        for live, segment, stream in self.cleanable():
            if live:
                break
            self.give_back(stream, segment)
            count += 1
        return count

    def give_back(self, stream: Stream, segment: int) -> None:
        """Nothing in this segment is wanted: it is free."""
        assert self.index.ledger.live_bytes(segment) == 0, f"segment {segment} has live records"
        ordinal = next(o for o, s in stream.segments.items() if s == segment)
        del stream.segments[ordinal]
        stream.reader.lent.pop(ordinal, None)
        self.pool.mark_free(segment)
        self.free.append(segment)
        self.index.forget_segment(segment)
        self._free_if_empty(stream)

    def supply_own(self, stream: Stream) -> bool:
        """See that the cleaner's stream has a segment ahead; False when none is left."""
        control = stream.control
        if control.lent_count == control.taken_count:
            if not self.free:
                return False
            self._lend_one(stream, control.lent_count)
        return True

    def read_own(self, stream: Stream) -> None:
        """Follow our own writer, so that passed segments count as passed; the index knows already."""
        while stream.reader.read(config.SCAN_RECORDS_MAX):
            pass

    # --- helpers

    def _read(self, stream: Stream, limit: int) -> int:
        records = stream.reader.read(limit)
        for record in records:
            self.index.ingest(record, stream.source, self.pool.view)
        return len(records)

    def _read_to_end(self, stream: Stream) -> End:
        """Read what was committed when we began, however much it is, and say what stopped us."""
        reader = stream.reader
        hint = stream.control.committed_count  # loaded once: a zombie that goes on cannot hold us here
        while reader.sequence < hint and self._read(stream, config.SCAN_RECORDS_MAX):
            pass  # finite, because the hint is, or the pool
        began = moved = time.monotonic()
        while (end := reader.classify(hint, is_final=True)) is End.CORRUPT:
            # Count and search may have run ahead of what was read, so only a place that stays bad is bad.
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

    def _finish(self, stream: Stream, count: int) -> None:
        stream.control.seal(count)
        stream.is_sealed = stream.source.is_final = True

    def _free_if_empty(self, stream: Stream) -> None:
        """The slot of a stream that has nothing left and gets nothing more may serve another."""
        slot = stream.control.slot
        if stream.is_sealed and not stream.segments and self.by_slot.get(slot) is stream:
            stream.control.free()
            del self.by_slot[slot]

    def _lend_one(self, stream: Stream, ordinal: int) -> None:
        if not self.free:
            raise JournalFull("no segment is free")
        lent = Lent(ordinal, self.free.popleft(), secrets.randbits(64) | 1)
        stream.segments[ordinal] = lent.segment
        stream.reader.lend(lent)
        stream.control.lend(lent)

    def _note_losses(self, stream: Stream) -> None:
        dropped = stream.control.dropped_count
        now = time.monotonic()
        if dropped > stream.dropped_seen and now - stream.dropped_told >= config.LOSS_EVENT_S:
            stream.dropped_told = now
            self.index.note(
                {
                    "event": "full",
                    "stream": stream.control.label,
                    "replica": stream.identity.replica,
                    "dropped_records": dropped - stream.dropped_seen,
                    "reason": "no segment was free",
                }
            )
            stream.dropped_seen = dropped

    def _mark_corrupt(self, stream: Stream) -> None:
        stream.end = End.CORRUPT
        self._report_damage(
            f"stream {stream.identity.stream:#x} ({stream.control.label}): record "
            f"{stream.reader.sequence} was committed and cannot be read"
        )

    def _report_damage(self, message: str) -> None:
        self.corrupt_count += 1
        self.index.note({"event": "corruption", "reason": message})
