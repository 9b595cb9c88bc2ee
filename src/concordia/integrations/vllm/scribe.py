"""The scheduler side's own stream: block keys, events, endings, and the words that the detector
reads.

Owns: one host Checkpointer with a stream of kind WRITER_SCHEDULER, and a thread for what is slow:
the heartbeat, the journal's list of known keys, endings that must not come too early. Promises: no
call waits for the journal or its owner; what cannot be written is said once in the log. Called by
the scheduler side. It does not decide what is written.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.errors import ConcordiaError, RingFull
from concordia.integrations.vllm.door import logger
from concordia.integrations.vllm.settings import Settings
from concordia.integrations.vllm.step_writes import KeyNote
from concordia.journal.client import JournalClient
from concordia.journal.key_changes import KeyNews
from concordia.journal.record import request_key
from concordia.runtime.ring import Ticket

_KEY_ENTRY: Final = struct.Struct("<IIQQ")
_LOW: Final = 0xFFFFFFFFFFFFFFFF


@dataclass(slots=True)
class _Noted:
    """A note on its way; without it blocks that only a key names would be lost, so it is written
    again until its bound.
    """

    note: KeyNote
    payload: bytes
    step: int
    until: float
    ticket: Ticket | None = None


class Scribe:
    """Writes what the scheduler side knows."""

    def __init__(
        self, settings: Settings, client: JournalClient, *, layout_hash: int, world: int
    ) -> None:
        self._client = client
        self._layout_hash = layout_hash
        self._world = world
        self._attachment = client.open_stream(
            writer_kind=abi.WRITER_SCHEDULER,
            rank=0,
            world=world,
            replica=settings.replica,
            layout_hash=layout_hash,
            label="vllm scheduler",
        )
        try:
            self._checkpointer = Checkpointer.open("host", self._attachment.target, lanes=1)
        except BaseException:
            self._attachment.close()
            raise
        self._waiting = 0
        self._step = 0
        self._lock = threading.Lock()
        self._notes: deque[_Noted] = deque()  # handed in and not seen committed yet
        self._unnoted: list[str] = []
        self._endings: deque[tuple[float, int, int, int]] = deque()
        self._news: deque[tuple[KeyNews, int]] = deque()
        self._cursor = 0  # of the last of them
        self._has_complained = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="concordia-scribe", daemon=True)
        self._thread.start()

    def announce(self, step: int, tokens: int, waiting: int) -> None:
        """A step starts."""
        self._step, self._waiting = step, waiting
        self._checkpointer.heartbeat(waiting)
        if tokens:
            self._checkpointer.announce_step(step, tokens)

    def done(self, step: int) -> None:
        """A step has ended on every rank."""
        self._checkpointer.step_done(step)

    def rest(self) -> None:
        """No step will be announced any more: what the detector sees must not look like a step that
        never ends.
        """
        self._waiting = 0
        self._checkpointer.step_done(self._step)
        self._checkpointer.heartbeat(0)

    def note_keys(self, note: KeyNote, *, step: int) -> None:
        """Which keys blocks of a request have."""
        payload = b"".join(
            _KEY_ENTRY.pack(index, 0, key & _LOW, key >> 64) for index, key in note.entries
        )
        noted = _Noted(note, payload, step, time.monotonic() + config.WAIT_TASK_S)
        self._submit_note(noted)
        with self._lock:
            self._notes.append(noted)

    def take_unnoted(self) -> list[str]:
        """Requests whose keys could not be written within their bound, since the last call."""
        with self._lock:
            lost, self._unnoted = self._unnoted, []
        return lost

    def event(self, facts: dict[str, Any]) -> None:
        """What happened to a request, for the router and for people."""
        key = request_key(str(facts.get("request", "")))
        self._append(
            json.dumps(facts).encode(), kind=abi.KIND_EVENT, key=key, incarnation=0, step=self._step
        )

    def unprotected(self) -> None:
        """One request more has lost protection."""
        self._checkpointer.count_unprotected()

    def end(self, key: int, *, incarnation: int, tokens: int) -> None:
        """A request that no router owns has ended; said a little later, when its last blocks are
        in.
        """
        self._endings.append((time.monotonic() + config.FINISH_LINGER_S, key, incarnation, tokens))

    def take_news(self) -> list[tuple[KeyNews, int]]:
        """What changed in the journal's keys, as it was read, and the step before which ours must
        be among them.
        """
        if not self._news:
            return []
        with self._lock:
            news, self._news = self._news, deque()
        return list(news)

    def close(self) -> None:
        """Say the endings that are due, and end the stream."""
        self._stop.set()
        self._thread.join(config.WAIT_TASK_S)
        self._follow_notes()
        self._say_endings(now=float("inf"))
        self._checkpointer.close()
        self._attachment.close()

    def _append(
        self, payload: bytes, *, kind: int, key: int, incarnation: int, step: int, tokens: int = 0
    ) -> None:
        try:
            self._checkpointer.append_bytes(
                payload, kind=kind, key=key, incarnation=incarnation, token_end=tokens, step=step
            )
        except ConcordiaError as error:
            self._complain(f"a record of kind {kind} was not written: {error}")

    def _submit_note(self, noted: _Noted) -> None:
        note = noted.note
        try:
            noted.ticket = self._checkpointer.append_bytes(
                noted.payload,
                kind=abi.KIND_BLOCK_KEY,
                key=note.key,
                incarnation=note.incarnation,
                step=noted.step,
            )
        except RingFull:
            noted.ticket = None

    def _follow_notes(self) -> None:
        """Retire notes that are committed, write again those that found the journal full, give up
        those past their bound.
        """
        with self._lock:
            notes, self._notes = self._notes, deque()
        for noted in notes:
            done = None if noted.ticket is None else self._checkpointer.result(noted.ticket)
            if done is not None and done.is_ok:
                continue
            if time.monotonic() >= noted.until:
                with self._lock:
                    self._unnoted.append(noted.note.request)
                continue
            if noted.ticket is None or done is not None:
                self._submit_note(noted)
            with self._lock:
                self._notes.append(noted)

    def _run(self) -> None:
        refresh_at = time.monotonic() + config.KNOWN_KEYS_REFRESH_S
        step_before = 0
        while not self._stop.wait(config.HEARTBEAT_S):
            now = time.monotonic()
            try:
                self._checkpointer.heartbeat(self._waiting)
                self._follow_notes()
                self._say_endings(now=now)
                if now >= refresh_at:
                    refresh_at = now + config.KNOWN_KEYS_REFRESH_S
                    step, step_before = step_before, self._step
                    self._refresh(step)
            except (ConcordiaError, OSError) as error:
                self._complain(str(error))

    def refresh(self) -> None:
        """Read the journal's keys now (at start, before the first request)."""
        self._read_news(0)

    def _refresh(self, before_step: int) -> None:
        """What changed is read; all keys only where nobody took what was read before."""
        with self._lock:
            before_step = min([before_step, *(noted.step for noted in self._notes)])
            if len(self._news) >= config.KEY_NEWS_MAX:
                self._news.clear()
                self._cursor = 0
        self._read_news(before_step)

    def _read_news(self, before_step: int) -> None:
        news = self._client.key_news(
            layout_hash=self._layout_hash, world=self._world, after=self._cursor
        )
        with self._lock:
            if self._news and self._news[-1][0].is_nothing:
                self._news.pop()  # an idle engine has many of these
            self._news.append((news, before_step))
            self._cursor = news.cursor

    def _say_endings(self, *, now: float) -> None:
        while self._endings and self._endings[0][0] <= now:
            _, key, incarnation, tokens = self._endings.popleft()
            self._append(
                b"",
                kind=abi.KIND_FINISH,
                key=key,
                incarnation=incarnation,
                step=self._step,
                tokens=tokens,
            )

    def _complain(self, words: str) -> None:
        if not self._has_complained:
            self._has_complained = True
            logger.warning("Concordia's scheduler stream: %s (said once)", words)
