"""A pool's pages in this process's page table before somebody waits for them, floor 3.

Owns: a thread that maps them, a few MiB at a time, behind all other work. Promises: nothing is read
or written, and no memory taken that the pool's owner did not allocate; where the kernel cannot,
pages come as they are touched; `close` ends within a bound. Called by whoever restores from a pool:
a mapping is a process's own, and hashing one that was never touched takes several times as long.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from concordia import config
from concordia.device.memory import Mapping


class MappedAhead:
    """One pool; `close` before the mapping is closed."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._stop = threading.Event()
        self.is_done = False  # every page was mapped
        self._thread = threading.Thread(target=self._run, name="concordia-map", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End, done or not."""
        self._stop.set()
        self._thread.join(config.WAIT_TASK_S)

    def _run(self) -> None:
        with suppress(OSError):  # then it competes with the rest
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), config.MAP_AHEAD_NICE)
        for offset in range(0, self._mapping.size, config.MAP_AHEAD_BYTES):
            if self._stop.is_set() or not self._mapping.populate(offset, config.MAP_AHEAD_BYTES):
                return
        self.is_done = True
