"""One answer in the making: what it is asked for, what has been received, where it goes on.

Owns: the ids and log-probabilities of one answer and its place in the life of a request (States).
Promises: an id is taken once, whatever was sent twice; the next submission starts exactly after the
last id taken; a regenerated answer that differs from what was sent ends with an error, not with a
different text. Called by the router (moves it) and its generation (reads it). Does no input or
output of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from concordia import config
from concordia.errors import RequestRefused, UpstreamBroken
from concordia.journal.record import request_key
from concordia.serving.account import Account
from concordia.serving.detokenizer import Detokenizer
from concordia.serving.need import Defaults, Level
from concordia.serving.piece import Piece, TokenLogprobs, read_logprobs
from concordia.serving.recovery_times import RecoveryTimes
from concordia.serving.request import GenerationRequest, Sampler
from concordia.serving.seam import EchoDiffers, Seam
from concordia.serving.seat import Seat
from concordia.serving.submission import Asking, CohortTicket, token_limit
from concordia.serving.tokenizer import Tokenizer
from concordia.serving.upstream import EventStream


class ReplicaLike(Protocol):
    """What the router knows of a replica."""

    @property
    def name(self) -> str: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def base_url(self) -> str: ...


class Flight:
    """One answer; `order` is its arrival among all answers of this router, `name` its identity in
    the journal.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        name: str,
        order: tuple[int, int],
        index: int,
        prompt: Sequence[int],
        headers: Mapping[str, str],
        seed: int,
        context_tokens: int,
        defaults: Defaults,
        tokenizer: Tokenizer,
    ) -> None:
        self.request = request
        self.name = name
        self.key = request_key(name)
        self.order = order
        self.index = index
        self.prompt = prompt
        self.headers = headers
        self.ids: list[int] = []
        self.replica: ReplicaLike | None = None
        self.posting: asyncio.Task[None] | None = None
        self.is_done = False
        self.is_cut = False  # ended by a stop string, which the engine does not know of
        self.is_left = False  # the client has gone
        self.attempts = 0  # submissions since the last token
        self.failovers = 0
        # by when the next token must have come, once something broke
        self.deadline: float | None = None
        self.broken_at: float | None = None
        self.model = ""
        self.fingerprint: str | None = None
        self.usage_details: Mapping[str, Any] | None = None
        self.is_unprotected = False
        self.last_at = time.monotonic()  # last sign of life of its stream
        self.account = Account(request.draw)
        limit = token_limit(request, len(prompt), context_tokens, defaults)
        self._asking = Asking(request, prompt, seed, limit, defaults)
        self._seam = Seam(len(prompt))
        # ids after which the next submission goes on, if fewer than there are
        self._step_back: int | None = None
        self._seat = Seat()
        self._times: RecoveryTimes | None = None  # of the failover that moved it last
        self._text = Detokenizer(
            tokenizer,
            prompt,
            skips_special=request.skips_special,
            has_spaces=request.has_spaces,
            stop=request.stop,
            includes_stop=request.includes_stop,
            min_tokens=request.min_tokens,
        )

    @property
    def tokens_known(self) -> int:
        return len(self.prompt) + len(self.ids)

    @property
    def regenerates(self) -> bool:
        return self.request.need is Level.REGENERATE and bool(self.ids)

    @property
    def can_step_back(self) -> bool:
        """Whether its next tokens can be generated once more and come out the same: no draw, or
        draws by position alone.
        """
        return not self.regenerates and self.request.draw is not Sampler.GENERATOR

    @property
    def incarnation(self) -> int:
        return self._seam.incarnation

    def sits_on(self, incarnation: int) -> bool:
        return self.replica is not None and self.replica.incarnation == incarnation

    # --- the router's side

    def submission(self, ticket: CohortTicket | None, *, restores: bool) -> dict[str, Any]:
        """The body of the next upstream request; raises the incarnation."""
        self.attempts += 1
        self.account.go_on(self.tokens_known, regenerates=self.regenerates)
        done, self._step_back = 0 if self.regenerates else self._step_back, None
        done = len(self.ids) if done is None else done
        self._seam.go_on(after=done, known=len(self.ids))
        body = self._asking.body(self.ids[:done])
        body["kv_transfer_params"] = {
            **(self.request.upstream.get("kv_transfer_params") or {}),
            "concordia": {
                "request": self.name,
                "incarnation": self.incarnation,
                "tokens": len(body["prompt"]),
                "bounds": {str(number): tokens for number, tokens in self._seam.bounds.items()},
                "restore": restores and self.request.allows_restore and self.incarnation > 1,
                "cohort": None if ticket is None else ticket.body(),
            },
        }
        return body

    def step_back(self, tokens: int) -> None:
        """Let the next submission go on after this many tokens of the answer; those that come again
        are compared, not sent.
        """
        assert self.can_step_back or tokens == len(self.ids)
        self._step_back = tokens

    @property
    def wished_ticket(self) -> CohortTicket | None:
        """The cohort that the client asked for, if any."""
        wish = self.request.cohort
        if wish is None:
            return None
        return CohortTicket(
            config.CLIENT_COHORT_PREFIX + wish.name, wish.size, config.RESTORE_WAIT_S
        )

    def shares_cohort(self, other: Flight) -> bool:
        """Whether both belong to one cohort that their client asked for; a flight shares its own
        with itself.
        """
        mine, its = self.request.cohort, other.request.cohort
        return mine is not None and its is not None and mine.name == its.name

    @property
    def stream(self) -> EventStream | None:
        """The stream that its ids come from; None while it has none."""
        return self._seat.stream

    def seat(self, stream: EventStream) -> None:
        """Give the answer the stream that its ids come from."""
        self._seat.give(stream)

    def unseat(self, reason: str, *, deadline: float) -> None:
        """Take the stream away after a fault; the reader waits for the next seat."""
        if self.posting is not None:
            self.posting.cancel()
            self.posting = None
        self._seat.clear(reason)
        if self.deadline is None:
            self.deadline = deadline
        if self.broken_at is None:
            self.broken_at = time.monotonic()

    def expect_by(self, times: RecoveryTimes | None) -> None:
        """Whoever follows its way to its next token; one at a time."""
        before, self._times = self._times, times
        if before is not None and before is not times:
            before.gone(self.name)
        if times is not None:
            times.expect(self.name)

    def has_resumed(self) -> None:
        """Its first token after a fault goes out."""
        if self._times is not None:
            self._times.resumed(self.name)

    def fail(self, error: Exception) -> None:
        """End the answer with an error at the reader's next look."""
        self._seat.fail(error)

    # --- the reader's side

    async def next_stream(self) -> EventStream:
        """The stream to read; waits for it. The router's clock ends the wait at the deadline that a
        fault set.
        """
        return await self._seat.next()

    def absorb(self, event: Mapping[str, Any]) -> Piece | None:
        """Take one upstream event; None when it adds nothing that the client has not got."""
        self.last_at = time.monotonic()
        self._learn(event)
        if not event["choices"]:
            return None
        choice = event["choices"][0]
        ids: list[int] = choice.get("token_ids") or []
        finish: str | None = choice["finish_reason"]
        if finish == "abort":
            raise UpstreamBroken("the engine aborted the request")
        found = choice.get("logprobs")
        rows = None if found is None else read_logprobs(found)
        again = self._again(ids, is_end=finish is not None)
        ids = ids[again:]
        rows = None if rows is None else rows[again:]
        if not ids and finish is None:
            return None
        return self._take(ids, rows, finish, choice.get("stop_reason"))

    def trail(self, event: Mapping[str, Any]) -> None:
        """Look at an event that comes after the end of the answer: usage and fingerprint."""
        self._learn(event)

    def last_piece(self) -> Piece | None:
        """The end of an answer that had all its tokens before its replica died; None while it lacks
        some.
        """
        if len(self.ids) < self._asking.limit or self.is_done:
            return None
        return self._take([], None if self.request.logprobs is None else [], "length", None)

    def _take(
        self,
        ids: list[int],
        rows: list[TokenLogprobs] | None,
        finish: str | None,
        stop_reason: str | int | None,
    ) -> Piece:
        kept, met = self._text.push(ids, is_stopped=finish == "stop")
        if met is not None:
            self.is_cut = True
            ids, finish, stop_reason = ids[:kept], "stop", met
            rows = None if rows is None else rows[:kept]
        start = len(self.ids)
        self.ids.extend(ids)
        if ids:
            self.attempts = 0
            self.deadline = None
        self.is_done = finish is not None
        text = self._text.take(is_finished=self.is_done)
        return Piece(self.index, text, start, ids, rows, finish, stop_reason, start == 0)

    def _again(self, ids: Sequence[int], *, is_end: bool) -> int:
        """How many of these ids the client already has."""
        try:
            return self._seam.take(ids, self.ids, is_end=is_end)
        except EchoDiffers as error:
            if self.regenerates:
                raise _differs(error.index) from error
            # It was stepped back so that its cohort goes on in one step; it can as well go on by
            # itself, from all its ids.
            raise UpstreamBroken(str(error)) from error

    def _learn(self, event: Mapping[str, Any]) -> None:
        self.model = self.model or event.get("model", "")
        self.fingerprint = event.get("system_fingerprint") or self.fingerprint
        usage = event.get("usage")
        if usage and self.failovers == 0:
            self.usage_details = usage.get("prompt_tokens_details")


def _differs(index: int) -> RequestRefused:
    return RequestRefused(
        f"the engine failed; its successor generated another token at position {index} of the "
        "answer, "
        "so the answer cannot go on",
        status=500,
        kind="ContinuationError",
    )
