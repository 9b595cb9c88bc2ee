"""The journal's owner, kept alive, floor 6.

Owns: the start of the owner process and the watch over it. Promises: when it dies, that is said,
counted as a fault, and another adopts the journal; after OWNER_RESTARTS_MAX deaths in a row the
server goes on unprotected, loudly. Called by the service. It never reads the journal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import select
import signal
import threading
import time
from collections.abc import Callable

from concordia import config
from concordia.errors import ConcordiaError
from concordia.journal.owner import spawn_owner
from concordia.journal.place import Place
from concordia.recovery.fault import Fault, FaultKind

log = logging.getLogger(__name__)


class OwnerKeeper:
    """Starts the owner at once (raises what `spawn_owner` raises) and watches it until `stop`."""

    def __init__(
        self, journal: pathlib.Path, *, size_bytes: int | None, place: Place | None = None
    ) -> None:
        self.journal = journal
        self._size_bytes = size_bytes
        self._place = place
        self._callbacks: list[Callable[[Fault], None]] = []
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_stopping = False
        self.pid = spawn_owner(journal, size_bytes=size_bytes, place=place)
        self._thread = threading.Thread(target=self._keep, name="owner-keeper", daemon=True)
        self._thread.start()

    def subscribe(self, callback: Callable[[Fault], None]) -> None:
        """Be told when the owner dies, on a thread of ours."""
        self._callbacks.append(callback)

    def stop(self) -> None:
        """Look away; call it before the owner is told to end."""
        self._is_stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(config.OWNER_START_S)
        os.close(self._wake)

    def abandon(self) -> None:
        """Stop, and end an owner that nobody could connect to."""
        self.stop()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        if not self.collect(timeout_s=config.KILL_S):
            log.error("the journal's owner (%d) still runs", self.pid)

    def collect(self, *, timeout_s: float) -> bool:
        """Wait for an owner that was told to end; False at the bound."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            try:
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                ended = bool(poll.poll(max(0, int(1000 * (deadline - time.monotonic())))))
            finally:
                os.close(descriptor)
            self._reap()
            return ended
        return True

    def _keep(self) -> None:
        deaths = 0
        while self._wait_end():
            detected_ns = time.monotonic_ns()
            self._reap()
            deaths += 1
            log.error("the journal's owner (%d) died; another adopts the journal", self.pid)
            detail = f"the journal's owner ({self.pid}) ended"
            fault = Fault(FaultKind.OWNER_DEATH, 0, detected_ns, detail, self.pid)
            for callback in self._callbacks:
                callback(fault)
            if deaths > config.OWNER_RESTARTS_MAX or not self._restart():
                log.error("the journal has no owner any more: nothing is protected from here")
                return

    def _restart(self) -> bool:
        try:
            self.pid = spawn_owner(self.journal, size_bytes=self._size_bytes, place=self._place)
        except ConcordiaError as error:
            log.error("no new owner for the journal: %s", error)
            return False
        log.warning("the journal's new owner is process %d", self.pid)
        return True

    def _wait_end(self) -> bool:
        """True when the owner has ended, False when we stop."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return not self._is_stopping
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        poll.poll()
        os.close(descriptor)
        return not self._is_stopping

    def _reap(self) -> None:
        """The owner is nobody's child, so it is ours as soon as we are subreaper."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
