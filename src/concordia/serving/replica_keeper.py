"""The number of engines, kept, floor 6.

Owns: when the next engine is started, and what its start comes to. Promises: a free place is
filled; a start that fails is told and its engine ended; after each failure in a row the pause
before the next start doubles, and after START_ATTEMPTS_MAX, or one that no repetition can mend,
nothing is started until `hurry`; a standby has its full priority once it is loaded. Called by the
replica set. It promotes nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from concordia import config
from concordia.errors import ConcordiaError, ReplicaError, UsageError
from concordia.recovery.fault import Fault, FaultKind
from concordia.serving.crew import Crew
from concordia.serving.engine_spec import EngineSpec
from concordia.serving.fencer import Fencer
from concordia.serving.process import can_raise_priority
from concordia.serving.replica import Replica, State
from concordia.serving.roster import Place, Roster
from concordia.serving.watch import Watch

log = logging.getLogger(__name__)


class ReplicaKeeper:
    """Call `start`; it ends once the roster is closed. `hurry`, `rest` and `note_failure` are
    called under the roster's lock.
    """

    def __init__(
        self,
        spec: EngineSpec,
        roster: Roster,
        *,
        watch: Watch,
        fencer: Fencer,
        crew: Crew,
        tell: Callable[[Fault], None],
    ) -> None:
        self.launched_count = 0
        self.failed_count = 0  # starts that failed in a row
        self.last_error: ConcordiaError | None = None  # of these
        self._spec = spec
        self._roster = roster
        self._watch = watch
        self._fencer = fencer
        self._crew = crew
        self._tell = tell
        self._not_before = 0.0
        # Engines are started on this thread alone: the kernel ends them with the thread that
        # started them.
        self._thread = threading.Thread(target=self._keep, name="replica-keeper", daemon=True)

    @property
    def has_given_up(self) -> bool:
        return self.failed_count >= config.START_ATTEMPTS_MAX

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait until nothing more is started; for a closed roster."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def hurry(self) -> None:
        """The next engine is wanted at once, whatever failed before."""
        self.failed_count, self._not_before = 0, 0.0
        self._roster.notify()

    def rest(self, pause_s: float) -> None:
        """Start nothing for a moment."""
        self._not_before = time.monotonic() + pause_s

    def note_failure(self, error: ConcordiaError) -> None:
        """One more in a row; the pause before the next doubles."""
        self.failed_count += 1
        if isinstance(error, UsageError):
            # the same flags will not be better next time
            self.failed_count = config.START_ATTEMPTS_MAX
        self.last_error = error
        self.rest(
            min(config.START_PAUSE_S * 2 ** (self.failed_count - 1), config.START_PAUSE_MAX_S)
        )
        if self.has_given_up and self._roster.active:
            log.error(
                "no more standbys are started after %d failures: %s", self.failed_count, error
            )
        self._roster.notify()

    def _keep(self) -> None:
        """Fill places until the server stops."""
        changed = self._roster.changed
        while True:
            with changed:
                if self._roster.is_closed:
                    return
                place = self._roster.vacancy()
                if place is None or self.has_given_up:
                    changed.wait(config.KEEP_PERIOD_S)
                    continue
                if (pause_s := self._not_before - time.monotonic()) > 0:
                    changed.wait(pause_s)
                    continue
            try:
                self._launch(place)
            except (ConcordiaError, OSError) as error:
                with changed:
                    self.note_failure(ReplicaError.of(error))

    def _launch(self, place: Place) -> None:
        self.launched_count += 1
        replica = Replica(
            self._spec,
            name=f"r{self.launched_count}",
            slot=place.slot,
            share=place.share,
            nice=config.STANDBY_NICE if place.is_spare and can_raise_priority() else 0,
        )
        self._roster.add(replica)
        self._fencer.register(replica)
        self._crew.spawn(self._bring_up, replica)

    def _bring_up(self, replica: Replica) -> None:
        """See one engine loaded; it is a standby then, or it has failed."""
        try:
            replica.wait_ready(timeout_s=config.START_S)
            self._watch.add(replica)
        except (ConcordiaError, OSError) as error:
            self._give_up(replica, ReplicaError.of(error))
            return
        # here, not when it is promoted; after `add`, which finds its last processes
        replica.set_priority(0)
        with self._roster.changed:
            if replica.move(State.STANDBY):
                self.failed_count, self.last_error = 0, None
                loaded_s = replica.ready_s or 0
                log.info(
                    "%s is loaded after %.1f s (session %d)",
                    replica.name,
                    loaded_s,
                    replica.session_id,
                )
            else:
                self._watch.remove(replica)
            self._roster.notify()

    def _give_up(self, replica: Replica, error: ConcordiaError) -> None:
        with self._roster.changed:
            if self._roster.is_closed or not replica.move(State.FENCING):
                return  # somebody else ends it, and that is why it failed
            log.error("%s\n%s", error, "\n".join(replica.log.last_lines()))
            now_ns = time.monotonic_ns()
            self._tell(Fault(FaultKind.START_FAILED, replica.incarnation, now_ns, str(error)))
            self.note_failure(error)
        self._fencer.end(replica)
