"""Records back into a KV region, one after the other, by the executor, floor 4.

Owns: KvPiece, and the tasks that a piece needs. Promises: a piece is written only with the hash
that its record promised, and hashed again in place before anything later may write over it; the
wait is bounded. Called by checkpointer.py, where there is no burst or a piece is too large for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from concordia import abi
from concordia.checkpoint.region import Region
from concordia.errors import RingFull
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task, Ticket

# two tasks each: an eighth of the ring, so that appends never find it full
PIECES_IN_FLIGHT: Final = 256


class KvPiece(NamedTuple):
    """A record's payload, which lies in the pool at `address`, and where in the region it
    belongs.
    """

    kind: int
    token_start: int
    token_end: int
    blocks: Sequence[int]
    address: int
    payload_bytes: int
    payload_hash: int

    def task(self, region: Region) -> Task:
        """What writes it."""
        return Task(
            opcode=region.apply.opcode,
            kind=abi.TASK_RESTORE,
            region=region.number,
            record_kind=self.kind,
            key=self.payload_hash,
            token_start=self.token_start,
            token_end=self.token_end,
            blocks=self.blocks,
            source=self.address,
            source_bytes=self.payload_bytes,
        )

    def look(self, region: Region) -> Task:
        """What hashes the region's bytes in its place."""
        return Task(
            opcode=region.hash.opcode,
            kind=abi.TASK_COMPUTE,
            region=region.number,
            record_kind=self.kind,
            token_start=self.token_start,
            token_end=self.token_end,
            blocks=self.blocks,
        )


def restore_by_tasks(
    runtime: Runtime, region: Region, pieces: Sequence[KvPiece], timeout_s: float
) -> list[int]:
    """A status for each piece; raises WaitTimeout."""
    until = time.monotonic() + timeout_s
    flying: deque[tuple[KvPiece, list[Ticket]]] = deque()
    found: list[int] = []

    def land() -> None:
        piece, tickets = flying.popleft()
        written, seen = (runtime.wait(t, max(0.001, until - time.monotonic())) for t in tickets)
        status = written.status or seen.status
        is_other = status == abi.STATUS_OK and seen.payload_hash != piece.payload_hash
        found.append(abi.STATUS_HASH_MISMATCH if is_other else status)

    for piece in pieces:
        # Hashed right behind its own apply: the executor runs tasks in order, and a later piece
        # may write over this one.
        flying.append((piece, _both(runtime, [piece.task(region), piece.look(region)])))
        if len(flying) >= PIECES_IN_FLIGHT:
            land()
    while flying:
        land()
    return found


def _both(runtime: Runtime, tasks: list[Task]) -> list[Ticket]:
    """Both tickets, or RingFull with none of the two done for nothing."""
    tickets = runtime.submit_many(tasks)
    if len(tickets) < len(tasks):
        raise RingFull("appends fill the ring while a restore wants it")
    return tickets
