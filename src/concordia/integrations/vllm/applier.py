"""From the journal into the engine's blocks.

Owns: applying the pieces of one rank and comparing what the engine then holds. Promises: a piece is
written only with the hash that its record promised, and hashed again in place before anything later
may write over it; the wait is bounded; blocks of the engine's prefix cache are never written.
Called by the worker side before a forward. It does not know requests beyond their blocks.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Final

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import Region
from concordia.errors import RecoveryError
from concordia.integrations.vllm.load import Load, PieceRef

# two tasks each: an eighth of the ring, so that appends never find it full
PIECES_IN_FLIGHT: Final = 256


class Applier:
    """One rank's way back."""

    def __init__(
        self, checkpointer: Checkpointer, region: Region, *, rank: int, pool_address: int
    ) -> None:
        self._checkpointer = checkpointer
        self._region = region
        self._rank = rank
        self._pool_address = pool_address

    def apply(self, load: Load) -> int:
        """Pieces whose bytes are not, in the engine, what the journal committed; 0 is the only good
        answer.
        """
        until = time.monotonic() + config.RESTORE_WAIT_S
        flying: deque[tuple[PieceRef, Any, Any]] = deque()
        failed = 0
        for piece in load.pieces.get(self._rank, ()):
            # Hashed right behind its own apply: the executor runs tasks in order, and a later piece
            # may write over this one.
            flying.append((piece, self._write(load, piece), self._hash(load, piece)))
            if len(flying) >= PIECES_IN_FLIGHT:
                failed += not self._land(*flying.popleft(), until)
        while flying:
            failed += not self._land(*flying.popleft(), until)
        return failed

    def _land(self, piece: PieceRef, written: Any, hashed: Any, until: float) -> bool:
        first = self._checkpointer.wait(written, max(0.001, until - time.monotonic()))
        then = self._checkpointer.wait(hashed, max(0.001, until - time.monotonic()))
        is_done = first.status == then.status == abi.STATUS_OK
        return is_done and then.payload_hash == piece.payload_hash

    def _write(self, load: Load, piece: PieceRef) -> Any:
        return self._checkpointer.apply_kv(
            self._region,
            kind=piece.kind,
            token_start=piece.token_start,
            token_end=piece.token_end,
            blocks=self._blocks_of(load, piece),
            payload_address=self._pool_address + piece.pool_offset,
            payload_bytes=piece.payload_bytes,
            payload_hash=piece.payload_hash,
        )

    def _hash(self, load: Load, piece: PieceRef) -> Any:
        return self._checkpointer.hash_kv(
            self._region,
            kind=piece.kind,
            token_start=piece.token_start,
            token_end=piece.token_end,
            blocks=self._blocks_of(load, piece),
        )

    def _blocks_of(self, load: Load, piece: PieceRef) -> list[int]:
        size = self._region.geometry.block_tokens
        first, last = piece.token_start // size, (piece.token_end - 1) // size
        if first < load.first_block or last >= len(load.blocks):
            raise RecoveryError(
                f"a piece of {load.request} reaches blocks {first}..{last} of {len(load.blocks)}"
            )
        return list(load.blocks[first : last + 1])
