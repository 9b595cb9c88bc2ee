"""Many records back into a KV region at once, by all multiprocessors, floor 4.

Owns: the lists that launches read, their answers, and each CTA's scratch. Promises: pieces that
name the same block are written in the order given; a piece counts as restored only if the region's
own bytes, read back, have the hash that its record promised; while one list is worked at the next
is filled; whatever it raises but RestoreUnfinished, nothing of it writes any more; every wait is
bounded. Called by checkpointer.py, where the device has bursts;
kernels/kv_restore.cu does the work.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import accumulate, chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from concordia import abi
from concordia.checkpoint.region import Region
from concordia.checkpoint.restore_tasks import KvPiece, landed
from concordia.device.driver import Burst, Device
from concordia.device.memory import Buffer, JournalTarget
from concordia.errors import RestoreUnfinished, UsageError, WaitTimeout
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Ticket, when_room

RESTORE_KERNEL: Final = "concordia_kv_restore"
# of one list: 64 KiB pieces of it take the bus a millisecond, which is what filling the next takes
PIECES_MAX: Final = 1024
BLOCKS_MAX: Final = 8  # of a piece; who names more is restored by the executor


class RestoreBurst:
    """The burst of one region; one restore at a time."""

    def __init__(self, device: Device, burst: Burst, region: Region) -> None:
        self._device, self._burst, self._region = device, burst, region
        self._lock = threading.Lock()
        self._is_unfinished = False  # launches may still read the lists
        geometry = region.geometry
        # an engine's pieces lie within a block; the self-test's reach into a second one
        tail_max = geometry.tail_bytes(2 * geometry.block_tokens)
        self._payload_max = max(geometry.raw_bytes(), tail_max)
        leaves = -(-self._payload_max // abi.LEAF_BYTES)
        self._digest_bytes = -(-16 * leaves // abi.ROOT_BYTES_MIN) * abi.ROOT_BYTES_MIN
        with ExitStack() as undo:
            self._scratch = device.allocate(burst.ctas * (self._digest_bytes + 4 * BLOCKS_MAX))
            undo.callback(device.free, self._scratch)
            self._lists = [undo.enter_context(closing(PieceList(device))) for _ in range(2)]
            self._memory = undo.pop_all()

    def takes(self, pieces: Sequence[KvPiece]) -> bool:
        """Whether they are small enough; all that an engine appends is."""
        return (
            max((piece.payload_bytes for piece in pieces), default=0) <= self._payload_max
            and max((len(piece.blocks) for piece in pieces), default=0) <= BLOCKS_MAX
        )

    def restore(
        self, runtime: Runtime, target: JournalTarget, pieces: Sequence[KvPiece], timeout_s: float
    ) -> list[int]:
        """A status for each piece; raises WaitTimeout, RingFull, or RestoreUnfinished."""
        until = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=timeout_s):
            raise WaitTimeout(f"another restore into this region took over {timeout_s} s")
        try:
            if self._is_unfinished:
                raise RestoreUnfinished("an earlier restore into this region has not ended")
            with landed(runtime):
                return self._write(runtime, target, pieces, until)
        except RestoreUnfinished:
            self._is_unfinished = True
            raise
        finally:
            self._lock.release()

    def _write(
        self, runtime: Runtime, target: JournalTarget, pieces: Sequence[KvPiece], until: float
    ) -> list[int]:
        """List after list, each filled while the one before is worked at."""
        flying: deque[tuple[PieceList, list[int], Ticket]] = deque()
        found: list[int] = []

        def land() -> None:
            pieces_list, order, ticket = flying.popleft()
            runtime.finish(ticket, max(0.001, until - time.monotonic()))
            found.extend(pieces_list.statuses(order))

        for number, start in enumerate(range(0, len(pieces), PIECES_MAX)):
            if len(flying) == len(self._lists):
                land()
            part, free = pieces[start : start + PIECES_MAX], self._lists[number % 2]
            rounds = in_rounds(part)
            order = list(chain.from_iterable(rounds))
            free.fill(part if len(rounds) == 1 else [part[index] for index in order])
            send = partial(runtime.run_burst, self._launches(target, free, rounds))
            flying.append((free, order, when_room(send, until)))
        while flying:
            land()
        return found

    def _launches(
        self, target: JournalTarget, one: PieceList, rounds: list[list[int]]
    ) -> Callable[[Any], None]:
        """What puts a launch for each round into a stream."""
        pool = (target.pool_address, target.pool_bytes)
        scratch = (self._scratch, self._digest_bytes, BLOCKS_MAX)
        launches = [
            (self._region.entry.address, *one.words(first, len(indices)), *pool, *scratch)
            for indices, first in zip(rounds, accumulate(map(len, rounds), initial=0), strict=False)
        ]

        def enqueue(stream: Any) -> None:
            for words in launches:
                self._burst.enqueue(stream, words)

        return enqueue

    def close(self) -> None:
        """The executor is gone or parked; what a launch may still use is kept."""
        if not self._is_unfinished:
            self._memory.close()


class PieceList:
    """What one launch reads: tasks, block ids, and where it answers."""

    def __init__(self, device: Device) -> None:
        self._device = device
        sizes = [size * PIECES_MAX for size in (abi.TASK.size, 8, 4 * BLOCKS_MAX)]
        self._answers_at, self._ids_at = sizes[0], sizes[0] + sizes[1]
        self._buffer = Buffer(sum(sizes))
        try:
            self._address = device.share(self._buffer.address, self._buffer.size)
        except BaseException:
            self._buffer.close()
            raise
        self._tasks = np.frombuffer(self._buffer.view, abi.TASK.dtype, PIECES_MAX)
        self._answers = np.frombuffer(self._buffer.view, np.uint64, PIECES_MAX, self._answers_at)
        ids = np.frombuffer(self._buffer.view, np.uint32, BLOCKS_MAX * PIECES_MAX, self._ids_at)
        self._ids = ids.reshape(PIECES_MAX, BLOCKS_MAX)
        self._tasks["kind"] = abi.TASK_RESTORE
        self._tasks["blocks"] = 4 * BLOCKS_MAX * np.arange(PIECES_MAX)

    def fill(self, pieces: Sequence[KvPiece]) -> None:
        """Columns at once: a piece has a microsecond of the bus, and Python no more for it."""
        kinds, starts, ends, blocks, addresses, sizes, hashes = zip(*pieces, strict=True)
        tasks, counts = self._tasks[: len(pieces)], np.fromiter(map(len, blocks), np.int64)
        try:
            for name, values in (
                *(("record_kind", kinds), ("token_start", starts), ("token_end", ends)),
                *(("source", addresses), ("source_bytes", sizes), ("block_count", counts)),
            ):
                tasks[name] = np.array(values, tasks.dtype[name])
            digests = b"".join([value.to_bytes(16, "little") for value in hashes])
            tasks["key"] = np.frombuffer(digests, np.uint64).reshape(-1, 2)
            self._place_ids(counts, np.fromiter(chain.from_iterable(blocks), np.uint32))
        except OverflowError as error:
            raise UsageError(f"a number of a piece does not fit its place: {error}") from error
        self._answers[: len(pieces)] = abi.STATUS_BAD_TASK  # unless a kernel says otherwise

    def _place_ids(self, counts: npt.NDArray[np.int64], ids: npt.NDArray[np.uint32]) -> None:
        rows = np.repeat(np.arange(len(counts)), counts)
        self._ids[rows, np.arange(len(ids)) - (np.cumsum(counts) - counts)[rows]] = ids

    def words(self, first: int, count: int) -> tuple[int, ...]:
        """What a launch over a part of the list is told of it."""
        tasks = self._address + abi.TASK.size * first
        answers = self._address + self._answers_at + 8 * first
        return tasks, count, answers, self._address + self._ids_at, self._ids.nbytes

    def statuses(self, order: list[int]) -> list[int]:
        """As the pieces were given; `order` is how they were listed."""
        found = np.empty(len(order), np.uint64)
        found[order] = self._answers[: len(order)]
        answers: list[int] = found.tolist()
        return answers

    def close(self) -> None:
        """No launch reads it any more."""
        self._device.unshare(self._buffer.address)
        self._buffer.close()


def in_rounds(pieces: Sequence[KvPiece]) -> list[list[int]]:
    """Indices of the pieces, so that no two of a round name the same block and each block's pieces
    keep their order.
    """
    named = list(chain.from_iterable(piece.blocks for piece in pieces))
    if len(set(named)) == len(named):
        return [list(range(len(pieces)))] if pieces else []
    last: dict[int, int] = {}  # block -> rounds that name it
    rounds: list[list[int]] = []
    for index, piece in enumerate(pieces):
        number = max((last.get(block, 0) for block in piece.blocks), default=0)
        last.update(dict.fromkeys(piece.blocks, number + 1))
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(index)
    return rounds
