"""The threads that a replica set works with, floor 6.

Owns: every thread that starts, replaces or ends an engine. Promises: a thread is named after what
it does; `join` knows all that still run. Used by the replica set and its keeper. It bounds nothing:
there are a few per engine, and engines are bounded by their places.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Crew:
    """Threads that end by themselves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def spawn(self, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        """Run it on a thread of its own."""
        thread = threading.Thread(target=target, args=arguments, name=target.__name__, daemon=True)
        with self._lock:
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            thread.start()
        return thread

    def join(self, timeout_s: float) -> None:
        """Wait for all, for each so long at most."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(timeout_s)
