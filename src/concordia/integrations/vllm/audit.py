"""Whether the engine's blocks still hold what was committed of them.

Owns: a sample of full blocks whose appends were committed, and a thread that hashes one of them at
a time while the engine is idle. Promises: a block is compared only while nothing may write it: it
leaves the sample before its bytes change; a difference is told once, with both hashes; the sample,
the pace and every wait have bounds; an engine with work to do is left alone. It is a check on the
write set and on memory: which side is wrong it cannot tell. Called by the worker side. It does not
decide what a difference costs.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from concordia import abi, config
from concordia.errors import ConcordiaError
from concordia.integrations.vllm.door import logger

DIFFERS: Final = "the engine's KV is not what was committed of it"

if TYPE_CHECKING:
    from concordia.integrations.vllm.appends import Append
    from concordia.integrations.vllm.step_writes import Write


class Hasher(Protocol):
    """The part of a Checkpointer that is needed."""

    def result(self, ticket: Any) -> Any: ...
    def wait(self, ticket: Any, timeout_s: float) -> Any: ...
    def hash_kv(
        self, region: Any, *, kind: int, token_start: int, token_end: int, blocks: tuple[int, ...]
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class Difference:
    """A block that is not what was committed of it."""

    write: Write
    token_start: int
    token_end: int
    block: int


@dataclass(slots=True, eq=False)
class _Sample:
    append: Append
    write: Write
    token_start: int
    token_end: int
    committed: int = 0  # the payload hash, once the append is done

    @property
    def block(self) -> int:
        return self.append.blocks[-1]  # whose hash is the append's answer


class Audit:
    """The sample of one rank."""

    def __init__(
        self, hasher: Hasher, region: Any, *, rank: int, say: Callable[[dict[str, Any]], None]
    ) -> None:
        self._hasher = hasher
        self._region = region
        self._rank = rank
        self._say = say
        self._lock = threading.Lock()
        # by block; looked at longest ago first
        self._samples: OrderedDict[int, _Sample] = OrderedDict()
        self._pending: list[_Sample] = []  # their appends were not done when we looked
        self._chosen: _Sample | None = None  # of the step at hand
        self._offered = 0
        self._found: list[Difference] = []
        self._idle_since: float | None = time.monotonic()  # None while a step runs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="concordia-audit", daemon=True)
        self._thread.start()

    def step(self, written: Iterable[int]) -> None:
        """A step begins, and may write these blocks; nothing has been written yet."""
        with self._lock:
            self._idle_since = None
            self._offered = 0
            self._settle()
            gone = set(written)
            self._pending = [sample for sample in self._pending if sample.block not in gone]
            for block in gone:
                self._samples.pop(block, None)

    def offer(self, append: Append, write: Write, *, token_start: int, token_end: int) -> None:
        """Full blocks are appended in this step, and the range is that of the last; one of all that
        are offered is taken, each as likely.
        """
        self._offered += 1
        if random.random() * self._offered < 1:
            self._chosen = _Sample(append, write, token_start, token_end)

    def rest(self) -> list[Difference]:
        """The step is over; what was found since the last one."""
        with self._lock:
            self._idle_since = time.monotonic()
            found, self._found = self._found, []
            return found

    def close(self) -> None:
        """Look at nothing any more; what is being hashed is waited for, within a bound."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(config.WAIT_TASK_S)

    def _settle(self) -> None:
        """Lock held: the choice of the last step joins the sample once it is known what was
        committed.
        """
        if self._chosen is not None:
            self._pending.append(self._chosen)
            self._chosen = None
        self._pending = [
            sample
            for sample in self._pending[-config.AUDIT_PENDING_MAX :]
            if not self._admit(sample)
        ]
        while len(self._samples) > config.AUDIT_BLOCKS_MAX:
            self._samples.popitem(last=False)

    def _admit(self, sample: _Sample) -> bool:
        """Whether there is nothing more to wait for; a failed append, or one whose answer was not
        read in time, is no sample.
        """
        append = sample.append
        if append.ticket is None:
            return append.is_done
        try:
            done = self._hasher.result(append.ticket)
        except ConcordiaError:
            return True
        if done is not None and done.is_ok:
            sample.committed = done.payload_hash
            self._samples[sample.block] = sample
        return done is not None

    def _run(self) -> None:
        while not self._stop.wait(config.AUDIT_PERIOD_S):
            try:
                self._look()
            except ConcordiaError as error:
                logger.warning("Concordia compares no more blocks with the journal: %s", error)
                return

    def _look(self) -> None:
        """Hash the block that was looked at longest ago, if the engine is idle."""
        with self._lock:
            if (
                self._idle_since is None
                or time.monotonic() - self._idle_since < config.AUDIT_IDLE_S
            ):
                return
            self._settle()
            if not self._samples:
                return
            block, sample = next(iter(self._samples.items()))
            self._samples.move_to_end(block)
        ticket = self._hasher.hash_kv(
            self._region, kind=abi.KIND_KV_BLOCK, token_start=sample.token_start,
            token_end=sample.token_end, blocks=(block,),
        )  # fmt: skip
        done = self._hasher.wait(ticket, config.WAIT_TASK_S)
        with self._lock:
            # A step that came in between has taken from the sample what it writes: then the hash
            # may be of new bytes.
            if (
                not done.is_ok
                or done.payload_hash == sample.committed
                or self._samples.get(block) is not sample
            ):
                return
            del self._samples[block]
            found = Difference(sample.write, sample.token_start, sample.token_end, sample.block)
            self._found.append(found)
        self._tell(found, f"hash {done.payload_hash:032x}, committed {sample.committed:032x}")

    def _tell(self, found: Difference, hashes: str) -> None:
        """Loud, and into the journal at once: an idle engine reports nothing to its scheduler."""
        write = found.write
        logger.error(
            ("Concordia: tokens %d..%d of %s are not what was committed of them (rank %d, "
            "block %d: %s); they are no longer promised"),
            found.token_start, found.token_end, write.request, self._rank, found.block, hashes,
        )  # fmt: skip
        self._say(
            {
                "event": "differs",
                "request": write.request,
                "key": f"{write.key:032x}",
                "incarnation": write.incarnation,
                "token_start": found.token_start,
                "rank": self._rank,
                "hash_mismatches": 1,
                "reason": DIFFERS,
            }
        )
