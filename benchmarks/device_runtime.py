"""The device runtime beside what the hardware allows and what else there is, on one GPU.

Each part measures figures of the table in docs/benchmarks.md, with their peers in the same run, and
adds them to one result file (benchmarks/results/device_runtime_h200.json), so that parts can be run
alone. All of it takes a minute and a half. A figure that is not reached is written down like one
that is.

  memory    protection_bytes, protection_bytes_pages: GPU memory of protection
  producer  submit, ring_round_trip
  delta     delta_write_set, delta_scan_*: beside scans on the host
  append    append_bandwidth, by 1, 4 and 8 CTAs: beside the copy engine
  restore   restore_bandwidth, 8 GiB in pieces of 2 MiB and 64 KiB: beside the driver's copies
  swap      hot_swap_pause: beside a restart of the kernel

Needs an NVIDIA GPU with 20 GiB free, 12 GiB of /dev/shm and of memory that may be registered.
What a real engine pays is measured by engine.py, plots are drawn by plot.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final

from bench import Bench, stay
from delta import delta
from figures import RESULTS, figure, save
from footprint import footprint
from peers import launch_and_sync
from swap import hot_swap
from transfer import append, restore

from concordia.checkpoint.checkpointer import Checkpointer
from concordia.runtime.ring import Task
from concordia.testing.command import Parser, result_file, run_command

BURST: Final = 32  # submissions between two readings of the clock, which itself takes 20 ns


def producer(bench: Bench) -> None:
    """submit, ring_round_trip: a producer in a native loop, beside launch and synchronisation."""
    bench.say("submissions and round trips")
    checkpointer = Checkpointer(bench.device, None, lanes=1)
    runtime = checkpointer.runtime
    stay(runtime)
    each, trips = [], []
    for _ in range(300):
        runtime.wait(runtime.submit(Task()))  # the executor is inside now
        each.append(bench.loops.submit_ns(runtime.ring.address, BURST) / BURST / 1000)
        runtime.drain()
    for _ in range(100):
        runtime.wait(runtime.submit(Task()))
        found = bench.loops.round_trip_ns(runtime.ring.address, 20)
        trips += [ns / 1000 for ns in (found or [])[1:]]
    checkpointer.close()
    bench.report("submit", figure(each, "us"), peer={})
    peer = {"launch_and_sync": launch_and_sync(bench.device)["median"]}
    bench.report("ring_round_trip", figure(trips, "us"), peer=peer)


PARTS: Final[dict[str, Callable[[Bench], None]]] = {
    "memory": footprint,
    "producer": producer,
    "delta": delta,
    "append": append,
    "restore": restore,
    "swap": hot_swap,
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options; exits with 2 where they are wrong."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="PART", choices=list(PARTS), default=list(PARTS),
        help=f"parts to run: {', '.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=result_file("figures"), default=RESULTS, help="the result file"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    bench = Bench()
    try:
        for name in PARTS:
            if name in options.only:
                PARTS[name](bench)
                save(options.output, bench.figures)  # a later part may fail
    finally:
        bench.close()
    bench.say(f"{len(bench.figures)} figures are in {options.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
