"""All engines of one server: so many that serve, so many that wait, floor 6.

Owns: which engines exist, who serves, and what happens when one fails. Promises: a failed engine is sealed and struck before another takes its
place, and confirmed dead before anything of it is used again; a place is filled by a loaded standby, else by the next engine that is
ready; what is missing is started anew, with a growing pause when it fails; a fault is told once. Called by the service and the router, from
any thread; its methods may block. It does not detect faults (the watch does) and does not know requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from concordia import config
from concordia.errors import ConcordiaError, ReplicaError, UsageError
from concordia.recovery.fault import Fault, FaultKind
from concordia.serving.engine_spec import EngineSpec
from concordia.serving.failover import Failover
from concordia.serving.process_tree import can_raise_priority
from concordia.serving.replica import Replica, State
from concordia.serving.resources import Share
from concordia.serving.watch import Watch

log = logging.getLogger(__name__)

_OCCUPIES: Final = frozenset({State.STARTING, State.STANDBY, State.READY, State.FENCING})


class Seals(Protocol):
    """What is asked of the journal's owner; None stands for a server without protection."""

    def register_replica(self, replica: int, *, session_id: int) -> None: ...
    def seal_replica(self, replica: int) -> dict[int, int]: ...
    def release_replica(self, replica: int) -> bool: ...


