"""What the figures should be: the one table of goals, limits and what others publish.

Owns: GOALS. Promises: nothing here was measured by us but the limits of the hardware, which come
from small programs on the same kind of machine. Read by plot.py and by the test that holds
docs/benchmarks.md to the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the table; `limit` and `paper` are in the figure's unit."""

    key: str
    what: str  # as a plot names it
    meaning: str  # as the page says it
    must: float
    unit: str
    is_most: bool = True  # False: the figure must be above `must`
    limit: float | None = None
    paper: float | None = None

    def is_met(self, median: float) -> bool:
        """Whether a figure with this median reaches it."""
        return median < self.must if self.is_most else median > self.must


GOALS: Final = (
    Goal("submit", "hand a task in", "a task handed in by a native producer", 0.1, "us",
        paper=0.1),
    Goal("ring_round_trip", "empty task and answer", "an empty task until its answer is read", 6,
        "us"),
    Goal("delta_write_set", "delta, pages known",
        "1, 8 or 32 known pages of 4 KiB of 256 MiB, to their commit, the worst of them", 20, "us",
        paper=560),
    Goal("delta_scan_burst", "delta, scan as a burst",
        "the same pages, found by a burst over all multiprocessors", 150, "us", limit=58,
        paper=560),
    Goal("delta_scan_4cta", "delta, scan by 4 CTAs",
        "the same pages, found by four CTAs of the executor", 650, "us", limit=58, paper=560),
    Goal("append_bandwidth", "append", "KV blocks of 2 MiB (32 pieces each) to their commit", 50,
        "GB/s", is_most=False, limit=52),
    Goal("restore_bandwidth", "restore",
        "8 GiB of such records into scattered pieces of 2 MiB and 64 KiB, hashed in place", 48,
        "GB/s", is_most=False, limit=55),
    Goal("hot_swap_pause", "hot swap",
        "from the last answer of the old handler to the first of the new", 120, "us", limit=91),
    Goal("decode_ratio", "decode throughput",
        "decode of an 8B-shaped engine, 32 requests of 2K tokens, protected / unprotected", 0.99,
        "ratio", is_most=False, limit=1, paper=0.96),
    Goal("decode_p99_ratio", "p99 between tokens", "the 99th percentile between two of its tokens",
        1.02, "ratio", limit=1),
    Goal("prefill_ratio", "prefill of 8K tokens", "its prefill of 8K tokens", 0.98, "ratio",
        is_most=False, limit=1),
    Goal("recovery_next_token", "kill to next token",
        "from SIGKILL of that engine to the next token of its 32 answers", 1, "s", limit=0.16,
        paper=1.5),
    Goal("protection_bytes", "GPU memory, KV", "GPU memory of protection, of 12 GiB of KV", 0.005,
        "ratio"),
    Goal("protection_bytes_pages", "GPU memory, pages", "the same, of 256 MiB of pages", 0.005,
        "ratio"),
)  # fmt: skip
BY_KEY: Final = {goal.key: goal for goal in GOALS}
# Flat is no number to stay below: its interval must hold 0.
SLOPE_KEY: Final = "cost_slope"
SLOPE_MEANING: Final = "what a decoded token costs more for 1,024 tokens of context"
KEYS: Final = (*BY_KEY, SLOPE_KEY)
