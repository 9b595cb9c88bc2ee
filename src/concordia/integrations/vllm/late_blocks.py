"""Blocks that decode has filled and that go out whole a little later than the step that filled
them.

Owns: which they are, and how many are due in a step. Promises: what fills in one step is spread
over the following ones, the oldest first, so that no step has many times the bytes of the others;
until a block is sent its tokens are in the journal as tails, so it may as well be dropped. Called
by write_set.py, which decides whether a block is still what it was. It knows no records.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from concordia import config


class Late(NamedTuple):
    """One block of one life of a request."""

    request: str
    incarnation: int
    at: int  # index of the block
    block: int


class LateBlocks:
    """All that wait, of one engine."""

    def __init__(self, *, block_tokens: int) -> None:
        self.is_on = False  # else a block's last token goes out as the whole block anyway
        self._steps = max(1, int(block_tokens * config.LATE_BLOCKS_PART))
        self._waiting: deque[Late] = deque()
        self._due = 0
        self._room = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self) -> None:
        """A step begins: so many of those that wait are due in it, and so many may go at once."""
        waiting, least = len(self._waiting), config.FULL_BLOCKS_AT_ONCE
        self._due = min(waiting, max(least, -(-waiting // self._steps)))
        self._room = max(0, least - self._due)

    def takes_more(self) -> bool:
        """Whether a block that fills now has to wait; one that has not is counted."""
        if not self.is_on:
            return False
        if self._room:
            self._room -= 1
            return False
        return True

    def put(self, late: Late) -> None:
        """It waits."""
        self._waiting.append(late)

    def due(self) -> Iterator[Late]:
        """Those of this step, the oldest first; one that cannot go now is `put` again."""
        for _ in range(self._due):
            yield self._waiting.popleft()
