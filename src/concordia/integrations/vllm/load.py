"""What a request gets from the journal before a step, and what a piece of its KV is, floor 7.

Owns: the values that name it. Promises: plain and small, so that they travel to every worker. Made
by the restorer, applied by the worker side. Does nothing by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class PieceRef(NamedTuple):
    """A record's payload in the pool, and the tokens it holds."""

    kind: int
    token_start: int
    token_end: int
    pool_offset: int
    payload_bytes: int
    payload_hash: int


class PieceRange(NamedTuple):
    """Tokens of one block, or of whole blocks, and how they are saved."""

    kind: int
    start: int
    end: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """What a request gets from the journal before this step: pieces per rank, written to
    `blocks`.
    """

    request: str
    blocks: tuple[int, ...]  # all blocks of the request, index 0 holds token 0
    first_block: int  # blocks before this one belong to the prefix cache and are not touched
    pieces: dict[int, tuple[PieceRef, ...]]

    @property
    def tokens(self) -> int:
        """Tokens that come back, of the rank that has the most."""
        return max(
            (sum(p.token_end - p.token_start for p in found) for found in self.pieces.values()),
            default=0,
        )
