"""How soon answers go on after their engine is killed, and where the time went.

Owns: recovery_next_token: kill rounds of one running server, once with restore and once without,
which is the peer, and the phases that server and engine tell of each. Promises: clocks start at the
kill; phases of the server add up from the kill to the last answer's next token; those of the
engine, `engine_`, lie within them. Called by engine.py.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from engine_client import Client, Stream, make_prompts
from figures import Figures, figure
from rich.console import Console

from concordia.errors import ConcordiaError
from concordia.testing.fault_plan import Target, find_target
from concordia.testing.served import Served

START_TIMEOUT_S: Final = 300.0
TOLD_TIMEOUT_S: Final = 10.0  # a router reads the events of engines every second
console = Console(stderr=True)


def measure_recovery(served: Served, options: argparse.Namespace) -> Iterator[Figures]:
    """recovery_next_token, with its phases, beside the same kill without restore; after each round
    what all rounds so far say.
    """
    rng = random.Random(options.seed + 1)
    pauses: dict[bool, list[float]] = {True: [], False: []}
    phases: list[dict[str, float]] = []
    for round_number in range(options.kills):
        for restore in (True, False):
            served.wait_ready(timeout_s=START_TIMEOUT_S, standbys=1)
            failed = served.active()
            found, killed = asyncio.run(break_once(served, failed, options, rng, restore=restore))
            pauses[restore] += found
            console.log(
                f"kill {round_number + 1}/{options.kills}, next token with"
                f"{'' if restore else 'out'} restore: median {statistics.median(found):.3f} s, "
                f"last {max(found):.3f} s"
            )
            if restore:
                phases.append(told_phases(served, failed["incarnation"], killed))
                console.log(in_ms(phases[-1]))
        yield {
            "recovery_next_token": {
                **figure(pauses[True], "s", digits=4),
                "max": round(max(pauses[True]), 4),
                "kills": round_number + 1,
                "phases": median_phases(phases),
                "peer": {"recompute": round(statistics.median(pauses[False]), 4)},
            }
        }


async def break_once(
    served: Served,
    failed: Mapping[str, Any],
    options: argparse.Namespace,
    rng: random.Random,
    *,
    restore: bool,
) -> tuple[list[float], float]:
    """Seconds from the kill to the next token of each answer, and when that was (monotonic)."""
    victim = find_target(failed["session_id"], Target.ENGINE_CORE)
    client = Client(served.url, "bench", {"concordia": {"restore": restore}})
    streams = [Stream() for _ in range(options.requests)]
    prompts = make_prompts(options.requests, options.context, rng)
    asking = asyncio.create_task(client.ask_all(prompts, options.tokens, streams))
    while min(len(s.ids) for s in streams) < options.tokens // 4:
        if asking.done():
            asking.result()
            raise ConcordiaError("the answers ended before the kill")
        await asyncio.sleep(0.005)
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    await asking
    # What was on its way when the engine died may still have come: the pause is the longest gap.
    pauses = []
    for stream in streams:
        gaps = zip(stream.stamps, stream.stamps[1:], strict=False)
        _, after = max((b - a, b) for a, b in gaps if b > killed)
        pauses.append(after - killed)
    return pauses, killed


def told_phases(served: Served, incarnation: int, killed: float) -> dict[str, float]:
    """What server and engine say of this failover; raises ConcordiaError when they do not."""
    until = time.monotonic() + TOLD_TIMEOUT_S
    while True:
        found = phases_of((served.status() or {}).get("recoveries", []), incarnation, killed)
        if found is not None:
            return found
        if time.monotonic() >= until:
            raise ConcordiaError(f"nobody said where the time went within {TOLD_TIMEOUT_S:.0f} s")


def phases_of(
    recoveries: Sequence[Mapping[str, Any]], incarnation: int, killed: float
) -> dict[str, float] | None:
    """Seconds by phase of the failover of this replica; None while a part of it is missing."""
    server = next((r for r in recoveries if r.get("failed") == incarnation), None)
    # the router names a recovery's cohort by who failed
    cohorts = (r for r in recoveries if str(r.get("cohort")).startswith(f"{incarnation:x}-"))
    engine = next(cohorts, None)
    if server is None or engine is None:
        return None
    return {
        "detect": server["detected_ns"] / 1e9 - killed,
        **server["phases"],
        **{f"engine_{name}": seconds for name, seconds in engine["phases"].items()},
        "engine_cut_max": engine["cut_s_max"],
        "engine_verify_max": engine["verify_s_max"],
        "engine_pool_mapped": float(engine["is_mapped"]),
    }


def median_phases(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each phase that some round had."""
    names = dict.fromkeys(name for found in rounds for name in found)
    return {
        name: round(statistics.median(found[name] for found in rounds if name in found), 4)
        for name in names
    }


def in_ms(phases: Mapping[str, float]) -> str:
    """For people."""
    return ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in phases.items()) + " ms"
