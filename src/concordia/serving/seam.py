"""Where an answer was cut, and where it goes on.

Owns: the incarnations of one answer, how far the KV of each may be used, and the ids that a
successor is to generate once more. Promises: an id that comes again is compared with the one that
was sent and never sent twice; KV that was computed after an id that differs is never restored.
Called by the flight. Does not know why an answer was cut.
"""

from __future__ import annotations

from collections.abc import Sequence


class EchoDiffers(Exception):
    """A successor generated another id than the one that was sent; `index` is its place in the
    answer.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"the engine generated another token at position {index} of the answer")
        self.index = index


class Seam:
    """The seams of one answer; positions count from the answer's first token, bounds from the
    prompt's.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.incarnation = 0
        # incarnation -> tokens whose KV the next ones may take from it
        self.bounds: dict[int, int] = {}
        self._prompt_tokens = prompt_tokens
        self._echo: int | None = None  # the next id that is to come again

    def go_on(self, *, after: int, known: int) -> None:
        """The next submission goes on after `after` of the `known` ids: the others come again."""
        assert 0 <= after <= known
        if self.incarnation:
            # What it wrote beyond an id that nobody compared may belong to another answer.
            proven = after if self._echo is None else min(after, self._echo)
            self.bounds[self.incarnation] = self._prompt_tokens + proven
        self.incarnation += 1
        self._echo = after if after < known else None

    def take(self, ids: Sequence[int], sent: Sequence[int], *, is_end: bool) -> int:
        """How many of `ids` were sent before. Raises EchoDiffers when one is another, or the answer
        ends before all came again.
        """
        if self._echo is None:
            return 0
        again = 0
        for token in ids:
            if self._echo >= len(sent):
                break
            if token != sent[self._echo]:
                raise EchoDiffers(self._echo)
            self._echo += 1
            again += 1
        if self._echo >= len(sent):
            self._echo = None  # from here on everything is new
        elif is_end:
            raise EchoDiffers(self._echo)
        return again
