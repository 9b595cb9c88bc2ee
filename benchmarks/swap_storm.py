"""1,000 hot swaps under 1,000,000 tasks: none lost, none run twice, and what a swap took.

Every task counts itself on the device; the verdict is read from there. On any device, `--device
host` included; with `--output` the figures go into that result file, beside those of other parts.
Ends with 1 when a task went astray, within `--within` seconds in any case.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from concordia.device.driver import open_device
from concordia.runtime.executor import Runtime
from concordia.testing.command import Parser, count, result_file, run_command
from concordia.testing.machine import add_figures
from concordia.testing.swap_storm import StormVerdict, SwapStorm
from gpu import figure


def storm_figures(verdict: StormVerdict, seed: int) -> dict[str, dict[str, Any]]:
    """A verdict as entries of a result file."""
    peer: dict[str, dict[str, float]] = {"peer": {}}
    found = {
        f"swap_storm_{name}": figure([getattr(verdict, name)], "tasks")
        | {"n": verdict.tasks}
        | peer
        for name in ("lost", "repeated", "out_of_order", "wrong_code")
    }
    swap = figure(list(verdict.swap_ms), "ms") | peer
    found["swap_storm_swap"] = swap | {
        "max": round(max(verdict.swap_ms), 3),
        "seconds": round(verdict.seconds, 1),
        "generations_seen": verdict.generations_seen,
        "seed": seed,
    }
    return found


@contextmanager
def opened(device: str, lanes: int) -> Iterator[Runtime]:
    """A runtime on this device; a storm that failed leaves both to the end of the process."""
    found = open_device(device)
    runtime = Runtime(found, lanes=lanes)
    yield runtime
    runtime.close()
    found.close()


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, host, cuda or cuda:<index>")
    parser.add_argument("--lanes", type=count, default=1, help="threads, or CTAs on a GPU")
    parser.add_argument("--tasks", type=count, default=1_000_000)
    parser.add_argument("--swaps", type=count, default=1_000)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--within", type=float, default=90.0, help="seconds")
    parser.add_argument("--output", type=result_file("figures"))
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}", flush=True)
    with opened(options.device, options.lanes) as runtime:
        name = runtime.device.name
        storm = SwapStorm(
            runtime,
            tasks=options.tasks,
            swaps=options.swaps,
            seed=options.seed,
            within_s=options.within,
        )
        verdict = storm.run()
    figures = storm_figures(verdict, options.seed)
    for key, value in figures.items():
        print(f"{key:24} {value['median']:10} {value['unit']} (n {value['n']})")
    print(
        f"{name}: {verdict.tasks} tasks, {verdict.swaps} swaps, {verdict.generations_seen} "
        f"generations seen, {verdict.seconds:.1f} s"
    )
    if options.output is not None:
        add_figures(options.output, figures)
    return 0 if verdict.is_clean else 1


if __name__ == "__main__":
    run_command(main)