class ReplicaSet:
    """Call `start`, then `stop` in any case."""

    def __init__(
        self,
        spec: EngineSpec,
        shares: Sequence[Share],
        *,
        replicas: int,
        standbys: int,
        journal: Seals | None,
    ) -> None:
        self.spec = spec
        self.failovers: list[Failover] = []
        self._shares = shares
        self._replica_count = replicas
        self._standby_count = standbys
        self._journal = journal
        self._changed = threading.Condition()
        self._replicas: list[Replica] = []
        self._callbacks: list[Callable[[Fault], None]] = []
        self._launched = 0
        self._failures = 0  # starts that failed in a row
        self._last_error: ConcordiaError | None = None
        self._not_before = 0.0
        self._is_stopping = False
        self._threads: list[threading.Thread] = []
        self._watch = Watch(self._on_fault, spec.journal)
        # Engines are started on this thread alone: the kernel ends them with the thread that started them.
        self._keeper = threading.Thread(target=self._keep, name="replica-keeper", daemon=True)

    @property
    def active(self) -> list[Replica]:
        """Replicas that serve."""
        return [r for r in list(self._replicas) if r.state is State.READY]

    @property
    def standbys(self) -> list[Replica]:
        """Replicas that are loaded and wait."""
        return [r for r in list(self._replicas) if r.state is State.STANDBY]

    @property
    def replicas(self) -> list[Replica]:
        """All that are not confirmed dead."""
        return [r for r in list(self._replicas) if r.state is not State.DEAD]

    def subscribe(self, callback: Callable[[Fault], None]) -> None:
        """Be told of every fault, on a thread of ours; the callback must not block."""
        self._callbacks.append(callback)

    def start(self, *, timeout_s: float = config.START_S) -> None:
        """Start everything; returns when as many serve as shall. Raises what the first failed start says."""
        self._keeper.start()
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while len(self.active) < self._replica_count:
                if self._is_stopping:
                    raise ReplicaError("stopped while it started")
                if self._last_error is not None:
                    raise self._last_error
                if self._promote() is None and not self._changed.wait(deadline - time.monotonic()):
                    raise ReplicaError(f"not ready after {timeout_s:.0f} s")

    def stop(self) -> None:
        """End every engine and remove what it left; raises ReplicaError when one cannot be killed."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._keeper.ident is not None:
            self._keeper.join(config.KILL_S)
        self._watch.stop()
        enders = [
            threading.Thread(target=self._discard, args=(r,), name=f"end-{r.name}")
            for r in self.replicas
        ]
        for thread in enders:
            thread.start()
        for thread in [*enders, *self._threads]:
            thread.join(2 * config.KILL_S)
        left = [r.name for r in self.replicas]
        if left:
            raise ReplicaError(f"engines that would not die: {', '.join(left)}")

    def report_fault(self, replica: Replica, kind: FaultKind, detail: str) -> None:
        """Somebody saw an answer break off. It is a fault when the engine's server says so or no longer listens."""
        if replica.state is not State.READY:
            return
        status = replica.health(timeout_s=config.API_PERIOD_S)
        if status >= 500 or (status == 0 and not replica.is_listening()):
            self._on_fault(replica, Fault(kind, replica.incarnation, time.monotonic_ns(), detail))
        else:
            self._watch.hurry(replica)

    def fail_over(self, replica: Replica, fault: Fault) -> Replica:
        """The replica that takes this one's place, once there is one; the same for all who ask. Raises ReplicaError."""
        with self._changed:
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

    # --- faults

    def _on_fault(self, replica: Replica, fault: Fault) -> None:
        with self._changed:
            was_serving = replica.state is State.READY
            if self._is_stopping or not replica.move(State.FENCING):
                return
            log.error(
                "%s (%s, session %d): %s",
                replica.name,
                fault.kind.value,
                replica.session_id,
                fault.detail,
            )
            self._tell(fault)
            if was_serving:
                self._begin_failover(replica, fault, None)
            else:
                self._note_failure(ReplicaError(str(fault)))
                self._spawn(self._discard, replica)

    def _tell(self, fault: Fault) -> None:
        for callback in self._callbacks:
            callback(fault)

    def _begin_failover(self, replica: Replica, fault: Fault, before: Failover | None) -> Failover:
        failover = Failover(replica, fault)
        if before is not None:
            self.failovers.remove(before)
        self.failovers.append(failover)
        del self.failovers[: -config.FAULTS_KEPT_MAX]
        self._spawn(self._run_failover, failover)
        return failover

    def _run_failover(self, failover: Failover) -> None:
        """Seal, strike, replace, then see the struck ones dead.

        What is sealed is read safely whatever a dying writer still stores, so the next replica need not wait until the last page of the
        failed one is given back; only its segments, cores and devices must. Without a seal it does wait.
        """
        failed = failover.failed
        is_sealed = self._seal(failed)
        failover.sealed_s = failover.passed_s()
        failed.strike()
        ending = self._spawn(self._end_failed, failover)
        if not is_sealed:
            ending.join(2 * config.KILL_S)
        try:
            failover.replacement = self._wait_replacement(failover)
            failover.replaced_s = failover.passed_s()
            log.warning(
                "%s serves in place of %s after %.3f s",
                failover.replacement.name,
                failed.name,
                failover.replaced_s,
            )
        except ConcordiaError as error:
            failover.error = error
            log.error("%s has no replacement: %s", failed.name, error)
        finally:
            failover.done.set()

    def _end_failed(self, failover: Failover) -> None:
        self._discard(failover.failed, failover)

    def _seal(self, replica: Replica) -> bool:
        """Nothing more will be read of the replica; False when the owner did not do it."""
        self._watch.remove(replica)
        if self._journal is None:
            return True
        try:
            self._journal.seal_replica(replica.incarnation)
        except ConcordiaError as error:
            log.error("%s could not be sealed, its requests start over: %s", replica.name, error)
            return False
        return True

    def _confirm(self, replica: Replica) -> None:
        """Kill what is left of it, see it dead, and give its part of the journal back."""
        replica.fence()
        if self._journal is not None:
            try:
                self._journal.release_replica(replica.incarnation)
            except ConcordiaError as error:
                log.error("%s could not be released: %s", replica.name, error)
        with self._changed:
            self._changed.notify_all()

    def _wait_replacement(self, failover: Failover) -> Replica:
        deadline = time.monotonic() + config.START_S
        with self._changed:
            self._failures, self._not_before = 0, 0.0  # now it is wanted at once
            self._changed.notify_all()
            while True:
                promoted = self._promote()
                if promoted is not None:
                    break
                if self._is_stopping:
                    raise ReplicaError("the server stops")
                if self._failures >= config.START_ATTEMPTS_MAX and self._last_error is not None:
                    raise ReplicaError(
                        f"{self._failures} engines failed to start: {self._last_error}"
                    )
                for replica in self._replicas:
                    if replica.state is State.STARTING:
                        replica.set_priority(0)
                if not self._changed.wait(deadline - time.monotonic()):
                    raise ReplicaError(f"no engine was ready after {config.START_S:.0f} s")
            # A moment for the resumed requests before the next standby's start takes its share of the cores.
            self._not_before = time.monotonic() + config.STANDBY_DELAY_S
        self._take_cores(promoted, failover.failed)
        return promoted

    def _promote(self) -> Replica | None:
        """The longest loaded standby serves from now on."""
        for replica in self.standbys:
            if replica.move(State.READY):
                return replica
        return None

    def _take_cores(self, promoted: Replica, failed: Replica) -> None:
        """A standby that lay over another active replica's cores moves to those that have become free."""
        taken = {
            c for r in self.active if r is not promoted for rank in r.share.cores for c in rank
        }
        own = [core for rank in promoted.share.cores for core in rank]
        free = [core for rank in failed.share.cores for core in rank]
        if taken.intersection(own) and len(own) == len(free):
            promoted.move_cores(dict(zip(own, free, strict=True)))

    # --- keeping the number

    def _keep(self) -> None:
        """Start what is missing, until the server stops."""
        while True:
            with self._changed:
                pause = self._pause_s()
                if self._is_stopping:
                    return
                if pause > 0:
                    self._changed.wait(pause)
                    continue
            try:
                self._launch()
            except (ConcordiaError, OSError) as error:
                with self._changed:
                    self._note_failure(
                        error if isinstance(error, ConcordiaError) else ReplicaError(str(error))
                    )

    def _pause_s(self) -> float:
        """How long until the next engine is to be started; 0 is now."""
        occupied = sum(r.state in _OCCUPIES for r in self._replicas)
        if occupied >= self._replica_count + self._standby_count:
            return config.KEEP_PERIOD_S
        if self._failures >= config.START_ATTEMPTS_MAX:
            return config.KEEP_PERIOD_S
        return max(0.0, self._not_before - time.monotonic())

    def _launch(self) -> None:
        used = {r.slot for r in self._replicas if r.state in _OCCUPIES}
        slot = next(s for s in range(len(self._shares)) if s not in used)
        self._launched += 1
        is_spare = len(used) >= self._replica_count
        replica = Replica(
            self.spec,
            name=f"r{self._launched}",
            slot=slot,
            share=self._shares[slot],
            nice=config.STANDBY_NICE if is_spare and can_raise_priority() else 0,
        )
        with self._changed:
            self._replicas = [r for r in self._replicas if r.state is not State.DEAD] + [replica]
        if self._journal is not None:
            try:
                self._journal.register_replica(replica.incarnation, session_id=replica.session_id)
            except ConcordiaError as error:
                log.error("%s is not known to the journal's owner: %s", replica.name, error)
        self._spawn(self._bring_up, replica)

    def _bring_up(self, replica: Replica) -> None:
        try:
            replica.wait_ready(timeout_s=config.START_S)
        except ConcordiaError as error:
            with self._changed:
                if self._is_stopping or not replica.move(State.FENCING):
                    return
                log.error("%s\n%s", error, "\n".join(replica.last_lines()))
                self._tell(
                    Fault(
                        FaultKind.START_FAILED, replica.incarnation, time.monotonic_ns(), str(error)
                    )
                )
                self._note_failure(error)
            self._discard(replica)
            return
        self._watch.add(replica)
        replica.set_priority(0)  # here, not when it is promoted; after `add`, which finds its last processes
        with self._changed:
            if replica.move(State.STANDBY):
                self._failures, self._last_error = 0, None
                log.info(
                    "%s is loaded after %.1f s (session %d)",
                    replica.name,
                    replica.ready_s or 0,
                    replica.session_id,
                )
            else:
                self._watch.remove(replica)
            self._changed.notify_all()

    def _note_failure(self, error: ConcordiaError) -> None:
        """One more in a row; the pause before the next doubles."""
        self._failures += 1
        if isinstance(error, UsageError):
            self._failures = (
                config.START_ATTEMPTS_MAX
            )  # the same flags will not be better next time
        self._last_error = error
        pause = min(config.START_PAUSE_S * 2 ** (self._failures - 1), config.START_PAUSE_MAX_S)
        self._not_before = time.monotonic() + pause
        if self._failures >= config.START_ATTEMPTS_MAX and self.active:
            log.error("no more standbys are started after %d failures: %s", self._failures, error)
        self._changed.notify_all()

    def _discard(self, replica: Replica, failover: Failover | None = None) -> None:
        """End a replica, and remove what it leaves; a failover has sealed it already."""
        if failover is None and replica.state is not State.DEAD:
            self._seal(replica)
        while replica.state is not State.DEAD:
            try:
                self._confirm(replica)
            except ReplicaError as error:
                # On starved cores a killed process takes its time to give gigabytes back. Until then its place is taken.
                log.error("%s: %s", replica.name, error)
                if self._is_stopping:
                    return
        if failover is not None:
            failover.fenced_s = failover.passed_s()
        self._bury(replica)

    def _bury(self, replica: Replica) -> None:
        try:
            removed = replica.bury()
        except (ConcordiaError, OSError) as error:
            log.error("%s left something: %s", replica.name, error)
            return
        if removed:
            log.info("%s: removed shared memory %s", replica.name, ", ".join(removed))

    def _spawn(self, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, name=target.__name__, daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()
        return thread
