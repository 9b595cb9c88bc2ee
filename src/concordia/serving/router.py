"""Requests that outlive a replica.

Owns: the table of flights and what happens to them when a replica fails. Promises: a flight sits on
one replica at a time; after a fault all flights of that replica become one cohort; nothing but the
recovery timeout, a refusal by vLLM or a regenerated answer that differs ends a flight with an
error; a client that leaves is forgotten at once. Called by the server; the replica set calls back
with faults. Does not detect, kill or start anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from concordia import config
from concordia.errors import RequestRefused, UpstreamBroken
from concordia.serving.admission import Admission, Turnstile, unavailable
from concordia.serving.errands import Errands
from concordia.serving.fault_desk import FaultDesk, ReplicaSet
from concordia.serving.flight import Flight, ReplicaLike
from concordia.serving.flight_table import FlightTable
from concordia.serving.generation import Generation
from concordia.serving.metrics import Metrics
from concordia.serving.model_facts import ModelFacts
from concordia.serving.need import Defaults
from concordia.serving.openai_format import Writer
from concordia.serving.piece import Piece
from concordia.serving.recorder import Recorder
from concordia.serving.renderer import Renderer
from concordia.serving.request import Endpoint, GenerationRequest, Sampler
from concordia.serving.settlement import Settlement
from concordia.serving.submission import CohortTicket
from concordia.serving.tokenizer import Tokenizer
from concordia.serving.upstream import EventStream, Upstream, json_headers

COMPLETIONS: Final = Endpoint.COMPLETIONS.value


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """How the router serves."""

    recovery_timeout_s: float = config.RECOVERY_TIMEOUT_S
    requests_held_max: int = config.REQUESTS_HELD_MAX
    restore: bool = True  # False replays by prefill: the control that a restore must be told from
    commits_before_emit: bool = False
    sampler: Sampler = Sampler.GENERATOR
    defaults: Defaults = field(default_factory=Defaults)
    chat_blocker: str | None = None  # why no chat can be continued: a reasoning parser, say
    upstream_headers: Mapping[str, str] = field(default_factory=dict)


class Router:
    """Call `start`, then `generate` for each request; `stop` ends what is left."""

    def __init__(
        self,
        replica_set: ReplicaSet,
        recorder: Recorder | None,
        tokenizer: Tokenizer | None,
        settings: RouterSettings,
        metrics: Metrics,
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.flights = FlightTable()
        self.upstream = Upstream(settings.upstream_headers)
        self.admission = Admission(
            active=lambda: replica_set.active,
            load=self.flights.carried_by,
            wait_s=settings.recovery_timeout_s,
            held_max=settings.requests_held_max,
        )
        self._recorder = recorder
        self.settlement = Settlement(recorder, metrics, restores=settings.restore)
        self.faults = FaultDesk(
            self,
            replica_set,
            self.admission,
            metrics,
            recovery_timeout_s=settings.recovery_timeout_s,
        )
        self._renderer = Renderer(
            self.upstream,
            self.admission,
            report=self.faults.report,
            wait_s=settings.recovery_timeout_s,
        )
        self._turnstile = Turnstile()
        self._orders = itertools.count(1)
        self._errands = Errands()
        self._entered_count = 0
        self._model = ModelFacts()

    # --- life

    async def start(self) -> None:
        """Open the client session, learn what the model allows, listen for faults; needs an active
        replica.
        """
        await self.upstream.start()
        self.faults.start()
        if self._recorder is not None:
            self.spawn(self._recorder.follow(self.metrics, lambda: list(self.flights)))
        self.metrics.gauge("requests_in_flight", "requests being served", lambda: self.in_flight)
        self.metrics.gauge(
            "requests_held", "requests that wait for an engine", lambda: self.admission.held_count
        )
        await self._model.learn(self.upstream, await self.admission.acquire())

    async def stop(self) -> None:
        """End what is left and close the session."""
        for flight in self.flights:
            flight.fail(unavailable("the server stops"))
        await self._errands.stop()
        await self.upstream.close()
        self.faults.stop()

    async def drain(self, timeout_s: float) -> int:
        """Admit nothing more and wait for what runs; returns how many requests still ran at the
        bound.
        """
        self.admission.is_draining = True
        bound = time.monotonic() + timeout_s
        while self.in_flight and time.monotonic() < bound:
            await asyncio.sleep(config.REPLACE_POLL_S)
        return self.in_flight

    @property
    def in_flight(self) -> int:
        """All that a client waits for, whether an engine has it yet or not."""
        return len(self.flights) + self._entered_count

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Count a request that has come in while it has no flight: it waits, is rendered, or is
        passed through.
        """
        self._entered_count += 1
        try:
            yield
        finally:
            self._entered_count -= 1

    @property
    def chat_blocker(self) -> str | None:
        """Why no chat can be continued here, if so."""
        if self.tokenizer is not None and self.tokenizer.model_type == "gpt_oss":
            return "harmony"  # vLLM renders and parses its chats by a protocol of their own
        return self.settings.chat_blocker

    def status(self) -> dict[str, Any]:
        """Counts and faults, for `concordia status`."""
        return {
            "in_flight": self.in_flight,
            "held": self.admission.held_count,
            "failovers_running": self.faults.running_count,
            "is_draining": self.admission.is_draining,
            "counters": self.metrics.totals(),
            "levels": dict(self.metrics.by_label("levels")),
            "faults": list(self.metrics.faults),
            "recoveries": list(self.metrics.recoveries),
        }

    # --- new work

    async def generate(
        self, request: GenerationRequest, *, client_id: str, headers: Mapping[str, str]
    ) -> Generation:
        """Admit a request; returns once vLLM has accepted all of it. Raises RequestRefused."""
        assert self.tokenizer is not None, "without a tokenizer everything is passed through"
        self.admission.check()
        order = next(self._orders)
        prefix = "chatcmpl" if request.is_chat else "cmpl"
        writer = Writer(request, self.tokenizer, f"{prefix}-{client_id}", int(time.time()))
        writer.fingerprint = self._model.fingerprint
        with self._turnstile.enter(request.cohort.name if request.cohort else None) as turn:
            with self.entered():
                prompts = await self._renderer.render(request, headers)
                await turn.wait()
            flights: list[Flight] = []
            generation = Generation(self, flights, writer)
            try:
                for index in range(len(prompts) * request.count):
                    prompt = prompts[index // request.count]
                    flights.append(self._make_flight(request, order, index, prompt, headers))
                    self._keep(flights[-1])
                for flight in flights:
                    flight.posting = self.spawn(self.submit_alone(flight))
                await generation.ready()
            except BaseException:
                generation.close()
                raise
        self.metrics.protected(
            "sampler not restorable" if request.draw is Sampler.GENERATOR else ""
        )
        return generation

    # --- what a generation asks of its keeper

    def suspect_stream(self, flight: Flight, stream: EventStream, detail: str) -> None:
        """A stream broke under its reader; nothing to do when the flight has been moved already."""
        if flight.stream is stream and flight.replica is not None:
            self.faults.suspect(flight, flight.replica, detail)

    async def may_emit(self, flight: Flight, piece: Piece) -> None:
        """Note what was received and, in that mode, wait until the state it depends on is
        committed.
        """
        self._model.fingerprint = flight.fingerprint or self._model.fingerprint
        self.metrics.count("tokens", len(piece.ids))
        if flight.broken_at is not None and piece.ids:
            self.metrics.resumed(time.monotonic() - flight.broken_at)
            flight.broken_at = None
            flight.has_resumed()
        if self._recorder is None:
            return
        self._recorder.tokens(flight, piece)
        if self.settings.commits_before_emit and piece.ids and not flight.is_unprotected:
            position = len(flight.prompt) + piece.start + len(piece.ids) - 1
            if not await self._recorder.wait_committed(flight, position):
                flight.is_unprotected = True
                self.metrics.unprotected("commit-late")

    def landed(self, flight: Flight) -> None:
        """The flight has ended, or its client has gone."""
        if not self.flights.discard(flight):
            return
        flight.is_left = not flight.is_done
        flight.expect_by(None)
        if flight.posting is not None:
            flight.posting.cancel()
        if flight.stream is not None and not self.faults.is_moving(flight):
            flight.stream.close()
        if self._recorder is not None:
            self._recorder.finish(flight)
        if flight.failovers and flight.is_done:
            self.spawn(self.settlement.close(flight))

    # --- what the fault desk asks

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self._errands.spawn(work)

    async def submit(
        self, flight: Flight, replica: ReplicaLike, ticket: CohortTicket | None
    ) -> bool:
        """Post one flight; False when the replica broke. A refusal by vLLM ends the flight."""
        body = flight.submission(ticket, restores=self.settings.restore)
        headers = json_headers({**flight.headers, "x-request-id": flight.name})
        try:
            stream = await self.upstream.post_stream(
                replica.base_url + COMPLETIONS, body, headers=headers
            )
        except RequestRefused as error:
            flight.fail(error)
            return True
        except UpstreamBroken as error:
            self.faults.suspect(flight, replica, str(error))
            return False
        flight.seat(stream)
        return True

    async def submit_alone(self, flight: Flight) -> None:
        """The first submission, or that of a flight that was cut off without a fault of its
        replica.
        """
        ticket = flight.wished_ticket if flight.incarnation == 0 else None
        try:
            flight.replica = await self.admission.acquire(
                lambda: self.flights.shared_replica(flight)
            )
        except RequestRefused as error:
            flight.fail(error)
            return
        await self.submit(flight, flight.replica, ticket)

    # --- helpers

    def _make_flight(
        self,
        request: GenerationRequest,
        order: int,
        index: int,
        prompt: Sequence[int],
        headers: Mapping[str, str],
    ) -> Flight:
        assert self.tokenizer is not None
        return Flight(
            request,
            name=uuid.uuid4().hex,
            order=(order, index),
            index=index,
            prompt=prompt,
            headers=headers,
            seed=request.seed + index % request.count,
            context_tokens=self._model.context_tokens,
            defaults=self.settings.defaults,
            tokenizer=self.tokenizer,
        )

    def _keep(self, flight: Flight) -> None:
        """Take it into the table, until it has landed."""
        self.flights.add(flight)
        if self._recorder is not None:
            self._recorder.admit(flight)
