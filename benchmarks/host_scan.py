"""The same delta found on the host: copy the region there and compare it with a shadow.

Owns: the paper's baseline (pageable memory, one thread) and the same done well: registered memory,
the copy in chunks, each compared by a core of its own as soon as it is there, vectorised and
outside the interpreter's lock. Promises: both find exactly the pages that were made dirty, and
bring the shadow up to date, or DeviceError. Peers of device_runtime.py's delta.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from bench import Bench
from loops import Array

from concordia.device.cuda_call import checked
from concordia.device.memory import Buffer
from concordia.errors import DeviceError

CHUNK_BYTES: Final = 4 << 20  # of 256 MiB: the last one is compared in half a millisecond
ROUNDS: Final = 7
DIRTY: Final = 32


class HostScan:
    """Chunks of a region come over the bus while those before are compared."""

    def __init__(self, bench: Bench, base: int, shadow: Array, *, page_bytes: int) -> None:
        self._bench, self._base, self._page_bytes = bench, base, page_bytes
        self._shadow = shadow
        self._buffer = Buffer(len(shadow))
        bench.device.share(self._buffer.address, self._buffer.size)
        self._copy = np.frombuffer(self._buffer.view, np.uint8)
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._chunks = range(0, len(shadow), CHUNK_BYTES)
        with bench.device._context.current() as driver:
            self._stream = checked(driver.cuStreamCreate(1), "create a stream")
            quiet = int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
            self._events = [
                checked(driver.cuEventCreate(quiet), "create an event") for _ in self._chunks
            ]

    def scan(self) -> list[int]:
        """The pages that differ from the shadow, in order."""
        with self._bench.device._context.current() as driver:
            for at, event in zip(self._chunks, self._events, strict=True):
                size = min(CHUNK_BYTES, len(self._shadow) - at)
                target, source = self._buffer.address + at, self._base + at
                copied = driver.cuMemcpyDtoHAsync(target, source, size, self._stream)
                checked(copied, "copy a chunk to the host")
                checked(driver.cuEventRecord(event, self._stream), "mark a chunk")
        found = self._pool.map(self._compare, self._chunks, self._events)
        return [page for pages in found for page in pages]

    def _compare(self, at: int, event: Any) -> list[int]:
        with self._bench.device._context.current() as driver:
            checked(driver.cuEventSynchronize(event), "wait for a chunk")
        chunk = slice(at, at + CHUNK_BYTES)
        return self._bench.loops.take_dirty(
            self._copy[chunk],
            self._shadow[chunk],
            page_bytes=self._page_bytes,
            first=at // self._page_bytes,
        )

    def close(self) -> None:
        self._pool.shutdown()
        with self._bench.device._context.current() as driver:
            for event in self._events:
                driver.cuEventDestroy(event)
            driver.cuStreamDestroy(self._stream)
        self._bench.device.unshare(self._buffer.address)
        self._buffer.close()


def host_scans(bench: Bench, data: Array, *, page_bytes: int) -> dict[str, float]:
    """Medians in microseconds, by peer; `data` is what a region of that size shall hold."""
    base = bench.device.allocate(len(data))
    bench.device.write(base, data.tobytes())
    generator = np.random.default_rng(7)
    pages = len(data) // page_bytes

    def soil() -> list[int]:
        chosen = sorted(int(p) for p in generator.choice(pages, DIRTY, replace=False))
        for page in chosen:
            bench.device.write(base + page * page_bytes + 16, generator.bytes(64))
        return chosen

    def pageable() -> list[int]:
        copy = np.frombuffer(bench.device.read(base, len(data)), np.uint8).reshape(-1, page_bytes)
        rows = shadow.reshape(-1, page_bytes)
        found = np.flatnonzero((copy != rows).any(axis=1))
        rows[found] = copy[found]
        return [int(page) for page in found]

    shadow = data.copy()
    scan = HostScan(bench, base, shadow, page_bytes=page_bytes)
    try:
        return {
            "host_scan_pinned_all_cores": _median_us(scan.scan, soil, ROUNDS + 3),
            "host_scan_pageable_one_thread": _median_us(pageable, soil, 3),
        }
    finally:
        scan.close()
        bench.device.free(base)


def _median_us(scan: Callable[[], list[int]], soil: Callable[[], list[int]], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        dirty = soil()
        started = time.perf_counter()
        found = scan()
        times.append((time.perf_counter() - started) * 1e6)
        if found != dirty:
            raise DeviceError(f"a host scan found {len(found)} pages, {len(dirty)} are dirty")
    return statistics.median(times)
