"""From the journal into the engine's blocks.

Owns: which bytes of the pool belong into which blocks. Promises: blocks of the engine's prefix
cache are never written; a piece counts only if the engine's own bytes, hashed in place, are what
its record promised; the wait is bounded. Called by the worker side before a forward. It does not
know requests beyond their blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from concordia import config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import Region
from concordia.checkpoint.restore_tasks import KvPiece
from concordia.errors import RecoveryError
from concordia.integrations.vllm.load import Load, PieceRef


class Applier:
    """One rank's way back."""

    def __init__(
        self, checkpointer: Checkpointer, region: Region, *, rank: int, pool_address: int
    ) -> None:
        self._checkpointer = checkpointer
        self._region = region
        self._rank = rank
        self._pool_address = pool_address

    def apply(self, loads: Sequence[Load]) -> list[int]:
        """For each load the pieces whose bytes are not, in the engine, what the journal committed;
        0 is the only good answer.
        """
        pieces = [[self._piece(load, p) for p in load.pieces.get(self._rank, ())] for load in loads]
        said = iter(
            self._checkpointer.restore_kv(
                self._region,
                [p for found in pieces for p in found],
                timeout_s=config.RESTORE_WAIT_S,
            )
        )
        return [sum(not next(said) for _ in found) for found in pieces]

    def _piece(self, load: Load, piece: PieceRef) -> KvPiece:
        return KvPiece(
            piece.kind,
            piece.token_start,
            piece.token_end,
            self._blocks_of(load, piece),
            self._pool_address + piece.pool_offset,
            piece.payload_bytes,
            piece.payload_hash,
        )

    def _blocks_of(self, load: Load, piece: PieceRef) -> tuple[int, ...]:
        size = self._region.geometry.block_tokens
        first, last = piece.token_start // size, (piece.token_end - 1) // size
        if first < load.first_block or last >= len(load.blocks):
            raise RecoveryError(
                f"a piece of {load.request} reaches blocks {first}..{last} of {len(load.blocks)}"
            )
        return load.blocks[first : last + 1]
