"""Whose launches had more marked than they write, floor 7.

Owns: the counts that native/unseen.c writes at the end of a process, by kernel and reason, of all
processes of a run. Promises: the most frequent come first, and their number is bounded. Called by
coverage. It does not say whom to trust.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from concordia import config

HEAD: Final = ("LAUNCHES", "MARKED", "KERNEL")


@dataclass(frozen=True, slots=True)
class Unseen:
    """A kernel, by the begin of its name, and why what it writes is not known to a page."""

    kernel: str
    why: str
    count: int  # of launches; of nodes, for graphs

    def as_json(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "why": self.why, "count": self.count}

    def cells(self, name: str) -> tuple[str, str, str]:
        """A row under HEAD."""
        return str(self.count), self.why, name


class UnseenCounts:
    """Adds up what the processes of a run say."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, kernel: str, why: str, count: int) -> None:
        self._counts[kernel, why] += count

    def rows(self) -> tuple[Unseen, ...]:
        """The most frequent."""
        found = self._counts.most_common(config.PROGRAM_UNSEEN_MAX)
        return tuple(Unseen(kernel, why, count) for (kernel, why), count in found)
