"""How long a rank's executor is at it for the journal.

Owns: what was told of the executor's own clock. Promises: time is told once; what a restore takes
is left out; it is looked at every APPENDS_TOLD_S, not in every step. Called by the worker side.
What an engine spent since the last look dies with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from concordia import config


class AppendClock:
    """`read` gives the nanoseconds that handlers have run so far."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._told_ns = read()
        self._next = time.monotonic() + config.APPENDS_TOLD_S

    def take(self) -> int:
        """Nanoseconds since they were last told; 0 while it is too early to look."""
        now = time.monotonic()
        if now < self._next:
            return 0
        self._next = now + config.APPENDS_TOLD_S
        busy_ns = self._read()
        spent_ns, self._told_ns = busy_ns - self._told_ns, busy_ns
        return max(0, spent_ns)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """What the executor does meanwhile is no appending, a step's last appends that still run
        then included.
        """
        before_ns = self._read()
        try:
            yield
        finally:
            self._told_ns += self._read() - before_ns
