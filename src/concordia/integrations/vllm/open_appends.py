"""Appends that are not known to be done, and the blocks that they read.

Owns: their order, which blocks unfinished ones read, and the failures that nobody has taken yet.
Promises: they leave in order, because the executor runs them in order; a failure is told once per
request, by its earliest token, and what never passes outweighs what may. Called by the pump, which
holds its lock meanwhile. It submits nothing and waits for nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from concordia import abi, config
from concordia.errors import WaitTimeout
from concordia.integrations.vllm.appends import Append, Failure

STATUS_WORDS: Final = {
    abi.STATUS_JOURNAL_FULL: "the journal had no room",
    abi.STATUS_TOO_LARGE: "the record does not fit a segment",
    abi.STATUS_BAD_TASK: "the executor refused the task",
}


class OpenAppends:
    """Submitted or queued, oldest first."""

    def __init__(
        self, result: Callable[[Any], Any], committed: Callable[[], int] | None = None
    ) -> None:
        self.submitted_count = 0  # records
        self._result = result
        # records that the stream has; as many as were submitted means that all are good
        self._committed = committed
        self._open: deque[Append] = deque()
        # the oldest of them, since when it is that, and how often it was met since
        self._oldest: tuple[Append | None, float, int] = (None, 0.0, 0)
        self._readers: dict[int, int] = {}  # block -> unfinished appends that read it
        self._failed: dict[str, Failure] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Append]:
        return iter(self._open)

    def take(self, appends: Iterable[Append]) -> None:
        """They come last."""
        for append in appends:
            self._open.append(append)
            for block in append.blocks:
                self._readers[block] = self._readers.get(block, 0) + 1

    def reads(self, blocks: Iterable[int]) -> bool:
        """Whether an unfinished one reads one of these."""
        return any(block in self._readers for block in blocks)

    def retire(self) -> None:
        """Take finished ones off the front."""
        is_all = self._committed is not None and self._committed() == self.submitted_count
        if is_all and all(append.ticket is not None or append.is_done for append in self._open):
            for append in self._open:
                append.is_done = True
            self._open.clear()
            self._readers.clear()
            return
        while self._open:
            append = self._open[0]
            if not append.is_done:
                done = None if append.ticket is None else self._result(append.ticket)
                if done is None:
                    return
                self.finish(append, done)
            self._open.popleft()

    def require_progress(self) -> None:
        """After `retire`: what was handed in and is the oldest must not stay so; raises
        WaitTimeout.
        """
        oldest = self._open[0] if self._open else None
        known, since, looks = self._oldest
        if oldest is None or oldest.ticket is None or oldest is not known:
            self._oldest = oldest, time.monotonic(), 0
            return
        self._oldest = oldest, since, looks + 1
        waited_s = time.monotonic() - since
        if waited_s > config.WAIT_TASK_S and looks >= config.STUCK_LOOKS_MIN:
            raise WaitTimeout(
                f"the executor hangs: it has been at an append of {oldest.request} for "
                f"{waited_s:.1f} s"
            )

    def finish(self, append: Append, done: Any) -> None:
        """The executor has answered."""
        if append.is_done:
            return
        self.free(append)
        if done.status != abi.STATUS_OK:
            reason = STATUS_WORDS.get(done.status, f"status {done.status}")
            self.note(append, reason, may_pass=done.status == abi.STATUS_JOURNAL_FULL)

    def refuse(self, appends: Sequence[Append], reason: str) -> None:
        """These were counted as submitted and could not be."""
        self.submitted_count -= sum(append.records for append in appends)
        for append in appends:
            self.free(append)
            self.note(append, reason, may_pass=True)

    def note(self, append: Append, reason: str, *, may_pass: bool) -> None:
        """It is not saved."""
        old = self._failed.get(append.request)
        start = append.start if old is None else min(append.start, old.start)
        if old is not None and not old.may_pass:
            reason, may_pass = old.reason, False
        self._failed[append.request] = Failure(start, reason, may_pass)

    def take_failed(self) -> dict[str, Failure]:
        """Failures by request since the last call."""
        failed, self._failed = self._failed, {}
        return failed

    def free(self, append: Append) -> None:
        """It reads its blocks no more."""
        if append.is_done:
            return
        append.is_done = True
        for block in append.blocks:
            left = self._readers[block] - 1
            if left:
                self._readers[block] = left
            else:
                del self._readers[block]
