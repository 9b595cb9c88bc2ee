"""What a client asks for, checked.

Owns: parsing of completion and chat requests. Promises: a parsed request is a frozen value; what
the router must understand has been checked, everything else goes to vLLM as the client wrote it,
and vLLM judges it. Called by the server. Does no input or output; what a parameter needs to go on
after a fault is said in `need`, how a chat becomes token ids in `renderer`.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from concordia import config
from concordia.errors import RequestRefused
from concordia.serving.need import Body, Defaults, Level, classify


class Endpoint(enum.Enum):
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


class Sampler(enum.Enum):
    """How the engine draws tokens: a generator that nothing restores, our counter plug-in, or
    vLLM's own (seed, position).
    """

    GENERATOR = "generator"
    COUNTER = "counter"
    POSITION = "position"


# What the router answers itself, or sends in a form of its own; everything else goes to vLLM as the
# client wrote it.
_OWN_NAMES: Final = (
    "messages prompt stream stream_options n logprobs top_logprobs max_tokens "
    "max_completion_tokens "
    "min_tokens seed stop include_stop_str_in_output skip_special_tokens "
    "spaces_between_special_tokens "
    "return_token_ids return_tokens_as_token_ids add_generation_prompt continue_final_message "
    "add_special_tokens chat_template chat_template_kwargs documents reasoning_effort "
    "include_reasoning request_id concordia kv_transfer_params echo tools tool_choice "
    "parallel_tool_calls"
)
_OWN_FIELDS: Final = frozenset(_OWN_NAMES.split())


@dataclass(frozen=True, slots=True)
class ClosedCohort:
    """A client's wish that `size` requests start in one step and are the engine's only work."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request for text; `upstream` holds the fields that vLLM gets as the client wrote them."""

    endpoint: Endpoint
    body: Body
    upstream: Body
    need: Level
    reason: str  # which parameter decided the need; empty for STATE_EXACT
    prompts: tuple[str | tuple[int, ...], ...]  # empty for a chat
    count: int  # answers per prompt
    is_stream: bool
    has_usage: bool
    has_continuous_usage: bool
    logprobs: int | None  # alternatives that are asked of vLLM
    has_all_logprobs: bool
    stop: tuple[str, ...]
    includes_stop: bool
    skips_special: bool
    has_spaces: bool
    max_tokens: int | None
    min_tokens: int
    seed: int
    draw: Sampler | None  # None for greedy
    returns_ids: bool
    names_by_id: bool
    wants_report: bool
    allows_restore: bool
    cohort: ClosedCohort | None

    @property
    def is_chat(self) -> bool:
        return self.endpoint is Endpoint.CHAT

    @property
    def role(self) -> str:
        """Role of the answer, as vLLM names it."""
        if self.body.get("add_generation_prompt", True):
            return "assistant"
        return str(self.body["messages"][-1].get("role", "assistant"))


def parse(
    endpoint: Endpoint,
    body: Any,
    *,
    defaults: Defaults,
    sampler: Sampler,
    chat_blocker: str | None = None,
) -> GenerationRequest:
    """Check and classify one request; raises RequestRefused. `chat_blocker` names why no chat can
    be continued here.
    """
    if not isinstance(body, dict):
        raise RequestRefused("the request body must be a JSON object")
    is_chat = endpoint is Endpoint.CHAT
    own = _extension(body)
    need, reason = classify(body, defaults=defaults, is_chat=is_chat, chat_blocker=chat_blocker)
    # A request that is passed through is checked by vLLM alone.
    prompts = _prompts(body) if not is_chat and need < Level.PASS_THROUGH else ()
    if is_chat and need < Level.PASS_THROUGH:
        _check_messages(body)
    seed = _integer(body, "seed", None)
    draw = _draw(body, defaults, sampler)
    count = _integer(body, "n", 1, least=1) or 1
    if draw is None and count > 1 and need < Level.PASS_THROUGH:
        raise RequestRefused(f"n must be 1 when using greedy sampling, got {count}.", param="n")
    logprobs = _logprobs(body, is_chat=is_chat)
    stream = _stream_options(body)
    return GenerationRequest(
        endpoint=endpoint,
        body=body,
        upstream=_upstream_fields(body),
        need=need,
        reason=reason,
        prompts=prompts,
        count=count,
        is_stream=bool(body.get("stream")),
        has_usage=bool(stream.get("include_usage")),
        has_continuous_usage=bool(
            stream.get("include_usage") and stream.get("continuous_usage_stats")
        ),
        logprobs=logprobs,
        has_all_logprobs=bool(body.get("logprob_token_ids")) or logprobs == -1,
        stop=_stop(body),
        includes_stop=bool(body.get("include_stop_str_in_output")),
        skips_special=body.get("skip_special_tokens", True) is not False,
        has_spaces=body.get("spaces_between_special_tokens", True) is not False,
        max_tokens=_max_tokens(body, is_chat=is_chat),
        min_tokens=_integer(body, "min_tokens", 0, least=0) or 0,
        seed=secrets.randbits(62) if seed is None else seed,
        draw=draw,
        returns_ids=bool(body.get("return_token_ids")),
        names_by_id=bool(body.get("return_tokens_as_token_ids")),
        wants_report=bool(own.get("report")),
        allows_restore=own.get("restore") is not False,
        cohort=_cohort(own.get("cohort")),
    )


