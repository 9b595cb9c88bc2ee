"""The way back: which records make up a request's KV, and whether their bytes are what was
committed.

Owns: RestorePlan, and checking it. Promises: a plan exists only if for every rank its pieces are
contiguous from token 0, lie within the pool and have the reader's layout and model; `verify` has
hashed every byte, on this thread and without the interpreter's lock, before anybody is promised a
token; what does not fit is a RecoveryError with its reason, which means a cold start for that
request and nothing else. Called by integrations from a thread of their own. It writes nothing:
the applier does that, on the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from concordia import abi, config
from concordia.device.payload_hash import PayloadHash, Promised
from concordia.errors import Corruption, RecoveryError, WaitTimeout
from concordia.journal import record
from concordia.journal.coverage import Cut, Piece


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """KV of tokens [0, tokens), piece by piece, for every rank; key of each full block, 0 where it
    has none.

    `stamps` are the headers of the segments it lies in, as they were before anything was hashed: a
    segment that is given to another stream gets another salt first, so while they are unchanged the
    pieces are where they were.
    """

    tokens: int
    incarnation: int
    pieces: dict[int, tuple[Piece, ...]]
    block_keys: tuple[int, ...]
    stamps: dict[int, bytes]
    verify_s: float = 0.0  # what hashing took
    is_mapped: bool = True  # whether the pool's pages were in the process before that

    def is_current(self, pool: memoryview) -> bool:
        """Whether everything still lies where it was verified."""
        return all(_stamp(pool, at) == stamp for at, stamp in self.stamps.items())

    @property
    def payload_bytes(self) -> int:
        """Bytes of all ranks."""
        return sum(piece.payload_bytes for found in self.pieces.values() for piece in found)


def plan_restore(
    cut: Cut,
    *,
    world: int,
    layout_hash: int,
    pool: memoryview,
    segment_bytes: int,
    model_hash: int = 0,
) -> RestorePlan:
    """The plan that this cut allows; raises RecoveryError when it allows none.

    `model_hash` is what would compute the KV here. Even records that name no model (0) serve only a
    reader who names none.
    """
    if cut.tokens <= 0:
        raise RecoveryError("the journal has nothing of it")
    for rank in range(world):
        found = cut.pieces.get(rank, [])
        _check_rank(found, cut.tokens, rank=rank, layout_hash=layout_hash, pool_bytes=len(pool))
        _check_model(found, model_hash)
    pieces = {rank: tuple(cut.pieces[rank]) for rank in range(world)}
    starts = {
        p.pool_offset // segment_bytes * segment_bytes for found in pieces.values() for p in found
    }
    stamps = {at: _stamp(pool, at) for at in starts}
    return RestorePlan(cut.tokens, cut.incarnation, pieces, tuple(cut.block_keys), stamps)


def verify(plan: RestorePlan, pool: memoryview, *, deadline: float) -> None:
    """Hash every piece of every rank; raises Corruption for the first that differs, WaitTimeout at
    the deadline (monotonic), which is looked at every VERIFY_BYTES.
    """
    held = np.frombuffer(pool, np.uint8)  # as long as this lives, the pool stays mapped
    start, hasher = held.ctypes.data, PayloadHash()
    for rank, pieces in plan.pieces.items():
        done = 0
        while done < len(pieces):
            if time.monotonic() >= deadline:
                raise WaitTimeout(
                    f"{done} of {len(pieces)} pieces of rank {rank} were verified in time"
                )
            batch = _batch(pieces, done)
            other = hasher.first_other(
                [Promised(start + p.pool_offset, p.payload_bytes, p.payload_hash) for p in batch]
            )
            if other is not None:
                piece = batch[other[0]]
                raise Corruption(
                    f"tokens {piece.token_start}..{piece.token_end} of rank {rank} (stream "
                    f"{piece.stream:x}, record {piece.sequence}): "
                    f"payload hash {other[1]:032x}, committed {piece.payload_hash:032x}"
                )
            done += len(batch)


def _batch(pieces: Sequence[Piece], start: int) -> Sequence[Piece]:
    """Those from `start` on that are hashed between two looks at the clock; at least one."""
    left, end = config.VERIFY_BYTES, start
    while end < len(pieces) and (left > 0 or end == start):
        left -= pieces[end].payload_bytes
        end += 1
    return pieces[start:end]


def _stamp(pool: memoryview, at: int) -> bytes:
    return bytes(pool[at : at + record.HEADER_BYTES])


def _check_model(pieces: Sequence[Piece], model_hash: int) -> None:
    for piece in pieces:
        if piece.model_hash != model_hash:
            raise RecoveryError(
                f"record {piece.sequence} of stream {piece.stream:x} was computed by another "
                "model, adapter or cache salt "
                f"({piece.model_hash:016x}, here {model_hash:016x})"
            )


def _check_rank(
    pieces: Sequence[Piece], tokens: int, *, rank: int, layout_hash: int, pool_bytes: int
) -> None:
    at = 0
    for piece in pieces:
        where = f"record {piece.sequence} of stream {piece.stream:x} (rank {rank})"
        if piece.kind not in (abi.KIND_KV_TAIL, abi.KIND_KV_BLOCK):
            raise RecoveryError(f"{where} is of kind {piece.kind}")
        if piece.layout_hash not in (0, layout_hash):
            raise RecoveryError(
                f"{where} has layout {piece.layout_hash:x}, this engine {layout_hash:x}"
            )
        if not piece.token_start <= at <= piece.token_end:
            raise RecoveryError(
                f"{where} holds tokens {piece.token_start}..{piece.token_end}, needed from {at}"
            )
        if (
            piece.pool_offset < 0
            or piece.payload_bytes < 0
            or piece.pool_offset + piece.payload_bytes > pool_bytes
        ):
            raise RecoveryError(f"{where} points outside the pool")
        at = piece.token_end
    if at < tokens:
        raise RecoveryError(f"rank {rank} has {at} of {tokens} tokens")
