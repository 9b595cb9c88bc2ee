"""The delta of a 256 MiB region with a few dirty pages, from the submission to the commit.

Owns: delta_write_set (the caller knows the pages) and delta_scan_* (they are found), each beside
scans on the host. Promises: a figure is the worst of 1, 8 and 32 dirty pages, and every answer was
exactly that many. The executor is kept in between two tasks. Called by device_runtime.py.
"""

from __future__ import annotations

import statistics
import time
from typing import Final

import numpy as np
from bench import Bench, stay
from figures import figure
from host_scan import host_scans

from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import PageRegion
from concordia.errors import DeviceError
from concordia.runtime.ring import Task

REGION_BYTES: Final = 256 << 20
PAGE_BYTES: Final = 4096
PAGES: Final = REGION_BYTES // PAGE_BYTES
DIRTY: Final = (1, 8, 32)
WAYS: Final = {
    "delta_write_set": 1,
    "delta_scan_1cta": 1,
    "delta_scan_4cta": 4,
    "delta_scan_8cta": 8,
    "delta_scan_burst": 1,
}
TURNS: Final = 25
WARM_UP: Final = 3


def delta(bench: Bench) -> None:
    """All delta_* figures."""
    generator = np.random.default_rng(5)
    data = generator.integers(0, 256, REGION_BYTES, dtype=np.uint8)
    found = {}
    for name, ctas in WAYS.items():
        bench.say(f"{name}: {', '.join(map(str, DIRTY))} dirty pages")
        found[name] = _measure(bench, name, ctas, data.tobytes(), generator)
    bench.say("the same on the host")
    peer = host_scans(bench, data, page_bytes=PAGE_BYTES)
    for name, times in found.items():
        medians = {dirty: round(statistics.median(spent), 1) for dirty, spent in times.items()}
        worst = max(DIRTY, key=lambda dirty: medians[dirty])
        value = {**figure(times[worst], "us"), "dirty": worst, "medians": medians}
        bench.report(name, value, peer=peer)


def _measure(
    bench: Bench, name: str, ctas: int, data: bytes, generator: np.random.Generator
) -> dict[int, list[float]]:
    """Microseconds by number of dirty pages."""
    bench.stream.restart()
    checkpointer = Checkpointer(bench.device, bench.stream.target(), lanes=ctas)
    stay(checkpointer.runtime)
    base = bench.device.allocate(REGION_BYTES)
    bench.device.write(base, data)
    region = checkpointer.register_pages(base, size=REGION_BYTES, page_bytes=PAGE_BYTES)
    _take_all(bench, checkpointer, region)
    found: dict[int, list[float]] = {}
    for dirty in DIRTY:
        for turn in range(TURNS):
            chosen = sorted(int(p) for p in generator.choice(PAGES, dirty, replace=False))
            for page in chosen:
                at = base + page * PAGE_BYTES + 8 * (turn % 500)
                bench.device.write(at, generator.bytes(8))
            bench.stream.refill()
            checkpointer.wait(checkpointer.runtime.submit(Task()))
            spent_us, result = _time(bench, checkpointer, region, name, chosen)
            if result != dirty:
                raise DeviceError(f"{name}: {result} pages were found, {dirty} are dirty")
            if turn >= WARM_UP and spent_us is not None:
                found.setdefault(dirty, []).append(spent_us)
    checkpointer.close()
    bench.device.free(base)
    return found


def _time(
    bench: Bench, checkpointer: Checkpointer, region: PageRegion, name: str, pages: list[int]
) -> tuple[float | None, int]:
    """Microseconds, and the number of pages that were committed. No time where the executor's lease
    had just ended.
    """
    if name == "delta_write_set":
        task = checkpointer.pages_task(region, blocks=pages)
        spent_us, ticket = bench.loops.task_us(checkpointer.runtime.ring.address, task)
        if spent_us is None:
            checkpointer.runtime.submit(Task())  # which sends it in
    else:
        started = time.perf_counter()
        ticket = checkpointer.scan_pages(region, is_burst=name == "delta_scan_burst")
        while checkpointer.result(ticket) is None:
            pass  # the waiter's naps are longer than what is measured
        spent_us = (time.perf_counter() - started) * 1e6
    return spent_us, checkpointer.wait(ticket).result


def _take_all(bench: Bench, checkpointer: Checkpointer, region: PageRegion) -> None:
    """Everything is dirty at first, and more than the pool has at once."""
    count = 8192
    for first in range(0, PAGES, count):
        done = checkpointer.wait(checkpointer.scan_pages(region, first=first, count=count))
        if done.result != count:
            raise DeviceError(f"the first scan took {done.result} of {count} pages: {done}")
        bench.stream.refill()