def _draw(body: Body, defaults: Defaults, sampler: Sampler) -> Sampler | None:
    values = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = body.get(name)
        value = getattr(defaults, name) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestRefused(f"`{name}` must be a number.", param=name)
        values[name] = value
    if values["temperature"] < config.GREEDY_TEMPERATURE:
        return None
    if sampler is Sampler.COUNTER and (
        # The plug-in runs before the penalties, which would then change nothing; and what is out of
        # range is vLLM's to refuse.
        values["repetition_penalty"] != 1.0
        or body.get("presence_penalty")
        or defaults.presence_penalty
        or body.get("frequency_penalty")
        or defaults.frequency_penalty
        or not 0.0 < values["top_p"] <= 1.0
        or not 0.0 <= values["min_p"] <= 1.0
    ):
        return Sampler.GENERATOR
    return sampler


def _upstream_fields(body: Body) -> dict[str, Any]:
    found = {name: value for name, value in body.items() if name not in _OWN_FIELDS}
    if body.get("kv_transfer_params") is not None:
        found["kv_transfer_params"] = body["kv_transfer_params"]
    return found


def _prompts(body: Body) -> tuple[str | tuple[int, ...], ...]:
    prompt = body.get("prompt")
    if isinstance(prompt, str) and prompt:
        return (prompt,)
    if isinstance(prompt, list) and prompt:
        if _is_ids(prompt):
            return (tuple(prompt),)
        if len(prompt) > config.PROMPTS_MAX:
            raise RequestRefused(
                f"prompt list length {len(prompt)} exceeds the maximum of {config.PROMPTS_MAX}",
                param="prompt",
            )
        if all(isinstance(one, str) for one in prompt):
            return tuple(prompt)
        if all(isinstance(one, list) and one and _is_ids(one) for one in prompt):
            return tuple(tuple(one) for one in prompt)
    raise RequestRefused(
        "prompt must be a non-empty string, list of token ids, or list of either", param="prompt"
    )


def _is_ids(value: list[Any]) -> bool:
    if not all(type(one) is int and one >= 0 for one in value):
        return False
    if max(value) > config.TOKEN_ID_MAX:
        raise RequestRefused(f"{max(value)} in prompt is no token id", param="prompt")
    return True


def _check_messages(body: Body) -> None:
    messages = body.get("messages")
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) for m in messages)
    ):
        raise RequestRefused("messages must be a non-empty list of objects", param="messages")


def _logprobs(body: Body, *, is_chat: bool) -> int | None:
    """How many alternatives per token are asked for; None when log-probabilities are not."""
    if not is_chat:
        return _integer(body, "logprobs", None, least=-1)
    top = _integer(body, "top_logprobs", None, least=-1)
    if body.get("logprobs"):
        return top or 0
    if top:
        raise RequestRefused(
            "when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs"
        )
    return None


def _stream_options(body: Body) -> Body:
    options = body.get("stream_options") or {}
    if options and (not isinstance(options, Mapping) or not body.get("stream")):
        raise RequestRefused(
            "Stream options can only be defined when `stream=True`.", param="stream_options"
        )
    return options


def _max_tokens(body: Body, *, is_chat: bool) -> int | None:
    newer = _integer(body, "max_completion_tokens", None) if is_chat else None
    return _integer(body, "max_tokens", None) if newer is None else newer


def _stop(body: Body) -> tuple[str, ...]:
    stop = body.get("stop")
    if stop is None:
        return ()
    found = (stop,) if isinstance(stop, str) else stop
    if not isinstance(found, list | tuple) or not all(
        isinstance(one, str) and one for one in found
    ):
        raise RequestRefused("stop must be a non-empty string or a list of them", param="stop")
    return tuple(found)


def _extension(body: Body) -> Body:
    own = body.get("concordia")
    if own is None:
        return {}
    if not isinstance(own, Mapping):
        raise RequestRefused("concordia must be an object", param="concordia")
    return own


def _cohort(value: Any) -> ClosedCohort | None:
    if value is None:
        return None
    name = value.get("id") if isinstance(value, Mapping) else None
    size = value.get("size") if isinstance(value, Mapping) else None
    if not isinstance(name, str) or not 0 < len(name) <= 128 or type(size) is not int:
        raise RequestRefused(
            'concordia.cohort must be {"id": text, "size": number}', param="concordia"
        )
    if not 1 <= size <= config.REQUESTS_HELD_MAX:
        raise RequestRefused(
            f"concordia.cohort.size must be 1 to {config.REQUESTS_HELD_MAX}", param="concordia"
        )
    return ClosedCohort(name, size)


def _integer(body: Body, name: str, default: int | None, *, least: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise RequestRefused(f"`{name}` must be an integer.", param=name)
    if least is not None and value < least:
        raise RequestRefused(f"`{name}` must be at least {least}, got {value}.", param=name)
    return value
