"""One answer in the making: what it is asked for, what has been received, where it goes on.

Owns: the ids and log-probabilities of one answer and its place in the life of a request (States). Promises: an id is taken once, whatever was
sent twice; the next submission starts exactly after the last id taken; a regenerated answer that differs from what was sent ends with an
error, not with a different text. Called by the router (moves it) and its generation (reads it). Does no input or output of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import xxhash

from concordia import config
from concordia.errors import RequestRefused, UpstreamBroken
from concordia.serving.detokenizer import Detokenizer
from concordia.serving.need import Defaults, Level
from concordia.serving.openai_format import Piece, TokenLogprobs, read_logprobs
from concordia.serving.request import GenerationRequest, Sampler
from concordia.serving.tokenizer import Tokenizer
from concordia.serving.upstream import EventStream

COMPLETION_TOKENS_DEFAULT: Final = 16  # OpenAI's, for completions that name none
_GOLDEN: Final = 0x9E3779B97F4A7C15  # odd: every incarnation gets another seed
_SEED_MASK: Final = 2**62 - 1


class ReplicaLike(Protocol):
    """What the router knows of a replica."""

    @property
    def name(self) -> str: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def base_url(self) -> str: ...


class OutcomeLike(Protocol):
    """What a connector said of a resumed request."""

    @property
    def level(self) -> Level: ...
    @property
    def restored_tokens(self) -> int: ...
    @property
    def recomputed_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class CohortTicket:
    """Which cohort a submission belongs to; `deadline_s` bounds how long its members wait for each other."""

    name: str
    size: int
    deadline_s: float

    def body(self) -> dict[str, Any]:
        return {"id": self.name, "size": self.size, "deadline_s": self.deadline_s}


class Flight:
    """One answer; `order` is its arrival among all answers of this router, `name` its identity in the journal."""

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
        self.incarnation = 0
        self.replica: ReplicaLike | None = None
        self.stream: EventStream | None = None
        self.posting: asyncio.Task[None] | None = None
        self.is_done = False
        self.is_cut = False  # ended by a stop string, which the engine does not know of
        self.is_left = False  # the client has gone
        self.attempts = 0  # submissions since the last token
        self.failovers = 0
        self.deadline: float | None = (
            None  # by when the next token must have come, once something broke
        )
        self.broken_at: float | None = None
        self.model = ""
        self.fingerprint: str | None = None
        self.usage_details: Mapping[str, Any] | None = None
        self.is_unprotected = False
        self.is_settled = False
        self.last_at = time.monotonic()  # last sign of life of its stream
        self.level = Level.STATE_EXACT
        self.restored_tokens = 0
        self.recomputed_tokens = 0
        self._seed = seed
        self._defaults = defaults
        self._asked = request.max_tokens
        self._limit = _limit(request, len(prompt), context_tokens, defaults)
        self._is_regenerated = False
        self._resumed_at = 0  # tokens known at the last submission
        self._bounds: dict[
            int, int
        ] = {}  # incarnation -> tokens that were known when the next one was submitted
        self._echo: int | None = None  # while regenerating: ids that came again so far
        self._seat: asyncio.Future[EventStream] = asyncio.get_running_loop().create_future()
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

    def sits_on(self, incarnation: int) -> bool:
        return self.replica is not None and self.replica.incarnation == incarnation

    # --- the router's side

    def submission(self, ticket: CohortTicket | None, *, restores: bool) -> dict[str, Any]:
        """The body of the next upstream request; raises the incarnation."""
        self.incarnation += 1
        self.attempts += 1
        self._resumed_at = self.tokens_known
        self._is_regenerated |= self.regenerates
        done = 0 if self.regenerates else len(self.ids)
        self._echo = 0 if self.regenerates else None
        if self.incarnation > 1:
            self._bounds[self.incarnation - 1] = len(self.prompt) + done
        request = self.request
        asked = self._asked if done == 0 and self._asked is not None else self._limit - done
        body: dict[str, Any] = {
            **request.upstream,
            "prompt": [*self.prompt, *self.ids[:done]],
            "stream": True,
            "max_tokens": asked,
            "return_token_ids": True,
        }
        if request.has_usage or not request.is_stream:
            body["stream_options"] = {"include_usage": True}
        if request.min_tokens:
            body["min_tokens"] = max(0, request.min_tokens - done)
        if request.logprobs is not None:
            body |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
        body |= self._drawing(body)
        body["kv_transfer_params"] = {
            **(request.upstream.get("kv_transfer_params") or {}),
            "concordia": {
                "request": self.name,
                "incarnation": self.incarnation,
                "tokens": len(body["prompt"]),
                "bounds": {str(number): tokens for number, tokens in self._bounds.items()},
                "restore": restores and request.allows_restore and self.incarnation > 1,
                "cohort": None if ticket is None else ticket.body(),
            },
        }
        return body

    @property
    def wished_ticket(self) -> CohortTicket | None:
        """The cohort that the client asked for, if any."""
        wish = self.request.cohort
        if wish is None:
            return None
        return CohortTicket(f"client-{wish.name}", wish.size, config.RESTORE_WAIT_S)

    def seat(self, stream: EventStream) -> None:
        """Give the answer the stream that its ids come from."""
        self.stream = stream
        if self._seat.done():
            self._seat = asyncio.get_running_loop().create_future()
        self._seat.set_result(stream)

    def unseat(self, reason: str, *, deadline: float) -> None:
        """Take the stream away after a fault; the reader waits for the next seat."""
        if self.posting is not None:
            self.posting.cancel()
            self.posting = None
        if self._seat.done():
            self._seat = asyncio.get_running_loop().create_future()
        if self.stream is not None:
            stream, self.stream = self.stream, None
            stream.break_off(reason)
        if self.deadline is None:
            self.deadline = deadline
        if self.broken_at is None:
            self.broken_at = time.monotonic()

    def fail(self, error: Exception) -> None:
        """End the answer with an error at the reader's next look."""
        if self._seat.done():
            self._seat = asyncio.get_running_loop().create_future()
        self._seat.set_exception(error)
        self._seat.exception()  # marks it as seen: a reader that has gone never looks
        if self.stream is not None:
            stream, self.stream = self.stream, None
            stream.break_off(str(error))

    def settle(self, outcome: OutcomeLike | None) -> None:
        """Note which level the resumed answer reached; without an outcome everything known was computed again."""
        self.is_settled = True
        self.restored_tokens = 0 if outcome is None else outcome.restored_tokens
        self.recomputed_tokens = self._resumed_at if outcome is None else outcome.recomputed_tokens
        self.level = Level.RE_PREFILL if outcome is None else outcome.level
        if self._is_regenerated:
            self.level = Level.REGENERATE
        elif self.request.draw is Sampler.GENERATOR:
            self.level = max(self.level, Level.SAMPLER_LOST)

    # --- the reader's side

    async def next_stream(self) -> EventStream:
        """The stream to read; waits for it. The router's clock ends the wait at the deadline that a fault set."""
        while True:
            seat = self._seat
            # Not awaited directly: a reader that is cancelled must not cancel the seat with it.
            await asyncio.wait({seat})
            if seat is self._seat:  # else it was taken away again before this reader ran
                return seat.result()

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
        if self._echo is not None:
            again = self._compare(ids)
            ids = ids[again:]
            rows = None if rows is None else rows[again:]
            if self._echo == len(self.ids):
                self._echo = None  # from here on everything is new
            elif finish is not None:
                raise _differs(self._echo)
        if not ids and finish is None:
            return None
        return self._take(ids, rows, finish, choice.get("stop_reason"))

    def trail(self, event: Mapping[str, Any]) -> None:
        """Look at an event that comes after the end of the answer: usage and fingerprint."""
        self._learn(event)

    def last_piece(self) -> Piece | None:
        """The end of an answer that had all its tokens before its replica died; None while it lacks some."""
        if len(self.ids) < self._limit or self.is_done:
            return None
        return self._take([], None if self.request.logprobs is None else [], "length", None)

    def whole(self, pieces: Sequence[Piece]) -> Piece:
        """All pieces as one."""
        rows: list[TokenLogprobs] | None = None if self.request.logprobs is None else []
        for piece in pieces:
            if rows is not None and piece.logprobs is not None:
                rows.extend(piece.logprobs)
        last = pieces[-1]
        return Piece(
            self.index,
            "".join(piece.text for piece in pieces),
            0,
            self.ids,
            rows,
            last.finish_reason,
            last.stop_reason,
            True,
        )

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

    def _compare(self, ids: Sequence[int]) -> int:
        """How many of `ids` the client already has; raises when one is another."""
        assert self._echo is not None
        again = 0
        for token in ids:
            if self._echo >= len(self.ids):
                break
            if token != self.ids[self._echo]:
                raise _differs(self._echo)
            self._echo += 1
            again += 1
        return again

    def _learn(self, event: Mapping[str, Any]) -> None:
        self.model = self.model or event.get("model", "")
        self.fingerprint = event.get("system_fingerprint") or self.fingerprint
        usage = event.get("usage")
        if usage and self.failovers == 0:
            self.usage_details = usage.get("prompt_tokens_details")

    def _drawing(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """How the engine is asked to draw."""
        draw = self.request.draw
        if draw is None:
            return {}
        if draw is Sampler.POSITION:
            return {"seed": self._seed}
        if draw is Sampler.GENERATOR:
            # Its generator starts anew after the seam: with the same seed it would repeat the noise of the answer's beginning.
            done = len(body["prompt"]) - len(self.prompt)
            return {"seed": (self._seed + done * _GOLDEN) & _SEED_MASK if done else self._seed}
        given, defaults = self.request.body, self._defaults
        values = {
            name: getattr(defaults, name) if given.get(name) is None else given[name]
            for name in ("temperature", "top_p", "top_k", "min_p")
        }
        arguments = {f"concordia_{name}": value for name, value in values.items()}
        arguments["concordia_seed"] = self._seed
        return {"temperature": 0, "vllm_xargs": {**(body.get("vllm_xargs") or {}), **arguments}}


def request_key(name: str) -> int:
    """The 128-bit key of a request in the journal."""
    return xxhash.xxh3_128_intdigest(name.encode())


def _limit(
    request: GenerationRequest, prompt_tokens: int, context_tokens: int, defaults: Defaults
) -> int:
    """Tokens after which the answer ends for its length, as vLLM counts it."""
    asked = request.max_tokens
    if asked is None:
        asked = defaults.max_tokens if request.is_chat else COMPLETION_TOKENS_DEFAULT
    bounds = (asked, defaults.max_tokens_cap, context_tokens - prompt_tokens)
    return max(1, min(bound for bound in bounds if bound is not None))


def _differs(index: int) -> RequestRefused:
    return RequestRefused(
        f"the engine failed; its successor generated another token at position {index} of the answer, "
        "so the answer cannot go on",
        status=500,
        kind="ContinuationError",
    )
