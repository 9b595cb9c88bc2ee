"""Which segments are free, and how many each writer has ahead of it, floor 3.

Owns: the free segments of a pool. Promises: a segment is lent only when it is free, and with a salt
of its own; one is lent to everybody before two to anybody, and the last CLEANER_SEGMENTS to the
cleaner alone; nobody is waited for: who finds none counts a loss. Called by streams. It does not
know what lies in a segment, nor when one is free again.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from concordia import abi, config
from concordia.errors import JournalFull
from concordia.journal.control import Control, Lent
from concordia.journal.pace import Peak
from concordia.journal.stream_state import Stream

KEPT_MOST: Final = 8  # a dozen of standbys must not keep more from the engine that runs


class Demand(NamedTuple):
    """Who may want segments: replicas with a large step before them, ranks that take many; and how
    many stay for those who have none, or soon may.
    """

    now: float
    beginning: frozenset[int]
    rank_count: int
    kept_count: int

    @staticmethod
    def of(streams: Sequence[Stream], now: float) -> Demand:
        """What the open streams say."""
        beginning = frozenset(
            stream.identity.replica for stream in streams if _is_large_step_begun(stream.control)
        )
        ranks = [
            stream
            for stream in streams
            if stream.identity.writer_kind == abi.WRITER_RANK
            and (stream.is_hasty or stream.identity.replica in beginning)
        ]
        poor = [s for s in streams if s.control.lent_count <= s.control.taken_count]
        return Demand(now, beginning, len(ranks), max(len(poor), min(len(streams), KEPT_MOST)))


def _is_large_step_begun(control: Control) -> bool:
    """Whether more was announced than the few tokens that a standby tries itself out with."""
    is_begun = control.word("step_started") > control.word("step_done")
    return is_begun and control.word("step_tokens") >= config.BURST_STEP_TOKENS


class Lending:
    """The free segments."""

    def __init__(self, segment_count: int, nodes: Sequence[int] = ()) -> None:
        self._nodes = nodes  # of each segment; empty where that makes no difference
        # at most: a writer that takes most of a small journal at once must not empty it
        self._burst_most = min(segment_count // config.RESERVE_SHARE, abi.LENT_CAPACITY - 1)
        self.free: deque[int] = deque()
        self.taken_count = 0  # ever, by writers
        self._bursts = Peak()  # what one rank took within PACE_S

    def supply(self, stream: Stream, demand: Demand) -> None:
        """Lend ahead: much to ranks that work while there is much, one to every open stream before
        two to anybody, and to each rank that works its share of what there is.

        An engine appends what a step computed at the step's end: a prefill of 8K tokens of an 8B
        model is 1 GiB in 25 ms, and nothing for 200 ms. So a rank is lent ahead what a rank took at
        once in the last minute, if it is one that takes much, or about to be: a step is announced
        before it is computed. What a standby were lent would be missing where requests run.
        """
        lent = stream.control.lent_count
        taken = min(stream.control.taken_count, lent)
        self.taken_count += taken - stream.taken_seen
        stream.taken_seen = taken
        is_rank = stream.identity.writer_kind == abi.WRITER_RANK
        if taken == lent and taken > 0:
            stream.ahead *= 2  # it took faster than we looked
        own = 0
        wanted = config.SEGMENTS_LENT if is_rank else 1
        if is_rank:
            lately = stream.pace.note(taken, demand.now)
            own = min(stream.bursts.note(lately, demand.now), self._burst_most)
            burst = min(self._bursts.note(lately, demand.now), self._burst_most)
            stream.is_hasty = own > 1
            if stream.is_hasty or stream.identity.replica in demand.beginning:
                ranks = max(1, demand.rank_count)
                generous = min(len(self.free) // (2 * ranks), self._burst_most)
                share = (len(self.free) + lent - taken) // ranks
                wanted = max(wanted, generous, min(burst, share))
        stream.ahead = min(max(stream.ahead, wanted), abi.LENT_CAPACITY - 1)
        reserve = (
            0 if stream.identity.writer_kind == abi.WRITER_CLEANER else config.CLEANER_SEGMENTS
        )
        while lent - taken < stream.ahead:
            spare = len(self.free) - reserve
            if spare <= 0 or (lent > taken and spare <= demand.kept_count):
                break
            self.lend(stream, lent)
            lent += 1
        stream.short = max(0, own - (lent - taken))

    def supply_own(self, stream: Stream) -> bool:
        """See that the cleaner's stream has a segment ahead; False when none is left."""
        control = stream.control
        if control.lent_count == control.taken_count:
            if not self.free:
                return False
            self.lend(stream, control.lent_count)
        return True

    def lend(self, stream: Stream, ordinal: int) -> None:
        """One more; raises JournalFull."""
        if not self.free:
            raise JournalFull("no segment is free")
        lent = Lent(ordinal, self._take_near(stream.node), secrets.randbits(64) | 1)
        stream.segments[ordinal] = lent.segment
        stream.reader.lend(lent)
        stream.control.lend(lent)

    def _take_near(self, node: int | None) -> int:
        """The free segment that was free longest, of those on this node if there is one."""
        if node is not None and self._nodes:
            near = next((s for s in self.free if self._nodes[s] == node), None)
            if near is not None:
                self.free.remove(near)
                return near
        return self.free.popleft()
