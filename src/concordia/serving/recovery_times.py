"""Where the time of one failover went, floor 6.

Owns: the moments of one failover, from the fault being noticed to the last answer's next token, and
which answers still wait for theirs. Promises: it is told once, when none waits any more; phases
follow each other without gaps, so they add up to the whole; what never happened has no phase. Made
by the fault desk for each cohort; marked by the cohort and the router. It waits for nobody and
decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

# phase, and the moment that ends it; each begins where the one before ended
_PHASES: Final = (
    ("seal", "sealed"),
    ("strike", "struck"),
    ("promote", "replaced"),
    ("hand_over", "known"),
    ("count", "counted"),
    ("submit", "moved"),
    ("first_token", "first"),
    ("last_token", "last"),
)
PHASES: Final = tuple(phase for phase, _ in _PHASES)


class RecoveryTimes:
    """Of one cohort. Names of flights stand for them."""

    def __init__(
        self, detected_ns: int, *, tell: Callable[[Mapping[str, float], int], None]
    ) -> None:
        self._detected_ns = detected_ns
        self._tell = tell
        self._moments: dict[str, float] = {}
        self._waiting: set[str] = set()
        self._resumed_count = 0

    def mark(self, moment: str) -> None:
        """It is now; a later one of the same name counts."""
        self._moments[moment] = (time.monotonic_ns() - self._detected_ns) / 1e9

    def note(self, moments: Mapping[str, float]) -> None:
        """Moments that others saw, in seconds since the fault was noticed."""
        self._moments.update(moments)

    def expect(self, flight: str) -> None:
        """This answer's next token is waited for."""
        self._waiting.add(flight)

    def resumed(self, flight: str) -> None:
        """Its next token is here."""
        if flight not in self._waiting:
            return
        self._resumed_count += 1
        if "first" not in self._moments:
            self.mark("first")
        self.mark("last")
        self.gone(flight)

    def gone(self, flight: str) -> None:
        """It is not waited for any more."""
        if flight in self._waiting:
            self._waiting.remove(flight)
            if not self._waiting and self._resumed_count:
                self._tell(self.phases(), self._resumed_count)

    def phases(self) -> dict[str, float]:
        """Seconds of each, in their order."""
        found, before = {}, 0.0
        for phase, moment in _PHASES:
            at = self._moments.get(moment)
            if at is not None:
                found[phase] = max(0.0, at - before)
                before = max(before, at)
        return found


def in_words(phases: Mapping[str, float]) -> str:
    """For a log."""
    parts = [f"{name} {1000 * seconds:.0f} ms" for name, seconds in phases.items()]
    return ", ".join([*parts, f"{sum(phases.values()):.3f} s in all"])
