"""What an engine is asked for, when an answer begins or goes on.

Owns: the body of an upstream request. Promises: an answer that goes on after n of its tokens is
asked for with exactly these, with what is left of its limits, and with the draws that come next.
Called by the flight. Does not post it and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from concordia.serving.need import Defaults
from concordia.serving.request import GenerationRequest, Sampler

COMPLETION_TOKENS_DEFAULT: Final = 16  # OpenAI's, for completions that name none
_GOLDEN: Final = 0x9E3779B97F4A7C15  # odd: every incarnation gets another seed
_SEED_MASK: Final = 2**62 - 1


@dataclass(frozen=True, slots=True)
class CohortTicket:
    """Which cohort a submission belongs to; `deadline_s` bounds how long its members wait for each
    other.
    """

    name: str
    size: int
    deadline_s: float

    def body(self) -> dict[str, Any]:
        return {"id": self.name, "size": self.size, "deadline_s": self.deadline_s}


@dataclass(frozen=True, slots=True)
class Asking:
    """One answer as it is asked for at first; `limit` is the most tokens that it may have."""

    request: GenerationRequest
    prompt: Sequence[int]
    seed: int
    limit: int
    defaults: Defaults

    def body(self, done: Sequence[int]) -> dict[str, Any]:
        """The upstream request that goes on after the ids `done`, without what concerns the
        journal.
        """
        request, count = self.request, len(done)
        is_as_asked = count == 0 and request.max_tokens is not None
        body: dict[str, Any] = {
            **request.upstream,
            "prompt": [*self.prompt, *done],
            "stream": True,
            "max_tokens": request.max_tokens if is_as_asked else self.limit - count,
            "return_token_ids": True,
        }
        if request.has_usage or not request.is_stream:
            body["stream_options"] = {"include_usage": True}
        if request.min_tokens:
            body["min_tokens"] = max(0, request.min_tokens - count)
        if request.logprobs is not None:
            body |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
        return body | self._drawing(body, count)

    def _drawing(self, body: Mapping[str, Any], done: int) -> dict[str, Any]:
        """How the engine is asked to draw."""
        draw = self.request.draw
        if draw is None:
            return {}
        if draw is Sampler.POSITION:
            return {"seed": self.seed}
        if draw is Sampler.GENERATOR:
            # Its generator starts anew after the seam: with the same seed it would repeat the noise
            # of the answer's beginning.
            return {"seed": (self.seed + done * _GOLDEN) & _SEED_MASK if done else self.seed}
        given, defaults = self.request.body, self.defaults
        values = {
            name: getattr(defaults, name) if given.get(name) is None else given[name]
            for name in ("temperature", "top_p", "top_k", "min_p")
        }
        arguments = {f"concordia_{name}": value for name, value in values.items()}
        arguments["concordia_seed"] = self.seed
        return {"temperature": 0, "vllm_xargs": {**(body.get("vllm_xargs") or {}), **arguments}}


def token_limit(
    request: GenerationRequest, prompt_tokens: int, context_tokens: int, defaults: Defaults
) -> int:
    """Tokens after which the answer ends for its length, as vLLM counts it."""
    asked = request.max_tokens
    if asked is None:
        asked = defaults.max_tokens if request.is_chat else COMPLETION_TOKENS_DEFAULT
    bounds = (asked, defaults.max_tokens_cap, context_tokens - prompt_tokens)
    return max(1, min(bound for bound in bounds if bound is not None))
