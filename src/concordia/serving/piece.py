"""What one upstream event adds to an answer.

Owns: `Piece`, and reading an engine's log-probabilities. Promises: tokens are ids; a piece says
where in its answer it begins, so pieces of one answer can be joined. Made by the flight, written by
openai_format.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Log-probabilities of one position: of the drawn token (None where vLLM has none), and the
# alternatives in vLLM's order.
TokenLogprobs = tuple[float | None, Sequence[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one upstream event adds to one answer; `start` is the index of ids[0] within the
    answer.
    """

    index: int
    text: str
    start: int
    ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: str | int | None
    is_first: bool


def joined(pieces: Sequence[Piece], *, has_logprobs: bool) -> Piece:
    """All pieces of an answer as one; `has_logprobs`: whether it was asked for with them."""
    rows = [row for piece in pieces for row in piece.logprobs or ()]
    last = pieces[-1]
    return Piece(
        last.index,
        "".join(piece.text for piece in pieces),
        0,
        [token for piece in pieces for token in piece.ids],
        rows if has_logprobs else None,
        last.finish_reason,
        last.stop_reason,
        True,
    )


def read_logprobs(found: Mapping[str, Any]) -> list[TokenLogprobs]:
    """vLLM's completion log-probabilities, asked for with tokens named by id."""
    rows: list[TokenLogprobs] = []
    for logprob, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        alternatives = [(int(name[9:]), value) for name, value in (top or {}).items()]
        rows.append((logprob, alternatives))
    return rows
