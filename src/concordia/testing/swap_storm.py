"""A storm of hot swaps under a flood of tasks, judged by the device's own count.

Owns: the storm and its verdict. Promises: every task leaves on the device how often it ran, when,
and by which generation and which code, so that nothing rests on what the host believes; swaps and
submission go side by side, each at most two batches ahead of the other; it ends within its bound.
Called by tests and by benchmarks/swap_storm.py. Any device.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from concordia import abi, config
from concordia.device.compiler import HandlerSource
from concordia.errors import ConcordiaError, RingFull, WaitTimeout
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task, Ticket

# Two words for each task, behind one that counts them all: how often it ran, and when << 32 |
# generation << 8 | version.
STORM: Final = """#include "call.h"
HANDLER {
  if (lane != 0) return;
  uint64_t* total = reinterpret_cast<uint64_t*>(call->task.source);
  uint64_t* mine = total + 1 + 2 * call->task.arg;
  const uint64_t when = add_device(total, 1);
  add_device(mine, 1);
  mine[1] = when << 32 | (call->op->generation & 0xffffff) << 8 | VERSION;
  call->result = mine[1];
}
"""
VERSIONS: Final = 5
AHEAD: Final = 2  # batches that may be handed in beyond the last swap
CHUNK: Final = 512  # tasks of one call
LOOK_S: Final = 0.1  # how often a side that waits looks whether the other still goes on
FULL_S: Final = 0.0002  # a few dozen tasks are done in this time
NAME: Final = "swap_storm"


@dataclass(frozen=True, slots=True)
class StormVerdict:
    """What the device says of a storm; all is well when the first four are 0."""

    lost: int  # tasks that did not run
    repeated: int  # tasks that ran more than once
    out_of_order: int  # that ran at another turn than theirs, or by older code than the one before
    wrong_code: int  # that ran by other code than their generation's, or answered otherwise
    tasks: int
    swaps: int
    generations_seen: int
    seconds: float
    swap_ms: tuple[float, ...]  # how long each swap took whoever asked for it

    @property
    def is_clean(self) -> bool:
        """Whether none was lost, none ran twice, and each ran in turn by the code of its time."""
        return not (self.lost or self.repeated or self.out_of_order or self.wrong_code)


class SwapStorm:
    """`tasks` tasks in batches of random sizes, with a swap behind every batch but the last."""

    def __init__(
        self, runtime: Runtime, *, tasks: int, swaps: int, seed: int, within_s: float
    ) -> None:
        self._runtime, self._tasks, self._within_s = runtime, tasks, within_s
        random = np.random.default_rng(seed)
        sizes = random.multinomial(tasks, random.dirichlet(np.full(swaps + 1, 2.0)))
        self._starts = [0, *np.cumsum(sizes).tolist()]
        # each swap brings another version than the one that is there
        self._versions: list[int] = (
            np.cumsum([0, *random.integers(1, VERSIONS, swaps)]) % VERSIONS
        ).tolist()
        self._images = [
            runtime.device.build(HandlerSource.of(NAME, {"VERSION": version}, text=STORM))
            for version in range(VERSIONS)
        ]
        self._table = runtime.device.allocate(8 * (1 + 2 * tasks))
        self._room, self._handed_in = threading.Semaphore(AHEAD), threading.Semaphore(0)
        self._is_over = threading.Event()
        self._error: ConcordiaError | None = None  # what ended the producer
        self._answers: dict[int, int] = {}  # of the last task of each batch
        self._until = 0.0

    def run(self) -> StormVerdict:
        """Raises WaitTimeout when it is not over within its bound, and then keeps its memory."""
        started = time.monotonic()
        self._until = started + self._within_s
        first = self._runtime.adopt(NAME, self._images[self._versions[0]])
        version_of, swap_ms = {first.generation: self._versions[0]}, []
        producer = threading.Thread(target=self._produce, args=(first.opcode,), name="storm")
        producer.start()
        try:
            for version in self._versions[1:]:
                self._take(self._handed_in, "tasks to swap under")
                at = time.monotonic()
                operator = self._runtime.adopt(NAME, self._images[version])
                swap_ms.append((time.monotonic() - at) * 1e3)
                version_of[operator.generation] = version
                self._room.release()
            self._take(self._handed_in, "the last tasks")
        finally:
            self._is_over.set()
            producer.join()
        if self._error is not None:
            raise self._error
        seconds = time.monotonic() - started
        raw = self._runtime.device.read(self._table + 8, 16 * self._tasks)
        self._runtime.device.free(self._table)
        return self._judge(np.frombuffer(raw, "<u8").reshape(-1, 2), version_of, seconds, swap_ms)

    def _take(self, semaphore: threading.Semaphore, what: str) -> None:
        while True:
            if self._error is not None:
                raise self._error
            if self._is_over.is_set() or time.monotonic() > self._until:
                raise WaitTimeout(f"swap storm: no {what} within {self._within_s} s")
            if semaphore.acquire(timeout=LOOK_S):
                return

    def _produce(self, opcode: int) -> None:
        """Hand in batch after batch, and look at an answer of the one before."""
        try:
            last: tuple[int, Ticket] | None = None
            for start, end in pairwise(self._starts):
                self._take(self._room, "swap")
                mine = self._hand_in(opcode, start, end)
                self._look(last)
                last = (end - 1, mine) if mine is not None else None
                if end == self._tasks:
                    self._look(last)  # the last of all, once: later batches are empty
                    last = None
                self._handed_in.release()
        except ConcordiaError as error:
            self._error = error

    def _hand_in(self, opcode: int, start: int, end: int) -> Ticket | None:
        ticket = None
        while start < end:
            tasks = [
                Task(opcode=opcode, kind=abi.TASK_COMPUTE, arg=arg, source=self._table)
                for arg in range(start, min(end, start + CHUNK))
            ]
            try:
                tickets = self._runtime.submit_many(tasks)
                start, ticket = start + len(tickets), tickets[-1]
            except RingFull:
                if self._is_over.is_set() or time.monotonic() > self._until:
                    raise
                time.sleep(FULL_S)
        return ticket

    def _look(self, last: tuple[int, Ticket] | None) -> None:
        if last is not None:
            self._answers[last[0]] = self._runtime.wait(last[1], config.WAIT_TASK_S).result

    def _judge(
        self,
        table: npt.NDArray[np.uint64],
        version_of: dict[int, int],
        seconds: float,
        swap_ms: list[float],
    ) -> StormVerdict:
        counts = table[:, 0]
        words = table[:, 1].astype(np.int64)
        generations, versions = words >> 8 & 0xFFFFFF, words & 0xFF
        known = np.full(max(version_of) + 1, -1)
        known[list(version_of)] = list(version_of.values())
        expected = known[np.minimum(generations, len(known) - 1)]
        answered = np.array(list(self._answers.items()), np.int64).reshape(-1, 2)
        return StormVerdict(
            lost=int((counts == 0).sum()),
            repeated=int((counts > 1).sum()),
            out_of_order=int((words >> 32 != np.arange(self._tasks)).sum())
            + int((np.diff(generations) < 0).sum()),
            wrong_code=int((versions != expected).sum())
            + int((words[answered[:, 0]] != answered[:, 1]).sum()),
            tasks=self._tasks,
            swaps=len(swap_ms),
            generations_seen=len(np.unique(generations)),
            seconds=seconds,
            swap_ms=tuple(swap_ms),
        )
