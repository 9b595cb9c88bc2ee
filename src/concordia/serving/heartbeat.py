"""Whether an engine's HTTP server answers, floor 6.

Owns: one thread per replica that asks /health, and its last answer. Promises: an answer is stamped
when it came; a server that does not answer holds up nobody but this thread. Called by the watch. It
judges nothing: the detector does.
"""

from __future__ import annotations

import threading
import time

from concordia import config
from concordia.recovery.detector import ApiSample
from concordia.serving.replica import Replica


class Heartbeat:
    """Asks until stopped; `sample` is what the detector gets."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._answered_ns = time.monotonic_ns()
        self._status = 200
        self._stop = threading.Event()
        self._now = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"heartbeat-{replica.name}", daemon=True
        )
        self._thread.start()

    def sample(self) -> ApiSample:
        """The last answer."""
        return ApiSample(self._replica.session_id, self._answered_ns, self._status)

    def hurry(self) -> None:
        """Ask again now: somebody has doubts."""
        self._now.set()

    def stop(self) -> None:
        """End the thread; it is not waited for, since it may sit in a request that nobody
        answers.
        """
        self._stop.set()
        self._now.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            status = self._replica.health(timeout_s=config.API_SILENT_S)
            if status:
                self._status = status
                self._answered_ns = time.monotonic_ns()
            self._now.wait(config.API_PERIOD_S)
            self._now.clear()
