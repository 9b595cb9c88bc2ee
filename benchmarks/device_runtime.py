"""The device runtime beside what the hardware allows and what else there is, on one GPU.

Each part measures one line of the table in docs/benchmarks.md, its peers in the same run. Parts add
up into one result file (benchmarks/results/device_runtime_h200.json), so they can be run alone:
`--only submit ring delta`. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from concordia.checkpoint.checkpointer import Checkpointer
from concordia.device.compiler import HandlerSource, HostCompiler
from concordia.device.cuda import CudaDevice
from concordia.runtime.ring import Task, Ticket, pack_task
from concordia.testing.machine import add_figures
from gpu import Stream, figure, launch_and_sync, stay

RESULTS: Final = pathlib.Path(__file__).parent / "results" / "device_runtime_h200.json"
REGION_BYTES: Final = 256 << 20
PAGE_BYTES: Final = 4096
DIRTY: Final = (1, 8, 32)
BURST: Final = 32  # submissions between two readings of the clock, which itself takes 20 ns

# A producer's loop without an interpreter around it.
NATIVE: Final = r"""
#include "ring.h"
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int time_submit(RingHeader* ring, uint64_t count, uint64_t* ns) {
  Task task = {};
  task.kind = kTaskNoop;
  uint64_t position = 0;
  const uint64_t started = now_ns();
  for (uint64_t i = 0; i < count; ++i)
    if (submit(ring, &task, Arguments{}, &position) > kSubmittedNeedsLaunch) return 1;
  *ns = now_ns() - started;
  return 0;
}

EXPORT int time_round_trip(RingHeader* ring, uint64_t count, uint64_t* ns) {
  Task task = {};
  task.kind = kTaskNoop;
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t position = 0;
    Completion found;
    const uint64_t started = now_ns();
    // When the executor has left, its return would be measured as well.
    if (submit(ring, &task, Arguments{}, &position) != kSubmitted) return 1;
    while (read_completion(ring, position, &found) == kPending)
      if (now_ns() - started > 1000000000u) return 2;
    ns[i] = now_ns() - started;
  }
  return 0;
}

