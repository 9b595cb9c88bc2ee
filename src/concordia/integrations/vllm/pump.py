"""From a step's writes to tasks of the executor, without holding the engine up.

Owns: submission in step order, and which blocks unfinished appends still read. Promises: on a CPU
device a write is submitted before `submit` returns; on a GPU a thread waits for the step's event
first, so nothing is read before it was computed; `wait_for` returns once no unfinished append names
the blocks, or says which requests stood in the way at its bound; a failed append is reported once
per request. Called by the worker side. It does not know what a write means.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from concordia import abi, config
from concordia.errors import ConcordiaError, RingFull, WaitTimeout
from concordia.integrations.vllm.appends import Append, Batch, Failure

STATUS_WORDS = {
    abi.STATUS_JOURNAL_FULL: "the journal had no room",
    abi.STATUS_TOO_LARGE: "the record does not fit a segment",
    abi.STATUS_BAD_TASK: "the executor refused the task",
}


class Tickets(Protocol):
    """The part of a Checkpointer that submitting and following tasks needs."""

    def submit_many(self, tasks: Sequence[Any]) -> list[Any]: ...
    def result(self, ticket: Any) -> Any: ...
    def wait(self, ticket: Any, timeout_s: float) -> Any: ...


class AppendPump:
    """Submits batches and follows them to their end."""

    def __init__(
        self, tickets: Tickets, *, is_threaded: bool, committed: Callable[[], int] | None = None
    ) -> None:
        self._tickets = tickets
        # records that the stream has; as many as were submitted means that all are good
        self._committed = committed
        self._submitted = 0
        self._lock = threading.Condition()
        self._open: deque[Append] = deque()  # submitted or queued, oldest first
        # the oldest of them, since when it is that, and how often it was met since
        self._oldest: tuple[Append | None, float, int] = (None, 0.0, 0)
        self._readers: dict[int, int] = {}  # block -> unfinished appends that read it
        self._failed: dict[str, Failure] = {}
        self._error: str | None = None
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if is_threaded:
            self._thread = threading.Thread(target=self._run, name="concordia-pump", daemon=True)
            self._thread.start()

    def submit(self, batch: Batch) -> None:
        """Take the appends of a step; returns without waiting for any of them."""
        with self._lock:
            if len(self._open) + len(batch.appends) > config.RING_SLOTS:
                for append in batch.appends:
                    self._note(append, f"{len(self._open)} appends are unfinished", may_pass=True)
                return
            self._take(batch.appends)
        if self._thread is not None:
            self._queue.put(batch)
        else:
            self._send(batch)

    def reads(self, blocks: Iterable[int]) -> bool:
        """Whether an unfinished append reads one of these blocks."""
        with self._lock:
            return any(block in self._readers for block in blocks)

    def may_follow(self, count: int) -> bool:
        """Whether so many appends may be handed in elsewhere: none waits here, whose records must
        come before theirs.
        """
        with self._lock:
            self._retire()
            has_own = any(not (append.is_elsewhere or append.is_done) for append in self._open)
            return not has_own and len(self._open) + count <= config.RING_SLOTS

    def follow(self, appends: Sequence[Append]) -> None:
        """Follow appends that were handed in elsewhere, with their tickets."""
        with self._lock:
            for append in appends:
                append.is_claimed = append.is_elsewhere = True
            self._take(appends)
            self._submitted += sum(append.records for append in appends)

    def collect(self) -> dict[str, Failure]:
        """Retire finished appends; returns the requests that failed since the last call, with the
        reason. Raises WaitTimeout when the executor hangs.
        """
        with self._lock:
            self._retire()
            self._require_progress()
            if self._error is not None:
                raise ConcordiaError(self._error)
            failed, self._failed = self._failed, {}
            return failed

    def count_other(self, count: int = 1) -> None:
        """A record goes into the same stream past the pump; told before it is submitted, and taken
        back (-1) when it was refused.
        """
        with self._lock:
            self._submitted += count

    def abandon(self) -> None:
        """Submit nothing more; what is queued is dropped."""
        with self._lock:
            for append in self._open:
                if not append.is_claimed:
                    self._free(append)
            self._lock.notify_all()
        if self._thread is not None:
            self._queue.put(None)

    def wait_for(self, blocks: Iterable[int], *, timeout_s: float) -> list[str]:
        """Wait until no unfinished append reads these blocks; returns the requests whose appends
        were given up for it.

        What the executor has already taken cannot be called back and might read the new bytes, so
        it gets WAIT_TASK_S; after that the executor is broken and WaitTimeout says so.
        """
        wanted = set(blocks)
        with self._lock:
            if not any(block in self._readers for block in wanted):
                return []
            self._retire()
            waiting = [a for a in self._open if not a.is_done and wanted.intersection(a.blocks)]
        until = time.monotonic() + timeout_s
        late: list[str] = []
        for append in waiting:
            if self._wait_one(append, until):
                continue
            if not self._give_up(append) and not self._wait_one(append, until + config.WAIT_TASK_S):
                raise WaitTimeout(
                    f"an append of {append.request} read blocks that the engine needs for "
                    f"{config.WAIT_TASK_S} s"
                )
            late.append(append.request)
        return late

    def drain(self, *, timeout_s: float) -> bool:
        """Wait until every append is done; False when the bound came first."""
        until = time.monotonic() + timeout_s
        while True:
            with self._lock:
                self._retire()
                append = self._open[0] if self._open else None
            if append is None:
                return True
            if not self._wait_one(append, until):
                return False

    def close(self) -> None:
        """Stop the thread; what it had not submitted yet is not submitted any more."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(config.WAIT_TASK_S)

    def _run(self) -> None:
        while True:
            batch = self._queue.get()
            if batch is None:
                return
            try:
                self._send(batch)
            # the thread's own guest door: `collect` raises it where the connector listens
            except Exception as error:
                with self._lock:
                    self._error = f"appending failed: {type(error).__name__}: {error}"
                    self._lock.notify_all()
                return

    def _send(self, batch: Batch) -> None:
        if batch.event is not None:
            batch.event.synchronize()
        if batch.before is not None:
            batch.before()
        with self._lock:
            claimed = [append for append in batch.appends if not append.is_done]
            for append in claimed:
                append.is_claimed = True
            # before they are: a record may be committed sooner than its ticket is known
            self._submitted += sum(append.records for append in claimed)
        self._submit(claimed)

    def _submit(self, appends: list[Append]) -> None:
        """All in one call, so that the executor finds them together and has done soon.

        A full ring is waited for on our own thread only; on the engine's the requests lose
        protection instead.
        """
        until = time.monotonic() + (config.WAIT_TASK_S if self._thread is not None else 0.0)
        while appends:
            try:
                tickets = self._tickets.submit_many([append.task for append in appends])
            except RingFull as error:
                if not self._make_room(until):
                    self._fail(appends, str(error))
                    return
                continue
            with self._lock:
                for append, ticket in zip(appends, tickets, strict=False):
                    append.ticket = ticket
                self._lock.notify_all()
            appends = appends[len(tickets) :]

    def _make_room(self, until: float) -> bool:
        """Wait for the oldest append under way; False when there is none, or at the bound."""
        with self._lock:
            self._retire()
            oldest = next((a for a in self._open if a.ticket is not None and not a.is_done), None)
        if oldest is None or time.monotonic() >= until:
            return False
        self._wait_one(oldest, until)
        return True

    def _wait_one(self, append: Append, until: float) -> bool:
        with self._lock:
            while append.ticket is None and not append.is_done and self._error is None:
                if not self._lock.wait(max(0.0, until - time.monotonic())):
                    return False
            if append.is_done:
                return True
            if self._error is not None:
                return False
        try:
            done = self._tickets.wait(append.ticket, max(0.001, until - time.monotonic()))
        except ConcordiaError:
            return False
        with self._lock:
            self._finish(append, done)
        return True

    def _give_up(self, append: Append) -> bool:
        """True when the append was still ours to call back."""
        with self._lock:
            if append.is_claimed or append.is_done:
                return append.is_done
            self._free(append)
            self._note(append, "its blocks were needed before they could be saved", may_pass=True)
            return True

    def _take(self, appends: Iterable[Append]) -> None:
        """Lock held."""
        for append in appends:
            self._open.append(append)
            for block in append.blocks:
                self._readers[block] = self._readers.get(block, 0) + 1

    def _retire(self) -> None:
        """Lock held: take finished appends off the front; they finish in order, because the
        executor runs them in order.
        """
        is_all = self._committed is not None and self._committed() == self._submitted
        if is_all and all(append.ticket is not None or append.is_done for append in self._open):
            for append in self._open:
                append.is_done = True
            self._open.clear()
            self._readers.clear()
            return
        while self._open:
            append = self._open[0]
            if not append.is_done:
                done = None if append.ticket is None else self._tickets.result(append.ticket)
                if done is None:
                    return
                self._finish(append, done)
            self._open.popleft()

    def _require_progress(self) -> None:
        """Lock held, after `_retire`: what was handed in and is the oldest must not stay so."""
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

    def _finish(self, append: Append, done: Any) -> None:
        if append.is_done:
            return
        self._free(append)
        if done.status != abi.STATUS_OK:
            reason = STATUS_WORDS.get(done.status, f"status {done.status}")
            self._note(append, reason, may_pass=done.status == abi.STATUS_JOURNAL_FULL)

    def _fail(self, appends: list[Append], reason: str) -> None:
        with self._lock:
            self._submitted -= sum(append.records for append in appends)
            for append in appends:
                self._free(append)
                self._note(append, reason, may_pass=True)
            self._lock.notify_all()

    def _note(self, append: Append, reason: str, *, may_pass: bool) -> None:
        """Lock held: the earliest token rules, and what never passes."""
        old = self._failed.get(append.request)
        start = append.start if old is None else min(append.start, old.start)
        if old is not None and not old.may_pass:
            reason, may_pass = old.reason, False
        self._failed[append.request] = Failure(start, reason, may_pass)

    def _free(self, append: Append) -> None:
        if append.is_done:
            return
        append.is_done = True
        for block in append.blocks:
            left = self._readers[block] - 1
            if left:
                self._readers[block] = left
            else:
                del self._readers[block]
