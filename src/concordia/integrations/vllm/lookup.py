"""Questions to the journal, asked on threads of our own.

Owns: the queue of restore and prefix look-ups of one engine, and their answers. Promises: the
scheduler's thread never waits for a socket or a hash here; every question has an answer by its
deadline, and "cold" is always one. Called by the scheduler side. It does not know what the
questions are.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from concordia import config
from concordia.errors import ConcordiaError
from concordia.recovery.restore import RestorePlan


@dataclass(frozen=True, slots=True)
class Answer:
    """Either a verified plan, or why there is none."""

    plan: RestorePlan | None
    reason: str = ""
    took_s: float = 0.0  # asking and hashing, without the time in the queue
    ended: float = 0.0  # when it came (monotonic)

    @property
    def verify_s(self) -> float:
        """Of `took_s`, what hashing took."""
        return 0.0 if self.plan is None else self.plan.verify_s

    @property
    def is_mapped(self) -> bool:
        """Whether hashing met no page for the first time."""
        return self.plan is None or self.plan.is_mapped


@dataclass(slots=True)
class _Question:
    request: str
    deadline: float
    ask: Callable[[float], RestorePlan]
    answer: Answer | None = None


class Lookups:
    """All open and answered questions by request."""

    def __init__(self) -> None:
        self._questions: dict[str, _Question] = {}
        self._queue: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._done = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"concordia-lookup-{i}", daemon=True)
            for i in range(config.LOOKUP_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def ask(self, request: str, question: Callable[[float], RestorePlan], *, wait_s: float) -> None:
        """Ask once per request; `question` gets the deadline (monotonic)."""
        if request in self._questions:
            return
        asked = _Question(request, time.monotonic() + wait_s, question)
        self._questions[request] = asked
        self._queue.put(asked)

    def ask_again(self, request: str) -> None:
        """The answer does not hold any more; the deadline stays."""
        asked = self._questions[request]
        again = _Question(request, asked.deadline, asked.ask)
        self._questions[request] = again
        self._queue.put(again)

    def answer(self, request: str) -> Answer | None:
        """The answer, or None while it is open."""
        asked = self._questions.get(request)
        if asked is None:
            return Answer(None, "not asked")
        if asked.answer is None and time.monotonic() >= asked.deadline:
            asked.answer = Answer(None, "no answer from the journal in time")
        return asked.answer

    def is_asked(self, request: str) -> bool:
        return request in self._questions

    def forget(self, request: str) -> None:
        self._questions.pop(request, None)

    @property
    def is_waiting(self) -> bool:
        """Whether any question is open."""
        return any(asked.answer is None for asked in self._questions.values())

    def wait(self, timeout_s: float) -> None:
        """Until some answer comes, or the bound."""
        with self._done:
            self._done.wait(timeout_s)

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        until = time.monotonic() + config.LOOKUP_WAIT_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while True:
            asked = self._queue.get()
            if asked is None:
                return
            if asked.answer is not None or time.monotonic() >= asked.deadline:
                continue
            started = time.monotonic()
            try:
                answer = Answer(asked.ask(asked.deadline))
            except (ConcordiaError, OSError) as error:
                answer = Answer(None, str(error))
            # the thread's guest door: a question that fails is a cold start, said in its event
            except Exception as error:
                answer = Answer(None, f"{type(error).__name__}: {error}")
            now = time.monotonic()
            answer = replace(answer, took_s=now - started, ended=now)
            with self._done:
                if asked.answer is None:
                    asked.answer = answer
                self._done.notify_all()
