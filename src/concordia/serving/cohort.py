"""The requests of one failed replica, and their way to the next.

Owns: one failover, from the fault to the last member's submission. Promises: members are submitted
in the order in which they first came, one after the other, all naming the same cohort and size; a
member that leaves before is not counted, one that leaves between is submitted all the same and let
go once the cohort runs, so that nobody waits for it; one that lost ATTEMPTS_MAX engines before a
token came is set aside, for it may be what kills them; the new replica takes no other work before.
Made by the router for each fault. Does not decide that there was a fault and does not kill: the
replica set does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from concordia import config
from concordia.errors import ConcordiaError
from concordia.recovery.fault import Fault
from concordia.serving.flight import Flight, ReplicaLike
from concordia.serving.recovery_times import RecoveryTimes
from concordia.serving.submission import CohortTicket

log = logging.getLogger(__name__)


class Submitter(Protocol):
    """What a failover needs of the router."""

    async def replace(self, failed: ReplicaLike, fault: Fault) -> ReplicaLike: ...
    async def submit(
        self, flight: Flight, replica: ReplicaLike, ticket: CohortTicket | None
    ) -> bool: ...
    def failover_times(self, failed: ReplicaLike) -> Mapping[str, float]: ...
    async def count_uncommitted(self, flights: Sequence[Flight]) -> None: ...
    def count_again(self, tokens: int) -> None: ...
    def set_aside(self, flight: Flight, detail: str) -> None: ...
    def suspect(self, flight: Flight, replica: ReplicaLike, detail: str) -> None: ...


class Cohort:
    """One failover; `run` ends when every member sits on the new replica or has failed."""

    def __init__(
        self,
        failed: ReplicaLike,
        fault: Fault,
        members: Sequence[Flight],
        *,
        times: RecoveryTimes,
    ) -> None:
        self.times = times
        self.failed = failed
        self.fault = fault
        self.members = sorted(members, key=lambda flight: flight.order)
        self.replica: ReplicaLike | None = None  # known once there is one
        self.name = f"{failed.incarnation:x}-{fault.detected_ns:x}"

    @property
    def living(self) -> list[Flight]:
        return [flight for flight in self.members if not (flight.is_left or flight.is_done)]

    @property
    def movable(self) -> list[Flight]:
        """Those that another engine is given to; a request that kills each of them must not have
        them all.
        """
        return [flight for flight in self.living if flight.attempts < config.ATTEMPTS_MAX]

    async def run(self, router: Submitter) -> ReplicaLike:
        """Find a replica and move everybody there; returns the replica. Ends with CancelledError
        when that one fails too.
        """
        started = time.monotonic()
        self.replica = await self._find(router)
        self.times.note(router.failover_times(self.failed))
        self.times.mark("known")
        members = self.movable
        for flight in self.living:
            if flight not in members:
                router.set_aside(flight, str(self.fault))
        for flight in members:
            flight.replica = self.replica
            flight.failovers += 1
        await router.count_uncommitted(members)
        self.times.mark("counted")
        # Counting took a moment, and the size that members name must be that of those who come.
        members = self.movable
        forming = [flight for flight in members if _is_forming(flight, members)]
        for flight in members:
            flight.expect_by(None if flight in forming else self.times)
        router.count_again(_align(members))
        ticket = CohortTicket(self.name, len(members) - len(forming), config.RESTORE_WAIT_S)
        for index, flight in enumerate(members):
            wished = flight.wished_ticket if flight in forming else ticket
            if not await router.submit(flight, self.replica, wished):
                for other in members[index + 1 :]:
                    router.suspect(other, self.replica, "its cohort could not be submitted")
                break
        self.times.mark("moved")
        log.info(
            "%s: %d requests moved to %s in %.3f s",
            self.fault,
            len(members),
            self.replica.name,
            time.monotonic() - started,
        )
        await self._let_go(members)
        return self.replica

    async def _find(self, router: Submitter) -> ReplicaLike:
        """Ask for a replacement until there is one: members have deadlines of their own, so this
        loop needs none.
        """
        while True:
            try:
                return await router.replace(self.failed, self.fault)
            except ConcordiaError as error:
                log.error("no replacement for %s yet: %s", self.failed.name, error)
                await asyncio.sleep(config.REPLACE_RETRY_S)

    async def _let_go(self, members: Sequence[Flight]) -> None:
        """Close the streams of members that left while the cohort was submitted, once the cohort
        runs.
        """
        if not any(flight.is_left for flight in members):
            return
        bound = time.monotonic() + config.RESTORE_WAIT_S
        while time.monotonic() < bound and any(f.attempts > 0 for f in self.living):
            await asyncio.sleep(config.REPLACE_POLL_S)
        for flight in members:
            if flight.is_left and flight.stream is not None:
                flight.stream.close()


def _is_forming(flight: Flight, members: Sequence[Flight]) -> bool:
    """Whether others of its client's own cohort are still to come: it cannot have begun, and waits
    for them on the new replica.
    """
    wish = flight.request.cohort
    if wish is None:
        return False
    same = [other for other in members if flight.shares_cohort(other)]
    return len(same) < wish.size and not any(other.ids for other in same)


def _align(members: Sequence[Flight]) -> int:
    """Let the members of each client's cohort go on after the same number of tokens; returns how
    many tokens come again.

    They took every step together. Where the engine died while it handed out a step's tokens, some
    clients have theirs and some do not; going on from there would leave the members a step apart,
    and the batches of an unfailed run, which decide how sums are rounded, never form again.
    """
    again = 0
    named = [flight for flight in members if flight.request.cohort is not None]
    while named:
        same = [other for other in named if named[0].shares_cohort(other)]
        named = [flight for flight in named if flight not in same]
        counts = [len(flight.ids) for flight in same]
        is_torn = 0 < max(counts) - min(counts) <= config.TORN_STEP_TOKENS_MAX
        is_aligned = is_torn and all(flight.can_step_back for flight in same)
        for flight, count in zip(same, counts, strict=True):
            common = min(counts) if is_aligned else count
            again += count - common
            flight.step_back(common)
    return again
