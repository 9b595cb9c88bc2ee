"""What the router writes into the journal, and what it reads from it.

Owns: the router's own stream (request parameters, token ids received) and its questions to the
owner (what is committed). Promises: the event loop never waits for the journal: records are queued
and written by one thread, questions are asked on others; a journal that is full or gone costs
protection and is counted, never a token. Called by the router. Does not restore anything
(connectors do) and does not read events (journal_events does).
"""

from __future__ import annotations

import array
import asyncio
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from concordia import abi, config
from concordia.errors import ConcordiaError
from concordia.serving.flight import Flight
from concordia.serving.journal_events import EventSource, JournalEvents, Outcome
from concordia.serving.metrics import Metrics
from concordia.serving.piece import Piece

log = logging.getLogger(__name__)


class JournalLike(EventSource, Protocol):
    """The owner's answers, as journal.client gives them; calls block for at most a second or so."""

    def committed(self, key: int) -> int: ...
    def committed_all(self, keys: Sequence[int]) -> list[int]: ...
    def finish(self, key: int) -> None: ...
    def stats(self) -> dict[str, Any]: ...


class AppenderLike(Protocol):
    """The part of a checkpointer that the router uses."""

    def append_bytes(
        self,
        payload: bytes,
        *,
        kind: int,
        key: int,
        incarnation: int,
        token_start: int = 0,
        token_end: int = 0,
        step: int = 0,
    ) -> Any: ...


class _Parameters(NamedTuple):
    key: int
    payload: bytes


class _Tokens(NamedTuple):
    key: int
    incarnation: int
    start: int
    ids: Sequence[int]


class _Finish(NamedTuple):
    key: int


_Item = _Parameters | _Tokens | _Finish | None  # None ends the thread


class Recorder:
    """Use as a context manager."""

    def __init__(self, journal: JournalLike, appender: AppenderLike | None) -> None:
        self.dropped_count = 0
        self._journal = journal
        self._appender = appender
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._events = JournalEvents(journal)
        self._waiting: dict[int, list[tuple[int, asyncio.Future[bool]]]] = {}
        self._watch: asyncio.Task[None] | None = None

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join(config.WAIT_TASK_S)

    # --- written

    def admit(self, flight: Flight) -> None:
        """Parameters and prompt of a new request."""
        parameters = {"request": flight.name, "parameters": dict(flight.request.upstream)}
        payload = json.dumps(parameters, separators=(",", ":")).encode()
        self._queue.put(_Parameters(flight.key, payload))
        self._queue.put(_Tokens(flight.key, 1, 0, flight.prompt))

    def tokens(self, flight: Flight, piece: Piece) -> None:
        """Ids that have been received. Called for every event: what can wait is done by the
        thread.
        """
        if piece.ids:
            start = len(flight.prompt) + piece.start
            self._queue.put(_Tokens(flight.key, flight.incarnation, start, piece.ids))

    def finish(self, flight: Flight) -> None:
        """The request has ended: its tails are dead."""
        self._queue.put(_Finish(flight.key))

    # --- read

    async def committed(self, flights: Sequence[Flight]) -> list[int]:
        """Tokens of each of these requests that the journal has; 0 when nobody answers. One
        question: the way to the next engine leads through here.
        """
        return await asyncio.to_thread(self._ask_all, [flight.key for flight in flights])

    async def wait_committed(self, flight: Flight, position: int) -> bool:
        """Wait until everything below `position` is committed; False at the bound."""
        key = flight.key
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append((position, done))
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_commits())
        try:
            async with asyncio.timeout(config.COMMIT_WAIT_S):
                return await done
        except TimeoutError:
            return False
        finally:
            left = [entry for entry in self._waiting.get(key, []) if entry[1] is not done]
            if left:
                self._waiting[key] = left
            else:
                self._waiting.pop(key, None)

    async def outcome(self, flight: Flight) -> Outcome | None:
        """What the connector says of the flight's present incarnation; None when it says
        nothing.
        """
        return await self._events.outcome(flight.name, flight.incarnation)

    async def follow(self, metrics: Metrics, flights: Callable[[], Sequence[Flight]]) -> None:
        """Keep the metrics up to date with the journal; runs until it is cancelled."""
        self._events.on_event = metrics.event
        while True:
            await self._events.poll()
            metrics.journal(await self.stats())
            looked_at = list(flights())[: config.LAG_SAMPLE]
            known = [flight.tokens_known - 1 for flight in looked_at]
            lags = zip(known, await self.committed(looked_at), strict=True)
            metrics.committed_lag = max((known - count for known, count in lags), default=0)
            await asyncio.sleep(config.EVENTS_POLL_S)

    async def stats(self) -> dict[str, Any]:
        """The owner's own numbers; empty when nobody answers."""
        try:
            return await asyncio.to_thread(self._journal.stats)
        except (ConcordiaError, OSError):
            return {}

    def _ask_all(self, keys: Sequence[int]) -> list[int]:
        try:
            return self._journal.committed_all(keys) if keys else []
        except (ConcordiaError, OSError):
            return [0] * len(keys)

    def _ask_committed(self, key: int) -> int:
        try:
            return self._journal.committed(key)
        except (ConcordiaError, OSError):
            return 0

    async def _watch_commits(self) -> None:
        """While somebody waits, ask for all of them and wake those whose state is safe."""
        while self._waiting:
            for key in list(self._waiting):
                count = await asyncio.to_thread(self._ask_committed, key)
                for position, done in self._waiting.get(key, []):
                    if count >= position and not done.done():
                        done.set_result(True)
            await asyncio.sleep(config.COMMIT_POLL_S)

    def _write(self) -> None:
        """The thread: gather what has come in a moment, join token records of one request,
        append.
        """
        while True:
            batch = [self._queue.get()]
            time.sleep(config.RECORD_PERIOD_S)  # many small records become one, and one wake-up
            while not self._queue.empty():
                batch.append(self._queue.get())
            for item in _joined(batch):
                if item is None:
                    return
                self._write_one(item)

    def _write_one(self, item: _Parameters | _Tokens | _Finish) -> None:
        try:
            if isinstance(item, _Finish):
                self._journal.finish(item.key)
            elif self._appender is None:
                return
            elif isinstance(item, _Tokens):
                self._appender.append_bytes(
                    array.array("I", item.ids).tobytes(),
                    kind=abi.KIND_TOKENS,
                    key=item.key,
                    incarnation=item.incarnation,
                    token_start=item.start,
                    token_end=item.start + len(item.ids),
                )
            else:
                self._appender.append_bytes(
                    item.payload, kind=abi.KIND_REQUEST, key=item.key, incarnation=1
                )
        except (ConcordiaError, OSError) as error:
            self.dropped_count += 1
            if self.dropped_count == 1:
                log.warning("the router's records are not kept from now on: %s", error)


def _joined(batch: list[_Item]) -> list[_Item]:
    """Token records of one request that follow each other become one."""
    found: list[_Item] = []
    places: dict[tuple[int, int], int] = {}
    for item in batch:
        if not isinstance(item, _Tokens):
            found.append(item)
            continue
        name = (item.key, item.incarnation)
        last = found[places[name]] if name in places else None
        if isinstance(last, _Tokens) and last.start + len(last.ids) == item.start:
            found[places[name]] = last._replace(ids=[*last.ids, *item.ids])
        else:
            places[name] = len(found)
            found.append(item)
    return found
