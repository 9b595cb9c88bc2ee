"""How fast something is taken: lately, and at worst within a minute, floor 3.

Owns: `Pace`, the increase of a count within a window that ends now; `Peak`, the greatest of values
in PEAK_S. Promises: what was seen to happen once is expected again for PEAK_S, since prefills come
in bursts with quiet between them; memory is bounded by the number of changes within a window and of
different values. Called by lending (what one writer takes at once) and the cleaner (what all take
until room comes).
"""

from __future__ import annotations

from collections import deque

from concordia import config


class Peak:
    """The greatest value of the last PEAK_S."""

    def __init__(self) -> None:
        # later ones are smaller: the first is the greatest of all that are not too old
        self._values: deque[tuple[float, int]] = deque()

    def note(self, value: int, now: float) -> int:
        """One more; the greatest with it."""
        while self._values and self._values[-1][1] <= value:
            self._values.pop()
        self._values.append((now, value))
        while self._values[0][0] < now - config.PEAK_S:
            self._values.popleft()
        return self._values[0][1]


class Pace:
    """A count that only grows, looked at now and then."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._looks: deque[tuple[float, int]] = deque()  # when, the count by then

    def note(self, count: int, now: float) -> int:
        """Look; the increase within the window."""
        looks = self._looks
        if len(looks) > 1 and looks[-1][1] == looks[-2][1] == count:
            looks.pop()  # of looks at the same count only the first and the last say something
        looks.append((now, count))
        # the newest from before the window stays: looks may be further apart than it is long
        while len(looks) > 1 and looks[1][0] <= now - self._window_s:
            looks.popleft()
        return count - looks[0][1]
