"""All engines of one server: so many that serve, so many that wait, floor 6.

Owns: what happens when an engine fails, and who takes its place. Promises: a failed engine is
sealed and struck before another takes its place; a place is filled by a loaded standby, else by the
next engine that is ready; a fault is told once. Called by the service and the router, from any
thread; its methods may block. It does not detect faults (the watch does), start engines (the
keeper), or end them (the fencer), and does not know requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from concordia import config
from concordia.errors import ConcordiaError, ReplicaError
from concordia.recovery.fault import Fault, FaultKind
from concordia.serving.crew import Crew
from concordia.serving.engine_spec import EngineSpec
from concordia.serving.failover import Failover
from concordia.serving.fencer import Fencer, Seals
from concordia.serving.replica import Replica, State
from concordia.serving.replica_keeper import ReplicaKeeper
from concordia.serving.resources import Share
from concordia.serving.roster import Roster
from concordia.serving.watch import Watch

log = logging.getLogger(__name__)


class ReplicaSet:
    """One engine per share, of which `replicas` serve. Call `start`, then `stop` in any case."""

    def __init__(
        self, spec: EngineSpec, shares: Sequence[Share], *, replicas: int, journal: Seals | None
    ) -> None:
        self.spec = spec
        self.failovers: list[Failover] = []
        self._callbacks: list[Callable[[Fault], None]] = []
        self._roster = Roster(shares, replicas=replicas)
        self._crew = Crew()
        self._watch = Watch(self._on_fault, spec.journal)
        self._fencer = Fencer(self._roster, self._watch, journal)
        self._keeper = ReplicaKeeper(
            spec,
            self._roster,
            watch=self._watch,
            fencer=self._fencer,
            crew=self._crew,
            tell=self._tell,
        )

    @property
    def active(self) -> list[Replica]:
        """Replicas that serve."""
        return self._roster.active

    @property
    def standbys(self) -> list[Replica]:
        """Replicas that are loaded and wait."""
        return self._roster.standbys

    @property
    def replicas(self) -> list[Replica]:
        """All that are not confirmed dead."""
        return self._roster.living

    def subscribe(self, callback: Callable[[Fault], None]) -> None:
        """Be told of every fault, on a thread of ours; the callback must not block."""
        self._callbacks.append(callback)

    def start(self, *, timeout_s: float = config.START_S) -> None:
        """Start everything; returns when as many serve as shall. Raises what the first failed start
        says.
        """
        self._keeper.start()
        deadline = time.monotonic() + timeout_s
        with self._roster.changed:
            while not self._roster.is_served:
                if self._roster.is_closed:
                    raise ReplicaError("stopped while it started")
                if self._keeper.last_error is not None:
                    raise self._keeper.last_error
                if self._roster.promote() is None and not self._wait_until(deadline):
                    raise ReplicaError(f"not ready after {timeout_s:.0f} s")

    def stop(self) -> None:
        """End every engine and remove what it left; raises ReplicaError when one cannot be
        killed.
        """
        self._roster.close()
        self._keeper.join(config.KILL_S)
        self._watch.stop()
        for replica in self.replicas:
            self._crew.spawn(self._fencer.end, replica)
        self._crew.join(2 * config.KILL_S)
        left = [r.name for r in self.replicas]
        if left:
            raise ReplicaError(f"engines that would not die: {', '.join(left)}")

    def report_fault(self, replica: Replica, kind: FaultKind, detail: str) -> None:
        """Somebody saw an answer break off. It is a fault when the engine's server says so or no
        longer listens.
        """
        if replica.state is not State.READY:
            return
        status = replica.health(timeout_s=config.API_PERIOD_S)
        if status >= 500 or (status == 0 and not replica.is_listening()):
            self._on_fault(replica, Fault(kind, replica.incarnation, time.monotonic_ns(), detail))
        else:
            self._watch.hurry(replica)

    def fail_over(self, replica: Replica, fault: Fault) -> Replica:
        """The replica that takes this one's place, once there is one; the same for all who ask.
        Raises ReplicaError.
        """
        with self._roster.changed:
            known = next((f for f in self.failovers if f.failed is replica), None)
            if known is None or (known.done.is_set() and known.error is not None):
                replica.move(State.FENCING)
                known = self._begin_failover(replica, fault, known)
        if not known.done.wait(config.START_S):
            raise ReplicaError(f"no replacement for {replica.name} after {config.START_S:.0f} s")
        if known.error is not None:
            raise known.error
        assert known.replacement is not None
        return known.replacement

    def failover_times(self, failed: Replica) -> dict[str, float]:
        """Of the replacement of this replica: what was done by when, in seconds since the fault was
        noticed; nothing while there is none.
        """
        found = (f for f in reversed(self.failovers) if f.failed is failed)
        return next((f.times() for f in found), {})

    # --- faults

    def _on_fault(self, replica: Replica, fault: Fault) -> None:
        with self._roster.changed:
            was_serving = replica.state is State.READY
            if self._roster.is_closed or not replica.move(State.FENCING):
                return
            kind, session = fault.kind.value, replica.session_id
            log.error("%s (%s, session %d): %s", replica.name, kind, session, fault.detail)
            self._tell(fault)
            if was_serving:
                self._begin_failover(replica, fault, None)
            else:
                self._keeper.note_failure(ReplicaError(str(fault)))
                self._crew.spawn(self._fencer.end, replica)

    def _tell(self, fault: Fault) -> None:
        for callback in self._callbacks:
            callback(fault)

    def _begin_failover(self, replica: Replica, fault: Fault, before: Failover | None) -> Failover:
        failover = Failover(replica, fault)
        if before is not None:
            self.failovers.remove(before)
        self.failovers.append(failover)
        del self.failovers[: -config.FAULTS_KEPT_MAX]
        self._crew.spawn(self._run_failover, failover)
        return failover

    def _run_failover(self, failover: Failover) -> None:
        """Seal and strike, replace, then see the struck ones dead.

        What is sealed is read safely whatever a dying writer still stores, so the next replica need
        not wait until the last page of the failed one is given back; only its segments, cores and
        devices must. Without a seal it does wait.
        """
        failed = failover.failed
        try:
            self._fencer.hide(failed)
            striking = self._crew.spawn(self._strike, failover)
            is_sealed = self._fencer.seal(failed)
            failover.sealed_s = failover.passed_s()
            striking.join(2 * config.KILL_S)
            ending = self._crew.spawn(self._end_failed, failover)
            if not is_sealed:
                ending.join(2 * config.KILL_S)
            promoted = failover.replacement = self._wait_replacement(failover)
            passed_s = failover.replaced_s = failover.passed_s()
            log.warning(
                "%s serves in place of %s after %.3f s", promoted.name, failed.name, passed_s
            )
        except (ConcordiaError, OSError) as error:
            failover.error = ReplicaError.of(error)
            log.error("%s has no replacement: %s", failed.name, error)
        finally:
            failover.done.set()

    def _strike(self, failover: Failover) -> None:
        self._fencer.strike(failover.failed)
        failover.struck_s = failover.passed_s()

    def _end_failed(self, failover: Failover) -> None:
        if self._fencer.confirm(failover.failed):
            failover.fenced_s = failover.passed_s()
            self._fencer.bury(failover.failed)

    def _wait_replacement(self, failover: Failover) -> Replica:
        deadline = time.monotonic() + config.START_S
        with self._roster.changed:
            self._keeper.hurry()
            while (promoted := self._roster.promote()) is None:
                if self._roster.is_closed:
                    raise ReplicaError("the server stops")
                if self._keeper.has_given_up:
                    count, error = self._keeper.failed_count, self._keeper.last_error
                    raise ReplicaError(f"{count} engines failed to start: {error}")
                for replica in self._roster.starting:
                    replica.set_priority(0)
                if not self._wait_until(deadline):
                    raise ReplicaError(f"no engine was ready after {config.START_S:.0f} s")
            # A moment for the resumed requests before the next standby's start takes its share of
            # the cores.
            self._keeper.rest(config.STANDBY_DELAY_S)
        self._take_cores(promoted, failover.failed)
        return promoted

    def _wait_until(self, deadline: float) -> bool:
        """Wait for a change, under the roster's lock; False when there was none."""
        return self._roster.changed.wait(deadline - time.monotonic())

    def _take_cores(self, promoted: Replica, failed: Replica) -> None:
        """A standby that lay over another active replica's cores moves to those that have become
        free.
        """
        others = [r for r in self.active if r is not promoted]
        taken = {core for r in others for rank in r.share.cores for core in rank}
        own = [core for rank in promoted.share.cores for core in rank]
        free = [core for rank in failed.share.cores for core in rank]
        if taken.intersection(own) and len(own) == len(free):
            promoted.move_cores(dict(zip(own, free, strict=True)))
