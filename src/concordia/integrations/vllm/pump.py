"""From a step's writes to tasks of the executor, without holding the engine up.

Owns: submission in step order, the thread and the lock. Promises: on a CPU device a write is
submitted before `submit` returns; on a GPU a thread waits for the step's event first, so nothing is
read before it was computed; `wait_for` returns once no unfinished append names the blocks, or says
which requests stood in the way at its bound; a failed append is reported once per request. Called
by the worker side. It does not know what a write means; what is unfinished: open_appends.py.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from concordia import config
from concordia.errors import ConcordiaError, RingFull, WaitTimeout
from concordia.integrations.vllm.appends import Append, Batch, Failure
from concordia.integrations.vllm.open_appends import OpenAppends


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
        self._open = OpenAppends(tickets.result, committed)  # under the lock
        self._lock = threading.Condition()
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
                reason = f"{len(self._open)} appends are unfinished"
                for append in batch.appends:
                    self._open.note(append, reason, may_pass=True)
                return
            self._open.take(batch.appends)
        if self._thread is not None:
            self._queue.put(batch)
        else:
            self._send(batch)

    def reads(self, blocks: Iterable[int]) -> bool:
        """Whether an unfinished append reads one of these blocks."""
        with self._lock:
            return self._open.reads(blocks)

    def may_follow(self, count: int) -> bool:
        """Whether so many appends may be handed in elsewhere: none waits here, whose records must
        come before theirs.
        """
        with self._lock:
            self._open.retire()
            has_own = any(not (append.is_elsewhere or append.is_done) for append in self._open)
            return not has_own and len(self._open) + count <= config.RING_SLOTS

    def follow(self, appends: Sequence[Append]) -> None:
        """Follow appends that were handed in elsewhere, with their tickets."""
        with self._lock:
            for append in appends:
                append.is_claimed = append.is_elsewhere = True
            self._open.take(appends)
            self._open.submitted_count += sum(append.records for append in appends)

    def collect(self) -> dict[str, Failure]:
        """Retire finished appends; returns the requests that failed since the last call, with the
        reason. Raises WaitTimeout when the executor hangs.
        """
        with self._lock:
            self._open.retire()
            self._open.require_progress()
            if self._error is not None:
                raise ConcordiaError(self._error)
            return self._open.take_failed()

    def count_other(self, count: int = 1) -> None:
        """A record goes into the same stream past the pump; told before it is submitted, and taken
        back (-1) when it was refused.
        """
        with self._lock:
            self._open.submitted_count += count

    def abandon(self) -> None:
        """Submit nothing more; what is queued is dropped."""
        with self._lock:
            for append in self._open:
                if not append.is_claimed:
                    self._open.free(append)
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
            if not self._open.reads(wanted):
                return []
            self._open.retire()
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
                self._open.retire()
                append = next(iter(self._open), None)
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
            self._open.submitted_count += sum(append.records for append in claimed)
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
                    with self._lock:
                        self._open.refuse(appends, str(error))
                        self._lock.notify_all()
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
            self._open.retire()
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
            self._open.finish(append, done)
        return True

    def _give_up(self, append: Append) -> bool:
        """True when the append was still ours to call back."""
        with self._lock:
            if append.is_claimed or append.is_done:
                return append.is_done
            self._open.free(append)
            reason = "its blocks were needed before they could be saved"
            self._open.note(append, reason, may_pass=True)
            return True
