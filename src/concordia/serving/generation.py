"""One client request being answered: its flights, read and written out.

Owns: the order in which a client gets things: role, tokens, finish, usage, end. Promises: each
exactly once; the answers of a request with several choices come as their tokens come; when the
client goes, its flights go. Made by the router, driven by the server. Does not know replicas: a
flight hands it one event stream after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Protocol

from concordia import config
from concordia.errors import RequestRefused, UpstreamBroken
from concordia.serving.flight import Flight
from concordia.serving.need import Level
from concordia.serving.openai_format import DONE, Usage, Writer, error_event
from concordia.serving.piece import Piece, joined
from concordia.serving.settlement import Settlement
from concordia.serving.upstream import EventStream


class FlightKeeper(Protocol):
    """What a generation needs of the router."""

    def suspect_stream(self, flight: Flight, stream: EventStream, detail: str) -> None: ...
    async def may_emit(self, flight: Flight, piece: Piece) -> None: ...
    def landed(self, flight: Flight) -> None: ...
    @property
    def settlement(self) -> Settlement: ...


class Generation:
    """Iterate `events()` for a stream or await `whole()` for one response, after `ready()`."""

    def __init__(self, keeper: FlightKeeper, flights: Sequence[Flight], writer: Writer) -> None:
        self.flights = flights
        self.writer = writer
        self._keeper = keeper
        self._fingerprint: str | None = None

    async def ready(self) -> None:
        """Return once vLLM has accepted every part; raises RequestRefused while the status can
        still say so.
        """
        try:
            for flight in self.flights:
                await flight.next_stream()
        except BaseException:
            self.close()
            raise

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The bytes of the event stream; an error after its start becomes its last event."""
        opened: set[int] = set()
        by_index = {flight.index: flight for flight in self.flights}
        try:
            async for piece in self._pieces():
                flight = by_index[piece.index]
                if not opened:
                    self.writer.begin(flight.model)
                self.writer.fingerprint = flight.fingerprint or self.writer.fingerprint
                event = self.writer.event(flight, piece)
                if flight.index not in opened:
                    opened.add(flight.index)
                    event = self.writer.opening(flight, flight.index) + event
                yield event
            self._learn_fingerprint()
            yield self.writer.closing(self._usage(), await self._report()) + DONE
        except RequestRefused as error:
            yield error_event(error) + DONE
        finally:
            self.close()

    async def whole(self) -> bytes:
        """The one response; raises RequestRefused."""
        pieces: dict[int, list[Piece]] = {flight.index: [] for flight in self.flights}
        try:
            async for piece in self._pieces():
                pieces[piece.index].append(piece)
            self._learn_fingerprint()
            self.writer.begin(self.flights[0].model)
            has_logprobs = self.writer.request.logprobs is not None
            answers = [
                (flight, joined(pieces[flight.index], has_logprobs=has_logprobs))
                for flight in self.flights
            ]
            return self.writer.whole(answers, self._usage(), await self._report())
        finally:
            self.close()

    def close(self) -> None:
        """Let every flight go that has not ended by itself."""
        for flight in self.flights:
            self._keeper.landed(flight)

    async def _pieces(self) -> AsyncIterator[Piece]:
        if len(self.flights) == 1:
            async for piece in self._read(self.flights[0]):
                yield piece
            return
        queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(config.PIECES_AHEAD_MAX)

        async def pump(flight: Flight) -> None:
            try:
                async for piece in self._read(flight):
                    await queue.put(piece)
                await queue.put(None)
            except Exception as error:  # handed to the one who writes, who raises it
                await queue.put(error)

        pumps = [asyncio.create_task(pump(flight)) for flight in self.flights]
        try:
            running = len(pumps)
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in pumps:
                task.cancel()

    async def _read(self, flight: Flight) -> AsyncIterator[Piece]:
        """The pieces of one answer, over as many streams as it takes."""
        while not flight.is_done:
            stream = await flight.next_stream()
            try:
                async for event in stream:
                    # Once the answer has ended, the rest of the stream is only its usage.
                    piece = flight.absorb(event) if not flight.is_done else flight.trail(event)
                    if piece is not None:
                        await self._keeper.may_emit(flight, piece)
                        yield piece
                        if flight.is_done and piece.finish_reason == "stop" and flight.is_cut:
                            break
            except UpstreamBroken as error:
                if flight.is_done:
                    break
                last = flight.last_piece()
                if last is not None:
                    yield last
                    break
                self._keeper.suspect_stream(flight, stream, str(error))
            else:
                if not flight.is_done:
                    self._keeper.suspect_stream(flight, stream, "the answer ended without a reason")
        self._keeper.landed(flight)

    def _learn_fingerprint(self) -> None:
        for flight in self.flights:
            self.writer.fingerprint = flight.fingerprint or self.writer.fingerprint

    def _usage(self) -> Usage:
        per_prompt = self.writer.request.count
        prompts = sum(len(flight.prompt) for flight in self.flights[::per_prompt])
        details = self.flights[0].usage_details if len(self.flights) == 1 else None
        return Usage(prompts, sum(len(flight.ids) for flight in self.flights), details)

    async def _report(self) -> dict[str, Any] | None:
        if not self.writer.request.wants_report:
            return None
        await self._keeper.settlement.settle(self.flights)
        worst = max((flight.account.level for flight in self.flights), default=Level.STATE_EXACT)
        return {
            "level": worst.label,
            "restored_tokens": sum(flight.account.restored_tokens for flight in self.flights),
            "recomputed_tokens": sum(flight.account.recomputed_tokens for flight in self.flights),
            "failovers": max(flight.failovers for flight in self.flights),
        }
