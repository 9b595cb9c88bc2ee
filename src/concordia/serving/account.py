"""What became of one answer's state: what was restored, what was computed again.

Owns: the level that a resumed answer reached, and the tokens behind it. Promises: it is settled
once, for the last submission; a level is never better than the way of drawing allows. Kept by the
flight, settled by the settlement. Asks nobody.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from concordia.serving.need import Level
from concordia.serving.request import Sampler


class OutcomeLike(Protocol):
    """What a connector said of a resumed request."""

    @property
    def level(self) -> Level: ...
    @property
    def restored_tokens(self) -> int: ...
    @property
    def recomputed_tokens(self) -> int: ...


class Account:
    """Of an answer that draws so; None: it does not draw."""

    def __init__(self, draw: Sampler | None) -> None:
        self.level = Level.STATE_EXACT
        self.restored_tokens = 0
        self.recomputed_tokens = 0
        self.is_settled = False
        self.settling = asyncio.Lock()  # held by who finds out what became of its state
        self._draw = draw
        self._is_regenerated = False
        self._resumed_at = 0

    def go_on(self, tokens_known: int, *, regenerates: bool) -> None:
        """The answer is submitted, with so many tokens known."""
        self._resumed_at = tokens_known
        self._is_regenerated |= regenerates

    def settle(self, outcome: OutcomeLike | None) -> None:
        """Note which level the resumed answer reached; without an outcome everything known was
        computed again.
        """
        self.is_settled = True
        self.restored_tokens = 0 if outcome is None else outcome.restored_tokens
        self.recomputed_tokens = self._resumed_at if outcome is None else outcome.recomputed_tokens
        self.level = Level.RE_PREFILL if outcome is None else outcome.level
        if self._is_regenerated:
            self.level = Level.REGENERATE
        elif self._draw is Sampler.GENERATOR:
            self.level = max(self.level, Level.SAMPLER_LOST)
