"""Every stream of a journal as its owner keeps it: opening, sealing, giving back, floor 3.

Owns: which writer has which slot, and when a segment is free again. Promises: a segment is given
back only when nothing in it is wanted, no restore was just told of it, and its writer has moved
past it or is known to be dead; nothing beyond a seal is ever read. Called by the owner's only
thread, by the cleaner, and by desk for requests. It does not know sockets or processes: the owner
tells it which writers are gone. What is lent is lending's to decide, what was read is intake's.
"""

from __future__ import annotations

import time

from concordia import abi, config
from concordia.errors import JournalError
from concordia.journal.checkpoints import superseded_markers
from concordia.journal.control import Identity
from concordia.journal.intake import Intake
from concordia.journal.ledger import Source
from concordia.journal.lending import Demand, Lending
from concordia.journal.pins import Pins
from concordia.journal.record import Record
from concordia.journal.replay import ReplayIndex
from concordia.journal.segment import Board, Pool
from concordia.journal.stream import End, StreamReader
from concordia.journal.stream_state import Stream
from concordia.journal.survey import Survey, source_of
from concordia.journal.writer import StreamWriter


class Streams:
    """All streams, all segments, and the index over them."""

    def __init__(self, pool: Pool, board: Board) -> None:
        self.pool = pool
        self.board = board
        self.index = ReplayIndex(pool.segment_bytes)
        self.lending = Lending(pool.segment_count, pool.find_nodes())
        self.intake = Intake(self.index, pool.view)
        self.by_slot: dict[int, Stream] = {}
        self.free = self.lending.free
        self._blocked: set[int] = set()  # slots that were found damaged
        self.pins = Pins(self.index.cuts, pool.segment_bytes)
        self._next = board.take() << 32  # stream ids of this owner; the epoch makes them unique

    def adopt(self, found: Survey) -> None:
        """Go on with what an owner before us left: seals stay, open streams stay open."""
        self.free.extend(found.free)
        self._blocked = found.blocked_slots
        for message in found.damage:
            self.intake.report_damage(message)
        arrivals: list[tuple[int, Record, Source]] = []
        for old in found.streams:
            stream = Stream(old.control, old.identity, old.reader, old.source)
            self.by_slot[old.control.slot] = stream
            for message in old.damage:
                self.intake.report_damage(message)
            stream.end = End.CORRUPT if old.end is End.CORRUPT else End.OPEN
            stream.dropped_seen = old.control.dropped_count
            if old.sealed_count != abi.NOT_SEALED:
                stream.is_sealed = stream.source.is_final = True
                old.control.seal(old.sealed_count)  # an owner that died half-way through a seal
            stamp = 0
            is_copy = old.identity.writer_kind == abi.WRITER_CLEANER
            # copies carry their originals' stamps: they sort beside them
            for record in old.records:
                stamp = record.stamp_ns if is_copy else max(stamp, record.stamp_ns)
                arrivals.append((stamp, record, old.source))
            if is_copy:  # its writer was the owner before us
                if not stream.is_sealed:
                    self._finish(stream, old.reader.sequence)
                self.release(stream)
        old_markers = superseded_markers((record, source) for _, record, source in arrivals)
        for _, record, source in sorted(arrivals, key=lambda arrival: arrival[0]):
            is_old = record.offset in old_markers
            self.index.ingest(record, source, self.pool.view, is_old=is_old)

    # --- writers

    def open(self, identity: Identity, label: str, *, node: int | None = None) -> Stream:
        """Give a slot to a new writer, which is near to this memory node; raises JournalError when
        all are taken.
        """
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
        stream = Stream(
            control, identity, StreamReader(self.pool, identity.stream), source_of(identity)
        )
        stream.node = node
        self.by_slot[slot] = stream
        self.lend(stream)
        return stream

    def open_own(self, *, rank: int, world: int, layout_hash: int) -> Stream:
        """A stream of this process, for the cleaner."""
        identity = Identity(
            0, abi.WRITER_CLEANER, rank, world, self.board.owner_pid, 0, 0, layout_hash
        )
        stream = self.open(identity, "cleaner")
        stream.source.is_final = stream.is_released = True
        stream.writer = StreamWriter(
            self.pool.view,
            stream.control,
            segment_bytes=self.pool.segment_bytes,
            stream=stream.identity.stream,
        )
        return stream

    def lend_all(self) -> None:
        """Keep every open stream supplied."""
        writers = self.writers()
        demand = Demand.of(writers, time.monotonic())
        for stream in writers:
            self.lending.supply(stream, demand)
            self._note_losses(stream)

    def lend(self, stream: Stream) -> None:
        """Keep one stream supplied."""
        self.lending.supply(stream, Demand.of(self.writers(), time.monotonic()))

    def writers(self) -> list[Stream]:
        """The open streams of other processes."""
        return [s for s in self.by_slot.values() if not s.is_sealed and s.writer is None]

    def calm(self) -> None:
        """Half of what a hasty writer was lent ahead is enough once it is calm again."""
        for stream in self.by_slot.values():
            stream.ahead = max(1, stream.ahead // 2)

    def scan_all(self) -> int:
        """Read what every stream has committed since; the number of records."""
        return sum(
            self.intake.scan(stream) for stream in list(self.by_slot.values()) if stream.is_read
        )

    def seal(self, stream: Stream) -> int:
        """The last record that will ever be read of this stream is fixed now; the number of
        records.
        """
        if stream.is_sealed:
            return stream.control.sealed_count()
        if stream.end is not End.CORRUPT:
            stream.end = self.intake.read_to_end(stream)
        self._finish(stream, stream.reader.sequence)
        return stream.reader.sequence

    def release(self, stream: Stream) -> None:
        """The writer is dead for certain: its segments may serve others once nothing in them is
        wanted.
        """
        self.seal(stream)
        if not stream.is_released:
            stream.is_released = True
            stream.control.retract()
        self._free_if_empty(stream)

    def of_replica(self, replica: int) -> list[Stream]:
        """The streams that a replica opened."""
        return [s for s in self.by_slot.values() if s.identity.replica == replica]

    # --- room

    def cleanable(self) -> list[tuple[int, int, Stream]]:
        """Segments that may be emptied: live bytes, segment, stream; the emptiest first."""
        pinned = self.pins.segments()
        found = []
        for stream in self.by_slot.values():
            if stream.is_sealed and not stream.is_released:
                continue
            for ordinal, segment in stream.segments.items():
                is_passed = ordinal < stream.reader.ordinal or stream.is_sealed
                if is_passed and segment not in pinned:
                    found.append((self.index.ledger.live_bytes(segment), segment, stream))
        return sorted(found, key=lambda entry: entry[:2])

    def is_short(self) -> bool:
        """Whether some writer has little left of what it was lent."""
        return any(
            stream.control.lent_count - stream.taken_seen < min(stream.ahead, config.SEGMENTS_LENT)
            for stream in self.writers()
        )

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
        self.index.table.forget_segment(segment)
        self._free_if_empty(stream)

    # --- helpers

    def _finish(self, stream: Stream, count: int) -> None:
        stream.control.seal(count)
        stream.is_sealed = stream.source.is_final = True

    def _free_if_empty(self, stream: Stream) -> None:
        """The slot of a stream that has nothing left and gets nothing more may serve another."""
        slot = stream.control.slot
        if stream.is_sealed and not stream.segments and self.by_slot.get(slot) is stream:
            stream.control.free()
            del self.by_slot[slot]

    def _note_losses(self, stream: Stream) -> None:
        dropped = stream.control.dropped_count
        now = time.monotonic()
        if dropped > stream.dropped_seen and now - stream.dropped_told >= config.LOSS_EVENT_S:
            stream.dropped_told = now
            self.index.events.note(
                {
                    "event": "full",
                    "stream": stream.control.label,
                    "replica": stream.identity.replica,
                    "dropped_records": dropped - stream.dropped_seen,
                    "reason": "no segment was free",
                }
            )
            stream.dropped_seen = dropped
