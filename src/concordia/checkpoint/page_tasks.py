"""The tasks of one page region, floor 4.

Owns: `PageTasks`: which task of the region is the last, and the bursts before scans. Promises: a
burst writes the region's list of pages only once the task before has read it, and nobody's task
comes between a burst and the task that appends what it found; the wait is bounded. Called by
checkpointer.py. Does not know what the pages mean (page_scan.cu, page_burst.cu).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from concordia import abi, config
from concordia.checkpoint.region import PageRegion
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task, Ticket


class PageTasks:
    """Hands them in, for any thread."""

    def __init__(self, runtime: Runtime, region: PageRegion) -> None:
        self._runtime, self._region = runtime, region
        # who holds it waits for the task before, within WAIT_TASK_S, and for nothing else
        self._lock = threading.Lock()
        self._last: Ticket | None = None

    def scan(self, first: int, end: int, *, is_burst: bool | None, **words: int) -> Ticket:
        """Pages of [first, end) that changed; None: a burst where it is worth its launch."""
        region = self._region
        if is_burst is None:
            is_burst = (end - first) * region.page_bytes >= config.BURST_BYTES_MIN
        is_burst = is_burst and region.burst is not None and 0 <= first < end <= region.page_count
        arg = abi.PAGES_NOTED if is_burst else 0
        task = pages_task(region, token_start=first, token_end=end, arg=arg, **words)
        with self._lock:
            if is_burst:
                self._send_burst(first, end)
            return self._submit(task)

    def append(self, pages: Sequence[int], **words: int) -> Ticket:
        """Just these pages: many of them are copied to the list."""
        task = pages_task(self._region, blocks=pages, **words)
        with self._lock:
            return self._submit(task)

    def _send_burst(self, first: int, end: int) -> None:
        if self._last is not None:
            self._runtime.finish(self._last)
        region, words = self._region, (self._region.entry.address, first, end)
        burst = region.burst
        assert burst is not None
        self._runtime.run_burst(
            lambda stream: burst.enqueue(stream, words, zeroed=region.found_count)
        )

    def _submit(self, task: Task) -> Ticket:
        self._last = self._runtime.submit(task)
        return self._last


def pages_task(region: PageRegion, **words: Any) -> Task:
    """One task of the region, not handed in."""
    return Task(
        opcode=region.scan.opcode,
        kind=abi.TASK_CHECKPOINT,
        region=region.number,
        record_kind=abi.KIND_PAGE,
        **words,
    )
