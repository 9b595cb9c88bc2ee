"""What happens to flights when something of their replica fails.

Owns: the failovers that run, and the suspicion that may become one. Promises: a fault is acted on
once; all flights of the failed replica move together; a flight that was cut off alone is reported
and, when no fault is found, submitted again alone, a bounded number of times; the replica set is
called on threads of our own, never on the event loop. Used by the router alone. Does not detect,
kill or start anything.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from concordia import config
from concordia.errors import RequestRefused
from concordia.recovery.fault import Fault, FaultKind
from concordia.serving.admission import Admission, unavailable
from concordia.serving.cohort import Cohort
from concordia.serving.flight import Flight, ReplicaLike
from concordia.serving.flight_table import FlightTable
from concordia.serving.metrics import Metrics
from concordia.serving.recovery_times import RecoveryTimes, in_words
from concordia.serving.settlement import Settlement
from concordia.serving.submission import CohortTicket

log = logging.getLogger(__name__)


class ReplicaSet(Protocol):
    """What we need of the replica set. `fail_over` and `report_fault` may block."""

    @property
    def active(self) -> Sequence[Any]: ...
    def subscribe(self, callback: Callable[[Fault], None]) -> None: ...
    def fail_over(self, replica: Any, fault: Fault) -> Any: ...
    def failover_times(self, failed: Any) -> Mapping[str, float]: ...
    def report_fault(self, replica: Any, kind: FaultKind, detail: str) -> None: ...


class Desk(Protocol):
    """What the fault desk needs of the router."""

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]: ...
    async def submit(
        self, flight: Flight, replica: ReplicaLike, ticket: CohortTicket | None
    ) -> bool: ...
    async def submit_alone(self, flight: Flight) -> None: ...
    @property
    def flights(self) -> FlightTable: ...
    @property
    def settlement(self) -> Settlement: ...


class FaultDesk:
    """Call `start` on the event loop; faults then come from whatever thread the replica set
    uses.
    """

    def __init__(
        self,
        router: Desk,
        replica_set: ReplicaSet,
        admission: Admission,
        metrics: Metrics,
        *,
        recovery_timeout_s: float,
    ) -> None:
        self._router = router
        self._replicas = replica_set
        self._admission = admission
        self._metrics = metrics
        self._recovery_timeout_s = recovery_timeout_s
        self._cohorts: dict[int, tuple[Cohort, asyncio.Task[None]]] = {}  # by who failed
        self._faults: dict[int, Fault] = {}  # by incarnation, which are never used twice
        self._reporting: set[int] = set()
        self._threads = ThreadPoolExecutor(config.REPLICA_CALLS_MAX, "replica-call")

    def start(self) -> None:
        """Listen for faults and watch over deadlines."""
        loop = asyncio.get_running_loop()
        self._replicas.subscribe(lambda fault: _tell(loop, self.on_fault, fault))
        self._router.spawn(self._keep_time())

    def stop(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def running_count(self) -> int:
        """Failovers that run."""
        return len(self._cohorts)

    def is_moving(self, flight: Flight) -> bool:
        """True while the flight's cohort is being submitted: a member that leaves now must still be
        counted.
        """
        return any(
            flight in cohort.members and cohort.replica is not None
            for cohort, _ in self._cohorts.values()
        )

    def on_fault(self, fault: Fault) -> None:
        """All flights of the failed replica become a cohort."""
        self._metrics.fault(fault)
        self._faults[fault.replica] = fault
        members = [f for f in self._router.flights if f.sits_on(fault.replica)]
        failed = members[0].replica if members else self._admission.known(fault.replica)
        if failed is None or fault.replica in self._cohorts:
            self._admission.exclude(fault.replica)
            # a standby, which the replica set replaces by itself, or a second sight of one fault
            return
        for moving, task in self._cohorts.values():
            if moving.replica is not None and moving.replica.incarnation == fault.replica:
                task.cancel()  # it was moving its members to the very replica that has failed now
        if members:
            last = max(flight.last_at for flight in members)
            self._metrics.silence(fault.detected_ns / 1e9 - last)
        for flight in members:
            flight.unseat(str(fault), deadline=self._deadline())
        times = RecoveryTimes(fault.detected_ns, tell=partial(self._tell_times, fault))
        cohort = Cohort(failed, fault, members, times=times)
        self._admission.close(fault.replica)
        self._cohorts[fault.replica] = (cohort, self._router.spawn(self._run_cohort(cohort)))

    def report(self, replica: ReplicaLike, detail: str) -> None:
        """Tell the replica set that something of this replica did not answer as it should."""
        if replica.incarnation in self._reporting:
            return  # a dead engine cuts off all its answers at once; it is looked at once
        log.warning("%s: %s", replica.name, detail)
        self._reporting.add(replica.incarnation)
        self._router.spawn(self._report(replica, detail[:500]))

    def suspect(self, flight: Flight, replica: ReplicaLike, detail: str) -> None:
        """A flight was cut off: the replica set finds out whether its replica failed; if not, it
        tries again alone.
        """
        if flight.replica is not replica or flight.is_left:
            return
        flight.unseat(detail, deadline=self._deadline())
        self.report(replica, detail)
        flight.posting = self._router.spawn(self._retry(flight, detail))

    def set_aside(self, flight: Flight, detail: str) -> None:
        """A flight that may be what kills its engines: it is tried by itself, a while after the
        others went on.
        """
        log.warning(
            "request %s lost %d engines before its next token: it is tried alone later (%s)",
            flight.name,
            flight.attempts,
            detail,
        )
        flight.replica = None
        flight.posting = self._router.spawn(self._try_later(flight))

    async def replace(self, failed: ReplicaLike, fault: Fault) -> ReplicaLike:
        """Have the failed replica fenced and replaced; whoever failed before we heard of it is
        replaced in turn.
        """
        while True:
            found: ReplicaLike = await self._call(self._replicas.fail_over, failed, fault)
            later = self._faults.get(found.incarnation)
            if later is None:
                return found
            failed, fault = found, later

    async def submit(
        self, flight: Flight, replica: ReplicaLike, ticket: CohortTicket | None
    ) -> bool:
        return await self._router.submit(flight, replica, ticket)

    def failover_times(self, failed: ReplicaLike) -> Mapping[str, float]:
        return self._replicas.failover_times(failed)

    async def count_uncommitted(self, flights: Sequence[Flight]) -> None:
        await self._router.settlement.count_uncommitted(flights)

    def count_again(self, tokens: int) -> None:
        self._metrics.count("stepped_back_tokens", tokens)

    def _tell_times(self, fault: Fault, phases: Mapping[str, float], count: int) -> None:
        log.info("%s: %d answers went on: %s", fault, count, in_words(phases))
        self._metrics.recovery(fault, phases, count)

    async def _run_cohort(self, cohort: Cohort) -> None:
        replica: ReplicaLike | None = None
        try:
            replica = await cohort.run(self)
            self._metrics.count("failovers")
        finally:
            del self._cohorts[cohort.failed.incarnation]
            self._admission.open(replica)

    async def _retry(self, flight: Flight, detail: str) -> None:
        """Give the replica set a moment to find a fault, which takes the flight over; else submit
        it again.
        """
        await asyncio.sleep(config.SUSPECT_WAIT_S)
        if flight.attempts >= config.ATTEMPTS_MAX:
            flight.fail(RequestRefused(detail, status=500, kind="InternalServerError"))
            return
        await self._submit_again(flight)

    async def _try_later(self, flight: Flight) -> None:
        """Its deadline goes on meanwhile and ends it, if this does not."""
        await asyncio.sleep(config.SET_ASIDE_S)
        await self._submit_again(flight)

    async def _submit_again(self, flight: Flight) -> None:
        flight.failovers += 1
        await self._router.submit_alone(flight)

    async def _report(self, replica: ReplicaLike, detail: str) -> None:
        try:
            await self._call(self._replicas.report_fault, replica, FaultKind.ENGINE_ERROR, detail)
        finally:
            self._reporting.discard(replica.incarnation)

    async def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, method, *arguments)

    def _deadline(self) -> float:
        return time.monotonic() + self._recovery_timeout_s

    async def _keep_time(self) -> None:
        """End flights that nothing came back for within the recovery timeout; tell the replicas
        what they owe.
        """
        while True:
            await asyncio.sleep(config.DEADLINE_POLL_S)
            for replica in self._replicas.active:
                replica.requests_in_flight = self._router.flights.owed_by(replica)
            now = time.monotonic()
            for flight in self._router.flights:
                if flight.deadline is not None and now >= flight.deadline:
                    flight.deadline = None
                    flight.fail(
                        unavailable(
                            "the engine failed and no other went on within the recovery timeout"
                        )
                    )


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[[Fault], None], fault: Fault) -> None:
    """Hand a fault to the event loop; one that comes while the server ends is of no use to
    anybody.
    """
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback, fault)
