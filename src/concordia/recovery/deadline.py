"""How long a step of an engine may take, learned from the steps it took, floor 5.

Owns: the robust fit of step time over tokens, per replica. Promises: a deadline is never below
STEP_DEADLINE_MIN_S, and stays at the generous STEP_DEADLINE_UNLEARNED_S for sizes that nothing
comparable was seen of; one slow or fast outlier does not move it. Called by the detector. It reads
no clock and knows no process.
"""

from __future__ import annotations

import statistics
from collections import deque

from concordia import config


class StepDeadline:
    """Time of a step as a + b x tokens, from medians per power of two of the token count.

    A least-squares line would follow every starved step; and a median of slopes would undercut long
    prefills, whose attention grows faster than their length. So `a` is the median of the smallest
    steps and `b` the steepest slope from there to any size seen.
    """

    def __init__(self) -> None:
        self._bins: dict[int, deque[tuple[int, float]]] = {}
        self._count = 0

    def learn(self, tokens: int, duration_s: float) -> None:
        """Take one finished step into account."""
        if tokens <= 0 or duration_s <= 0:
            return
        place = tokens.bit_length()
        self._bins.setdefault(place, deque(maxlen=config.STEP_SAMPLES_PER_BIN)).append(
            (tokens, duration_s)
        )
        self._count += 1

    def expected_s(self, tokens: int) -> float | None:
        """What a step of this size takes, or None while nothing comparable was seen."""
        points = self._points()
        if self._count < config.STEP_SAMPLES_MIN or not points:
            return None
        largest = points[-1][0]
        if tokens > largest * config.STEP_EXTRAPOLATION_MAX:
            return None
        base_tokens, base_s = points[0]
        slopes = [(s - base_s) / (t - base_tokens) for t, s in points[1:] if t > base_tokens]
        slope = max([0.0, *slopes])
        return base_s + slope * max(0.0, tokens - base_tokens)

    def deadline_s(self, tokens: int) -> float:
        """When a step of this size is overdue, in seconds after its start."""
        expected = self.expected_s(tokens)
        if expected is None:
            return config.STEP_DEADLINE_UNLEARNED_S
        return max(config.STEP_DEADLINE_MIN_S, config.STEP_DEADLINE_FACTOR * expected)

    def longest_s(self) -> float:
        """The deadline of the largest step that was seen often enough; generous while there is
        none.
        """
        points = self._points()
        return self.deadline_s(int(points[-1][0])) if points else config.STEP_DEADLINE_UNLEARNED_S

    def _points(self) -> list[tuple[float, float]]:
        """Median (tokens, seconds) of every size that was seen often enough, smallest first."""
        found = []
        for place in sorted(self._bins):
            entries = self._bins[place]
            if len(entries) >= config.STEP_SAMPLES_BIN_MIN:
                found.append(
                    (
                        float(statistics.median(t for t, _ in entries)),
                        statistics.median(s for _, s in entries),
                    )
                )
        return found
