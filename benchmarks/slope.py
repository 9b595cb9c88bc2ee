"""What protection costs per decoded token, by the length of the context: cost_slope.

Owns: windows of one request in one running engine, with and without the connector's work, in turn,
at each context; the line through the differences. Promises: both arms ask the same prompt, whose
KV the engine has by then, so that a window is decoding alone; a figure is the median of one slope a
round, with its interval. Called by engine.py.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from typing import Any, Final

from engine_client import Client, Stream
from figures import Figures, slope, with_interval
from rich.console import Console

SKIPPED: Final = 16  # first tokens of a window: the request's own start
KV_BYTES_PER_TOKEN: Final = 128 << 10  # of the 8B shape
console = Console(stderr=True)


def measure_slope(arms: list[Client], options: argparse.Namespace, known: Figures) -> Figures:
    """cost_slope in us per token and 1,024 tokens of context; `known`: figures measured before,
    for the peers that are computed.
    """
    contexts = sorted(set(options.slope_contexts))
    rng = random.Random(options.seed + 2)
    longest = [rng.randrange(1, 250) for _ in range(contexts[-1])]
    prompts = {context: longest[: context - options.tokens] for context in contexts}

    def window(arm: Client, context: int) -> float:
        (stream,) = asyncio.run(arm.ask_all([prompts[context]], options.tokens))
        return us_per_token(stream)

    for context in contexts:  # not counted: prefills, with protection first
        for arm in arms:
            window(arm, context)
        console.log(f"slope: a context of {context} tokens is there")
    rows: list[dict[int, tuple[float, float]]] = []
    for turn in range(options.slope_rounds):
        row = {}
        for context in contexts:
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            spent = {i: window(arms[i], context) for i in order}
            row[context] = spent[0], spent[1]
        rows.append(row)
        console.log(f"slope {turn + 1}/{options.slope_rounds}: {costs(row)} us per token")
    return {"cost_slope": slope_figure(rows, scan_peers(known))}


def us_per_token(stream: Stream) -> float:
    """Mean time between two tokens of a window."""
    stamps = stream.stamps[SKIPPED:]
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1) * 1e6


def costs(row: dict[int, tuple[float, float]]) -> dict[int, float]:
    """Protected less unprotected, by context."""
    return {context: round(pair[0] - pair[1], 2) for context, pair in row.items()}


def slope_figure(
    rows: list[dict[int, tuple[float, float]]], peer: dict[str, float]
) -> dict[str, Any]:
    """A row for each round: context -> microseconds per token with protection and without."""
    slopes = []
    for row in rows:
        found = costs(row)
        slopes.append(slope([context / 1024 for context in found], list(found.values())))
    value = with_interval(slopes, "us/token per Ki tokens")
    low, high = value["interval_95"]
    by_context = {
        str(context): {
            "protected_us": round(statistics.median(row[context][0] for row in rows), 2),
            "unprotected_us": round(statistics.median(row[context][1] for row in rows), 2),
            "cost_us": round(statistics.median(costs(row)[context] for row in rows), 2),
        }
        for context in rows[0]
    }
    flat = {"is_flat": low <= 0 <= high, "by_context": by_context}
    return {**value, **flat, "peer": peer}


def scan_peers(known: Figures) -> dict[str, float]:
    """What each decoded token would cost more for 1,024 tokens of context, if its delta were found
    by scanning all of the request's KV: computed from the scans of 256 MiB in the same file.
    """
    share = 1024 * KV_BYTES_PER_TOKEN / (256 << 20)
    found = {}
    if "delta_scan_burst" in known:
        burst = known["delta_scan_burst"]
        found["computed_device_scan"] = round(burst["median"] * share, 2)
        for name, median in burst["peer"].items():
            found[f"computed_{name}"] = round(median * share, 2)
    return found
