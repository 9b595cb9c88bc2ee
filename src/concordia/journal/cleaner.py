"""Make room: empty segments that hold little, let go of what is wanted least, floor 3.

Owns: the order in which things go. Promises: a live record is copied, committed and entered in the
index before its old place is given up; first unreferenced blocks go, whole segments of them,
longest unused first; then older lives of requests that were started again; a request that still
runs loses protection only when writers are about to find nothing, and by name. What writers took
at worst within a minute is kept free while only a cache is lost by it. It copies with the Python
writer in the owner's own process, so the owner needs no compiler: the only reader of a copy before
a restart is this process, and writer.py says why plain stores are then enough. Called by the owner,
a bounded step at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from concordia import abi, config
from concordia.errors import JournalError
from concordia.journal.ledger import Held
from concordia.journal.pace import Pace, Peak
from concordia.journal.stream import has_sound_payload
from concordia.journal.stream_state import Stream
from concordia.journal.streams import Streams
from concordia.journal.writer import Entry

# kinds for which rank and layout matter
_PLACED = (
    abi.KIND_KV_TAIL, abi.KIND_KV_BLOCK, abi.KIND_PAGE, abi.KIND_STATE, abi.KIND_CHECKPOINT,
)  # fmt: skip


class Cleaner:
    """Frees segments when few are left."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._pace, self._long_pace = Pace(config.PACE_S), Pace(config.RESERVE_S)
        self._reserve = Peak()
        self._own: dict[tuple[int, int, int], Stream] = {}
        # segments with a damaged payload: left as they are, and reported
        self._unsound: dict[int, Held] = {}
        self.copied_bytes = 0
        self.copied_count = 0
        self.evicted_blocks = 0
        self.unprotected_requests = 0
        self.refused_count = 0  # streams of ours that no slot was left for

    @property
    def low(self) -> int:
        """Free segments below which cleaning begins."""
        tenth = self._streams.pool.segment_count // 10
        return max(config.CLEANER_SEGMENTS + 2, tenth)

    def is_unsound(self, segment: int) -> bool:
        """Whether a record that is wanted in this segment was found damaged."""
        return segment in self._unsound and self._unsound[segment].uses > 0

    def step(self) -> None:
        """One bounded piece of work, if there is any to do."""
        streams, now = self._streams, time.monotonic()
        if streams.slots_free < abi.STREAM_CAPACITY // 4:
            self._empty_stream()
        taken = streams.lending.taken_count
        hurried = self._pace.note(taken, now)
        most = streams.pool.segment_count // config.RESERVE_SHARE
        reserve = min(self._reserve.note(self._long_pace.note(taken, now), now), most)
        short = sum(stream.short for stream in streams.writers())
        wanted = max(self.low, min(max(hurried, self.low + short), most))
        if len(streams.free) >= max(wanted, reserve):
            return
        streams.index.successions.drop_superseded()
        is_needed = short > 0 and len(streams.free) < wanted  # else lending has them for it
        is_urgent = is_needed or len(streams.free) <= max(config.CLEANER_SEGMENTS, hurried)
        if streams.give_back_empty() and not is_urgent:
            return
        if is_urgent:
            self._hurry(wanted)
        elif len(streams.free) < self.low and self._empty_one(streams.pool.segment_bytes // 2):
            return
        else:
            self._drop_blocks(max(wanted, reserve), is_urgent=False)

    def _hurry(self, wanted: int) -> None:
        """Make room now: what nobody wants first, what somebody wants last."""
        streams, size = self._streams, self._streams.pool.segment_bytes
        # requests that have ended need not wait for their last keys now
        streams.index.settle(time.monotonic() + config.FINISH_GRACE_S)
        before = len(streams.free)
        self._drop_blocks(wanted, is_urgent=True)
        if len(streams.free) > before or self._empty_one(size // 2):
            return
        if not streams.cleanable():
            return  # without a segment that can be emptied, nothing let go would come back
        reason = "the journal is full"
        is_short = any(stream.short for stream in streams.writers()) or streams.is_short()
        if is_short and streams.index.give_up_superseded(reason):
            return
        if self._empty_one(size * 7 // 8):
            return
        if len(streams.free) <= config.CLEANER_SEGMENTS and streams.is_short():
            self.unprotected_requests += streams.index.drop_coldest(reason) is not None

    def write_finish(self, key: int) -> bool:
        """Make the end of a request known to an owner after us; False when there is no room for
        it.
        """
        streams = self._streams
        own = self._any_own()
        if own is None or own.writer is None or not streams.lending.supply_own(own):
            return False
        made = own.writer.append(Entry(abi.KIND_FINISH, key), b"")
        streams.intake.read_own(own)
        streams.index.ingest(made, own.source, streams.pool.view)
        return True

    def _empty_one(self, live_bytes_max: int) -> bool:
        """Copy what lives in the emptiest segment elsewhere; False when none is empty enough."""
        streams = self._streams
        for live, segment, stream in streams.cleanable():
            if live > live_bytes_max:
                return False
            if self.is_unsound(segment):
                continue
            if self._empty(stream, segment):
                return True
            if not streams.free:
                return False
        return False

    def _empty_stream(self) -> bool:
        """Empty one segment of the ended stream that holds least: its last one frees the slot."""
        streams = self._streams
        found: dict[Stream, list[tuple[int, int]]] = {}
        for live, segment, stream in streams.cleanable():
            if stream.is_released and stream.is_sealed and not self.is_unsound(segment):
                found.setdefault(stream, []).append((live, segment))
        whole = [stream for stream, held in found.items() if len(held) == len(stream.segments)]
        if not whole:
            return False  # every one is being restored from, or damaged
        stream = min(whole, key=lambda ended: sum(live for live, _ in found[ended]))
        return self._empty(stream, found[stream][0][1])

    def _empty(self, stream: Stream, segment: int) -> bool:
        """Copy what lives in the segment elsewhere and give it back."""
        if not all(self._copy(held) for held in self._streams.index.ledger.live(segment)):
            return False
        self._streams.give_back(stream, segment)
        return True

    def _copy(self, held: Held) -> bool:
        """Append the record to our stream and let its users follow; False when it cannot be
        done.
        """
        streams = self._streams
        view = streams.pool.view
        old = held.record
        if not has_sound_payload(view, old):
            self._unsound = {segment: one for segment, one in self._unsound.items() if one.uses}
            self._unsound[old.offset // streams.pool.segment_bytes] = held
            streams.intake.report_damage(
                f"payload of record {old.sequence} of stream {held.source.stream:#x} is damaged"
            )
            return False
        own = self._stream_for(held)
        if own is None or own.writer is None or not streams.lending.supply_own(own):
            return False
        entry = Entry(
            old.kind, old.key, old.incarnation, old.token_start, old.token_end, old.step,
            old.region, old.flags, old.layout_hash, old.handler_hash, old.stamp_ns, held.replica,
            old.model_hash,
        )  # fmt: skip
        payload = view[old.payload_offset : old.payload_offset + old.payload_bytes]
        made = own.writer.append(entry, payload, payload_hash=old.payload_hash)
        streams.intake.read_own(own)
        streams.index.moved(held, made, own.source)
        self.copied_bytes += old.payload_bytes
        self.copied_count += 1
        return True

    def _stream_for(self, held: Held) -> Stream | None:
        """Our stream of the same rank, world and layout, because readers take these from the
        stream.
        """
        source = held.source
        name = source.rank, source.world, source.layout_hash
        if held.record.kind not in _PLACED and self._own:
            return self._any_own()
        if name not in self._own:
            rank, world, layout = name
            self._open_own(rank=rank, world=world, layout_hash=layout)
        return self._own.get(name)

    def _any_own(self) -> Stream | None:
        if not self._own:
            self._open_own(rank=0, world=1, layout_hash=0)
        return next(iter(self._own.values()), None)

    def _open_own(self, *, rank: int, world: int, layout_hash: int) -> None:
        """One more stream of ours, if there is a segment and a slot for it."""
        if not self._streams.free:
            return
        try:
            opened = self._streams.open_own(rank=rank, world=world, layout_hash=layout_hash)
        except JournalError as error:  # no slot: what cannot be copied stays where it is
            self.refused_count += 1
            if self.refused_count == 1:
                self._streams.index.events.note(
                    {"event": "full", "stream": "cleaner", "reason": str(error)}
                )
            return
        self._own[rank, world, layout_hash] = opened

    def _idle_segments(self) -> Iterator[list[Held]]:
        """Segments that hold nothing but unreferenced blocks, as these; the one that was of use
        longest ago first, by the block in front; last those that hold one of late use, too.
        """
        streams, keys = self._streams, self._streams.index.keys
        ledger = streams.index.ledger
        found = []
        for live, segment, _ in streams.cleanable():
            use = keys.last_use(ledger.first(segment)) if live else None
            if use is not None:
                found.append((use, segment))
        late, limit = [], keys.middle_use()
        for _, segment in sorted(found):
            blocks = ledger.live(segment)
            uses = [use for block in blocks if (use := keys.last_use(block)) is not None]
            if len(uses) < len(blocks) or self.is_unsound(segment):
                continue
            if max(uses) > limit:
                late.append(blocks)
            else:
                yield blocks
        yield from late

    def _drop_blocks(self, wanted_free: int, *, is_urgent: bool) -> None:
        """Name unreferenced blocks until so many segments will be free, drop those named before.
        Whole segments of them first, since what goes from the others has to be copied around.
        """
        now, streams = time.monotonic(), self._streams
        keys = streams.index.keys
        missing = (wanted_free - len(streams.free)) * streams.pool.segment_bytes
        wanted = missing - keys.condemned_bytes
        # Not looked for while enough waits for the end of its grace: it is a look at every segment.
        for blocks in self._idle_segments() if wanted > 0 and keys.has_idle else ():
            wanted -= sum(keys.condemn(block, now) for block in blocks)
            if wanted <= 0:
                break
        while wanted > 0 and (size := keys.condemn_oldest(now)):
            wanted -= size
        dropped = keys.drop_condemned(now, is_urgent=is_urgent, bytes_max=missing)
        self.evicted_blocks += dropped
        if dropped:
            streams.give_back_empty()
