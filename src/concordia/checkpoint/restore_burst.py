"""Many records back into a KV region at once, by all multiprocessors, floor 4.

Owns: the list that a launch reads, its answers, and each CTA's scratch. Promises: pieces that name
the same block are written in the order given; a piece counts as restored only if the region's own
bytes, read back, have the hash that its record promised; the wait is bounded. Called by
checkpointer.py, where the device has bursts; kernels/kv_restore.cu does the work.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

import numpy as np

from concordia import abi
from concordia.checkpoint.region import Region
from concordia.checkpoint.restore_tasks import KvPiece
from concordia.device.driver import Burst, Device
from concordia.device.memory import Buffer, JournalTarget
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task, pack_task

RESTORE_KERNEL: Final = "concordia_kv_restore"
# at once, a list of 0.5 MiB: 8 GiB of an 8B model's blocks
PIECES_MAX: Final = 4096
BLOCKS_MAX: Final = 8  # of a piece; who names more is restored by the executor


class RestoreBurst:
    """The burst of one region; one restore at a time."""

    def __init__(self, device: Device, burst: Burst, region: Region) -> None:
        self._device, self._burst, self._region = device, burst, region
        self._lock = threading.Lock()
        geometry = region.geometry
        # an engine's pieces lie within a block; the self-test's reach into a second one
        tail_max = geometry.tail_bytes(2 * geometry.block_tokens)
        self._payload_max = max(geometry.raw_bytes(), tail_max)
        leaves = -(-self._payload_max // abi.LEAF_BYTES)
        self._digest_bytes = -(-16 * leaves // abi.ROOT_BYTES_MIN) * abi.ROOT_BYTES_MIN
        self._scratch = device.allocate(burst.ctas * (self._digest_bytes + 4 * BLOCKS_MAX))
        at = [size * PIECES_MAX for size in (abi.TASK.size, 8, 4 * BLOCKS_MAX)]
        self._list = Buffer(sum(at))
        self._tasks, self._answers, self._ids = 0, at[0], at[0] + at[1]
        self._address = device.share(self._list.address, self._list.size)

    def takes(self, piece: KvPiece) -> bool:
        """Whether it is small enough; all that an engine appends is."""
        return piece.payload_bytes <= self._payload_max and len(piece.blocks) <= BLOCKS_MAX

    def restore(
        self, runtime: Runtime, target: JournalTarget, pieces: Sequence[KvPiece], timeout_s: float
    ) -> list[int]:
        """A status for each piece; raises WaitTimeout."""
        found: list[int] = []
        with self._lock:
            for start in range(0, len(pieces), PIECES_MAX):
                found += self._restore(
                    runtime, target, pieces[start : start + PIECES_MAX], timeout_s
                )
        return found

    def _restore(
        self, runtime: Runtime, target: JournalTarget, pieces: Sequence[KvPiece], timeout_s: float
    ) -> list[int]:
        rounds = in_rounds(pieces)
        order = [index for one in rounds for index in one]
        self._fill([pieces[index] for index in order])
        base = self._address
        ids = (base + self._ids, 4 * BLOCKS_MAX * len(pieces))
        scratch = (self._scratch, self._digest_bytes, BLOCKS_MAX)
        launches = []
        for one, first in zip(rounds, accumulate(map(len, rounds), initial=0), strict=False):
            place = (base + self._tasks + abi.TASK.size * first, len(one))
            answers = base + self._answers + 8 * first
            pool = (target.pool_address, target.pool_bytes)
            launches.append((self._region.entry.address, *place, answers, *ids, *pool, *scratch))

        def enqueue(stream: Any) -> None:
            for words in launches:
                self._burst.enqueue(stream, words)

        runtime.run_burst(enqueue)
        runtime.wait(runtime.submit(Task()), timeout_s)
        statuses = np.empty(len(order), np.uint64)
        statuses[order] = np.frombuffer(self._list.view, np.uint64, len(order), self._answers)
        return [int(status) for status in statuses]

    def _fill(self, pieces: Sequence[KvPiece]) -> None:
        """The list, and answers that no kernel gives."""
        packed = [pack_task(piece.task(self._region)) for piece in pieces]
        view, count = self._list.view, len(pieces)
        view[: abi.TASK.size * count] = b"".join(task for task, _ in packed)
        tasks = np.frombuffer(view, abi.TASK.dtype, count)
        tasks["blocks"] = 4 * BLOCKS_MAX * np.arange(count)
        room = 4 * BLOCKS_MAX
        ids = b"".join(found.ljust(room, b"\0") for _, found in packed)
        view[self._ids : self._ids + room * count] = ids
        np.frombuffer(view, np.uint64, count, self._answers)[:] = abi.STATUS_BAD_TASK

    def close(self) -> None:
        """Nothing of it is under way, and the executor is gone or parked."""
        self._device.unshare(self._list.address)
        self._list.close()
        self._device.free(self._scratch)


def in_rounds(pieces: Sequence[KvPiece]) -> list[list[int]]:
    """Indices of the pieces, so that no two of a round name the same block and each block's pieces
    keep their order.
    """
    last: dict[int, int] = {}  # block -> rounds that name it
    rounds: list[list[int]] = []
    for index, piece in enumerate(pieces):
        number = max((last.get(block, 0) for block in piece.blocks), default=0)
        last.update(dict.fromkeys(piece.blocks, number + 1))
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(index)
    return rounds
