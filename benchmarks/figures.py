"""What a measurement becomes: median, spread, interval, and its place in a result file.

Owns: the form of a figure, `{"median", "min", "p95", "unit", "n", "peer": {name: median}}`, and
which figures are peers of others. Called by every benchmark. Measures nothing.
"""

from __future__ import annotations

import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

from concordia.testing.machine import add_figures

RESULTS: Final = pathlib.Path(__file__).parent / "results" / "device_runtime_h200.json"
Figures = dict[str, dict[str, Any]]

# Peers that are measured by a part of their own: figure -> {peer's name: the figure it is}.
PEER_FIGURES: Final[dict[str, dict[str, str]]] = {
    "decode_ratio": {"copy_of_each_step": "copy_decode_ratio"},
    "decode_p99_ratio": {"copy_of_each_step": "copy_decode_p99_ratio"},
    "prefill_ratio": {"copy_of_each_step": "copy_prefill_ratio"},
    "recovery_next_token": {
        "driver_checkpoint": "driver_checkpoint",
        "driver_restore": "driver_restore",
    },
}


def figure(values: list[float], unit: str, *, digits: int = 3) -> dict[str, Any]:
    """Median and spread of one measurement."""
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), digits),
        "min": round(ordered[0], digits),
        "p95": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))], digits),
        "unit": unit,
        "n": len(ordered),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the median from order statistics (binomial), no distribution assumed."""
    ordered = sorted(values)
    n = len(ordered)
    outside = 0.0
    for k in range(n // 2 + 1):
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 0.05:
            return ordered[max(0, k - 1)], ordered[min(n - 1, n - k)]
    return ordered[0], ordered[-1]


def with_interval(values: list[float], unit: str, *, digits: int = 4) -> dict[str, Any]:
    """A figure with the 95 % interval of its median, and its values, which later ones may join."""
    low, high = interval(values)
    return {
        **figure(values, unit, digits=digits),
        "interval_95": [round(low, digits), round(high, digits)],
        "values": [round(value, digits) for value in values],
        "peer": {},
    }


def joined(figures: Figures, known: Figures) -> Figures:
    """Figures with an interval, of their own values and of those that were found earlier."""
    found = dict(figures)
    for key in figures.keys() & known.keys():
        values = [*known[key].get("values", []), *figures[key].get("values", [])]
        if values:
            found[key] = {**figures[key], **with_interval(values, figures[key]["unit"])}
    return found


def slope(xs: list[float], ys: list[float]) -> float:
    """Of the line through these points that has the least squares."""
    return statistics.linear_regression(xs, ys).slope


def us(seconds: list[float]) -> dict[str, Any]:
    return figure([s * 1e6 for s in seconds], "us")


def gb_per_s(size: int, seconds: list[float]) -> dict[str, Any]:
    """`size` bytes in each of these times; GB are 10^9 bytes."""
    return figure([size / s / 1e9 for s in seconds], "GB/s")


def timed(count: int, call: Callable[[], Any]) -> list[float]:
    """Seconds of each of `count` calls, after a tenth as many to warm up."""
    for _ in range(max(3, count // 10)):
        call()
    found = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return found


def read_figures(path: pathlib.Path) -> Figures:
    """What a result file has; nothing where there is none."""
    if not path.exists():
        return {}
    found: Figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return found


def save(path: pathlib.Path, figures: Figures) -> None:
    """Put figures beside those that the file has, and name in each the peers that have figures of
    their own.
    """
    known = {**read_figures(path), **figures}
    for key, peers in PEER_FIGURES.items():
        if key in known:
            found = {name: known[peer]["median"] for name, peer in peers.items() if peer in known}
            known[key] = {**known[key], "peer": {**known[key]["peer"], **found}}
    add_figures(path, known)