EXPORT int time_task(RingHeader* ring, const Task* task, const uint32_t* ids, uint64_t count,
                     uint64_t* position_ptr, uint64_t* ns) {
  Completion found;
  const uint64_t started = now_ns();
  if (submit(ring, task, Arguments{ids, count}, position_ptr) != kSubmitted) return 1;
  while (read_completion(ring, *position_ptr, &found) == kPending)
    if (now_ns() - started > 1000000000u) return 2;
  *ns = now_ns() - started;
  return 0;
}
"""

Figures = dict[str, dict[str, Any]]


class Bench:
    """One device, one stream, and the native loops."""

    def __init__(self) -> None:
        self.device = CudaDevice(0)
        self.stream = Stream()
        path, _ = HostCompiler().compile(HandlerSource.of("producer.cpp", {}, text=NATIVE))
        self.native = ctypes.CDLL(str(path))
        self.figures: Figures = {}

    def report(self, key: str, value: dict[str, Any], **peers: float) -> None:
        """Keep one figure with the medians of its peers."""
        self.figures[key] = {**value, "peer": peers}
        print(
            f"{key:28} {value['median']:10.3f} {value['unit']:6} (min {value['min']}, p95 "
            f"{value['p95']}) {peers}",
            flush=True,
        )

    def time_task(self, checkpointer: Checkpointer, task: Task) -> tuple[float, Ticket]:
        """Microseconds from the submission to the answer, for a producer without an interpreter."""
        filled, ids = pack_task(task)
        position, spent = ctypes.c_uint64(), ctypes.c_uint64()
        ring = ctypes.c_void_p(checkpointer.runtime.ring.address)
        count = ctypes.c_uint64(len(task.blocks))
        refs = ctypes.byref(position), ctypes.byref(spent)
        assert self.native.time_task(ring, filled, ids, count, *refs) == 0
        return spent.value / 1000, Ticket(position.value)

    def close(self) -> None:
        self.stream.close()
        self.device.close()


def producer(bench: Bench) -> None:
    """submit, ring_round_trip: a producer in a native loop, beside a launch and a
    synchronisation.
    """
    checkpointer = Checkpointer(bench.device, None, lanes=1)
    stay(checkpointer.runtime)
    ring = ctypes.c_void_p(checkpointer.runtime.ring.address)
    spent = ctypes.c_uint64()
    each, trips = [], []
    for _ in range(300):
        checkpointer.runtime.wait(checkpointer.runtime.submit(Task()))  # the executor is inside now
        assert bench.native.time_submit(ring, ctypes.c_uint64(BURST), ctypes.byref(spent)) == 0
        each.append(spent.value / BURST / 1000)
        checkpointer.runtime.drain()
    many = (ctypes.c_uint64 * 20)()
    for _ in range(100):
        checkpointer.runtime.wait(checkpointer.runtime.submit(Task()))
        if bench.native.time_round_trip(ring, ctypes.c_uint64(20), many) == 0:
            trips += [ns / 1000 for ns in many[1:]]
    checkpointer.close()
    peer = launch_and_sync(bench.device)["median"]
    bench.report("submit", figure(each, "us"))
    bench.report("ring_round_trip", figure(trips, "us"), launch_and_sync=peer)


def delta(bench: Bench) -> None:
    """delta_*: a 256 MiB region with a few dirty pages, from the submission to the commit, beside
    scans on the host.
    """
    generator = np.random.default_rng(5)
    data = generator.integers(0, 256, REGION_BYTES, dtype=np.uint8)
    pages = REGION_BYTES // PAGE_BYTES
    found: dict[str, dict[int, float]] = {}
    rows: dict[str, list[float]] = {}
    for name, ctas in (
        ("delta_write_set", 1),
        ("delta_scan_1cta", 1),
        ("delta_scan_4cta", 4),
        ("delta_scan_8cta", 8),
        ("delta_scan_burst", 1),
    ):
        bench.stream.restart()
        checkpointer = Checkpointer(bench.device, bench.stream.target(), lanes=ctas)
        stay(checkpointer.runtime)
        base = bench.device.allocate(REGION_BYTES)
        bench.device.write(base, data.tobytes())
        region = checkpointer.register_pages(base, size=REGION_BYTES, page_bytes=PAGE_BYTES)
        # everything is dirty at first, and more than the pool has at once
        for first in range(0, pages, 8192):
            done = checkpointer.wait(checkpointer.scan_pages(region, first=first, count=8192))
            assert done.result == 8192, done
            bench.stream.refill()
        for dirty in DIRTY:
            times = []
            for turn in range(25):
                chosen = sorted(int(p) for p in generator.choice(pages, dirty, replace=False))
                for page in chosen:
                    bench.device.write(
                        base + page * PAGE_BYTES + 8 * (turn % 500), generator.bytes(8)
                    )
                bench.stream.refill()
                checkpointer.wait(checkpointer.runtime.submit(Task()))
                if name == "delta_write_set":
                    task = checkpointer.pages_task(region, blocks=chosen)
                    spent_us, ticket = bench.time_task(checkpointer, task)
                else:
                    started = time.perf_counter()
                    ticket = checkpointer.scan_pages(region, is_burst=name == "delta_scan_burst")
                    while checkpointer.result(ticket) is None:
                        pass  # the waiter's naps are longer than what is measured
                    spent_us = (time.perf_counter() - started) * 1e6
                times.append(spent_us)
                done = checkpointer.wait(ticket)
                assert done.result == dirty, (name, done, dirty)
            rows[f"{name} {dirty}"] = times[3:]
            found.setdefault(name, {})[dirty] = statistics.median(times[3:])
        checkpointer.close()
        bench.device.free(base)
    host = host_scan(bench, data)
    for name, medians in found.items():
        worst = max(DIRTY, key=lambda n: medians[n])
        print(f"{name}: {medians}")
        bench.report(name, figure(rows[f"{name} {worst}"], "us"), **host)


def host_scan(bench: Bench, data: np.ndarray[Any, Any]) -> dict[str, float]:
    """The same delta found on the host: region copied to pageable memory and compared by one
    thread, in us.
    """
    base = bench.device.allocate(REGION_BYTES)
    bench.device.write(base, data.tobytes())
    shadow = data.copy()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        copy = np.frombuffer(bench.device.read(base, REGION_BYTES), np.uint8)
        dirty = np.flatnonzero(
            (copy.reshape(-1, PAGE_BYTES) != shadow.reshape(-1, PAGE_BYTES)).any(axis=1)
        )
        times.append((time.perf_counter() - started) * 1e6)
        assert len(dirty) == 0
    bench.device.free(base)
    return {"host_scan_pageable_one_thread": round(statistics.median(times), 1)}


PARTS: Final[dict[str, Callable[[Bench], None]]] = {"producer": producer, "delta": delta}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    bench = Bench()
    try:
        for name in options.only:
            PARTS[name](bench)
    finally:
        bench.close()
    add_figures(options.output, bench.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
