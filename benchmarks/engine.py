"""What protection costs a real engine on a GPU, and how soon its answers go on after it is killed.

A Llama-3.1-8B-shaped model with dummy weights by default, and figures that add up in
benchmarks/results/device_runtime_h200.json, where --output does not say otherwise:

  cost      decode_ratio, decode_p99_ratio, prefill_ratio: past the router within one engine, with
            and without the connector's work for each request, in turn; each pair gives one ratio
  slope     cost_slope: the same difference per decoded token of one request, by its context
  recovery  recovery_next_token: SIGKILL of the engine, once with restore and once without, the
            peer; `phases` says where the time went, by the server's and the engine's own words
  peer      copy_*_ratio, peers of the first three: an engine with benchmarks/copy_connector.py,
            which copies each step's blocks by cudaMemcpyAsync, likewise
  driver    driver_checkpoint, driver_restore, peers of recovery: the driver's own checkpoint of a
            process that holds 16 GiB

Needs vLLM for GPUs. Minutes for each part; the start of an engine is one of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Final

from copy_engine import CopyEngine
from cost import arms_of
from engine_client import Client, Stream, make_prompts
from figures import RESULTS, Figures, figure, joined, read_figures, save, with_interval
from recovery import START_TIMEOUT_S, measure_recovery
from rich.console import Console
from slope import SKIPPED, measure_slope

from concordia.device.cuda import CudaDevice
from concordia.errors import ConcordiaError
from concordia.testing.command import Parser, count, result_file, run_command
from concordia.testing.model import SHAPES, make_skeleton
from concordia.testing.served import Served

PARTS: Final = ("cost", "slope", "recovery", "peer", "driver")
SAME_STEP_S: Final = 0.002  # gaps that begin within this are of one step
console = Console(stderr=True)


def decode_figures(streams: list[Stream]) -> tuple[float, float]:
    """Tokens per second while all of them decode, and the 99th percentile of the time between two
    tokens of one stream in that window, in seconds.
    """
    opened, gaps = gaps_of(streams)
    closed = min(s.stamps[-1] for s in streams)
    tokens = sum(opened < stamp <= closed for s in streams for stamp in s.stamps)
    return tokens / (closed - opened), gaps[math.ceil(0.99 * len(gaps)) - 1][0]


def gaps_of(streams: list[Stream]) -> tuple[float, list[tuple[float, float]]]:
    """When all of them decode, and from then on the times between two tokens of one stream, the
    shortest first, each with when it began.
    """
    opened = max(s.stamps[0] for s in streams)
    pairs = ((a, b) for s in streams for a, b in zip(s.stamps, s.stamps[1:], strict=False))
    return opened, sorted((b - a, a) for a, b in pairs if a >= opened)


def slowest_steps(streams: list[Stream], most: int = 4) -> str:
    """For people: when in the window of decode_figures the longest gaps began, how long they were,
    and how many streams had them at once.
    """
    opened, gaps = gaps_of(streams)
    steps: list[list[float]] = []
    for gap, began in reversed(gaps):
        at = began - opened
        step = next((one for one in steps if abs(one[1] - at) < SAME_STEP_S), None)
        if step is not None:
            step[2] += 1
        elif len(steps) < most:
            steps.append([gap, at, 1])
    return ", ".join(f"{gap * 1e3:.1f} ms x{n:.0f} at {at:.2f} s" for gap, at, n in steps)


def measure_cost(arms: list[Client], options: argparse.Namespace) -> Figures:
    """decode_ratio, decode_p99_ratio, prefill_ratio: of the first arm over the second."""
    rng = random.Random(options.seed)
    speeds: list[float] = []
    tails: list[float] = []
    prefills: list[float] = []

    def decode(arm: Client) -> tuple[float, float, str]:
        prompts = make_prompts(options.requests, options.context, rng)
        streams = asyncio.run(arm.ask_all(prompts, options.tokens))
        return *decode_figures(streams), slowest_steps(streams)

    def prefill(arm: Client) -> float:
        (stream,) = asyncio.run(arm.ask_all(make_prompts(1, options.prefill, rng), 1))
        return stream.stamps[0] - stream.started

    for arm in arms:  # not counted
        decode(arm)
        prefill(arm)
    for pair in range(options.pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        found = {i: decode(arms[i]) for i in order}
        speeds.append(found[0][0] / found[1][0])
        tails.append(found[0][1] / found[1][1])
        console.log(
            f"decode {pair + 1}/{options.pairs}: {found[0][0]:.0f} against {found[1][0]:.0f} "
            f"tokens/s, p99 {found[0][1] * 1e3:.2f} against {found[1][1] * 1e3:.2f} ms"
        )
        console.log(f"slowest: {found[0][2]}; against {found[1][2]}")
    for pair in range(2 * options.pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        spent = {i: prefill(arms[i]) for i in order}
        prefills.append(spent[1] / spent[0])
    console.log(f"prefill of {options.prefill} tokens: {spent[0]:.3f} against {spent[1]:.3f} s")
    return {
        "decode_ratio": with_interval(speeds, "ratio"),
        "decode_p99_ratio": with_interval(tails, "ratio"),
        "prefill_ratio": with_interval(prefills, "ratio"),
    }


def save_cost(options: argparse.Namespace, found: Figures) -> None:
    """Write ratios down, with --add joined with those of earlier engines."""
    known = read_figures(options.output) if options.add else {}
    save(options.output, joined(found, known))


def measure_driver(timeout_s: float = 180.0) -> Figures:
    """driver_checkpoint, driver_restore: of a process that holds 16 GiB, and does nothing else."""
    script = pathlib.Path(__file__).parent / "driver_checkpoint.py"
    child = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, _ = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise ConcordiaError(f"no checkpoint by the driver within {timeout_s:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with the process that it held
    if child.returncode:
        raise ConcordiaError("the driver does not checkpoint processes here; its reason is above")
    return {
        f"driver_{name}": {**figure(seconds, "s"), "held_gib": 16, "peer": {}}
        for name, seconds in json.loads(said).items()
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options; exits with 2 where they are wrong."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", metavar="PART", choices=PARTS, default=["cost"], help="see above")
    add("--shape", default="8b", choices=list(SHAPES))
    add("--requests", type=count, default=32)
    add("--context", type=count, default=2048, help="tokens of each prompt")
    add("--tokens", type=count, default=192, help="tokens of each answer")
    add("--prefill", type=count, default=8192, help="tokens of the long prompt")
    add("--pairs", type=count, default=20, help="of windows, one for each arm")
    add("--kills", type=count, default=1, help="recovery: of each kind")
    add("--add", action="store_true", help="cost, peer: to the ratios that the result file has")
    add(
        "--slope-contexts",
        type=count,
        nargs="+",
        default=[1024, 8192, 32768, 131072],
        metavar="TOKENS",
        help="of prompt and answer together; 128 KiB of KV each for 8b",
    )
    add("--slope-rounds", type=count, default=8, help="of one pair of windows at each context")
    add("--seed", type=int, default=11)
    add("--executor-ctas", type=count, default=1, help="of the engines; their default is 1")
    add("--kv-cache", help="bytes of each engine; 12 GiB, 20 GiB with slope")
    add("--folder", type=pathlib.Path, default=pathlib.Path("bench-output"))
    add("--output", type=result_file("figures"), default=RESULTS, help="the result file")
    add("engine_flags", nargs="*", help="after --: to vLLM")
    options = parser.parse_args(arguments)
    if min(options.slope_contexts) <= options.tokens or len(set(options.slope_contexts)) < 2:
        parser.error("--slope-contexts: at least two, each longer than --tokens")
    if "slope" in options.only and options.tokens < 2 * SKIPPED:
        parser.error(
            f"--tokens: at least {2 * SKIPPED} for slope, whose first {SKIPPED} are left out"
        )
    options.kv_cache = options.kv_cache or str((20 if "slope" in options.only else 12) << 30)
    return options


def engine_flags(options: argparse.Namespace) -> list[str]:
    """What every engine here is started with."""
    longest = options.prefill + 512
    if "slope" in options.only:
        longest = max(longest, *options.slope_contexts)
    return [
        *("--served-model-name", "bench", "--load-format", "dummy", "--dtype", "bfloat16"),
        *("--max-model-len", str(longest), "--max-num-seqs", str(options.requests)),
        *("--kv-cache-memory-bytes", options.kv_cache),
    ]


def measure_served(model: pathlib.Path, options: argparse.Namespace) -> None:
    """The parts that need a server with protection; each is written down when it is done."""
    # Standbys that load take cores: all is measured when they are there.
    standbys = 2 if "recovery" in options.only else 0
    flags = [
        *("--replicas", "1", "--standby", str(standbys), *engine_flags(options)),
        *("--executor-ctas", str(options.executor_ctas)),
        *("--journal-dir", f"/dev/shm/concordia-bench-{time.time_ns()}"),
        *("--", *options.engine_flags),
    ]
    with Served(model, flags, log=options.folder / "engine.log") as served:
        with console.status("starting the engines"):
            served.wait_ready(timeout_s=START_TIMEOUT_S)
            served.wait_ready(timeout_s=START_TIMEOUT_S, standbys=standbys)
        arms = [Client.of(arm) for arm in arms_of(served)]
        if "cost" in options.only:
            save_cost(options, measure_cost(arms, options))
        if "slope" in options.only:
            save(options.output, measure_slope(arms, options, read_figures(options.output)))
        if "recovery" in options.only:
            for found in measure_recovery(served, options):
                save(options.output, found)


def measure_peer(model: pathlib.Path, options: argparse.Namespace) -> None:
    """copy_*_ratio: the figures of cost, in an engine that copies each step's blocks."""
    flags = [*engine_flags(options), *options.engine_flags]
    log = options.folder / "copy-engine.log"
    with CopyEngine(model, flags, log=log) as engine, console.status("the copying engine"):
        engine.wait_ready(START_TIMEOUT_S)
        arms = [Client.of(arm) for arm in engine.arms()]
        found = measure_cost(arms, options)
    save_cost(options, {f"copy_{key}": value for key, value in found.items()})


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    CudaDevice(0).close()  # refuses where there is none, before an engine starts
    model = options.folder / f"model-{options.shape}"
    make_skeleton(model, shape=options.shape)
    failed = 0
    for parts, measure in (
        ({"cost", "slope", "recovery"}, measure_served),
        ({"peer"}, measure_peer),
        ({"driver"}, lambda *_: save(options.output, measure_driver())),
    ):
        try:
            if parts & set(options.only):
                measure(model, options)
        except ConcordiaError as error:  # what the others find is not lost
            console.log(f"{' '.join(sorted(parts & set(options.only)))}: {error}")
            failed = 1
    print(json.dumps(read_figures(options.output)))
    return failed


if __name__ == "__main__":
    run_command(main)
