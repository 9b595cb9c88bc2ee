"""Records back into a KV region, one after the other, by the executor, floor 4.

Owns: KvPiece, and the tasks that a piece needs. Promises: a piece is written only with the hash
that its record promised, and hashed again in place before anything later may write over it;
whatever a restore raises but RestoreUnfinished, nothing of it writes any more; every wait is
bounded. Called by checkpointer.py, where there is no burst or a piece is too large for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, NamedTuple

from concordia import abi, config
from concordia.checkpoint.region import Region
from concordia.errors import ConcordiaError, RestoreUnfinished
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task, Ticket, when_room

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
    """A status for each piece; raises WaitTimeout, RingFull, or RestoreUnfinished."""
    until = time.monotonic() + timeout_s
    flying: deque[tuple[KvPiece, list[Ticket]]] = deque()
    found: list[int] = []

    def land() -> None:
        piece, tickets = flying.popleft()
        written, seen = (runtime.wait(t, max(0.001, until - time.monotonic())) for t in tickets)
        status = written.status or seen.status
        is_other = status == abi.STATUS_OK and seen.payload_hash != piece.payload_hash
        found.append(abi.STATUS_HASH_MISMATCH if is_other else status)

    with landed(runtime):
        for piece in pieces:
            # Hashed right behind its own apply: the executor runs tasks in order, and a later
            # piece may write over this one.
            tasks, tickets = [piece.task(region), piece.look(region)], list[Ticket]()
            while len(tickets) < len(tasks):
                rest = tasks[len(tickets) :]
                tickets += when_room(partial(runtime.submit_many, rest), until)
            flying.append((piece, tickets))
            if len(flying) >= PIECES_IN_FLIGHT:
                land()
        while flying:
            land()
    return found


@contextmanager
def landed(runtime: Runtime) -> Iterator[None]:
    """What was handed in here has ended when this does, within WAIT_TASK_S also after an error;
    raises RestoreUnfinished when it has not.
    """
    try:
        yield
    except BaseException as error:
        try:
            runtime.drain(config.WAIT_TASK_S)
        except ConcordiaError as unfinished:
            raise RestoreUnfinished(
                f"blocks are still being written by a restore that failed ({error}): {unfinished}"
            ) from error
        raise
