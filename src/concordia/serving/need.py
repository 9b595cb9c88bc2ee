"""What a request needs to go on after a fault: the one table.

Owns: the levels, the table NEEDS and the verdict over a request's parameters. Promises: every
parameter that could make a continuation wrong has a row; what has no row keeps no history. Called
by request parsing. Does not check whether values are valid: vLLM does.

A level is what a request needs, or what it reached, best first. STATE_EXACT is restored from the
journal; where the journal lacks some tokens (PARTLY_RESTORED) or all (RE_PREFILL) they are computed
again from their ids. SAMPLER_LOST is restored, but nothing can restore its sampler. REGENERATE
starts from the prompt and suppresses what was sent while it comes out equal; PASS_THROUGH is
forwarded as it is and ends with its replica.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from concordia.errors import RequestRefused

Body = Mapping[str, Any]


class Level(enum.IntEnum):
    """What a request needs, or what it reached; ordered from best to worst."""

    STATE_EXACT = 0
    PARTLY_RESTORED = 1
    SAMPLER_LOST = 2
    RE_PREFILL = 3
    REGENERATE = 4
    PASS_THROUGH = 5

    @property
    def label(self) -> str:
        return _LABELS[self]


_LABELS: Final = {
    Level.STATE_EXACT: "state-exact",
    Level.PARTLY_RESTORED: "partly-restored",
    Level.SAMPLER_LOST: "sampler-not-restorable",
    Level.RE_PREFILL: "re-prefilled",
    Level.REGENERATE: "regenerated",
    Level.PASS_THROUGH: "unprotected",
}


@dataclass(frozen=True, slots=True)
class Need:
    """One row of the table: where `applies(value)` holds, the request needs `level`, because of
    `why`.
    """

    parameter: str
    level: Level
    applies: Callable[[Any], bool]
    why: str


def _given(value: Any) -> bool:
    return value is not None and value is not False and value not in ([], {}, "")


def _not_zero(value: Any) -> bool:
    return bool(value)


def _is_constraint(value: Any) -> bool:
    return not (isinstance(value, Mapping) and value.get("type") == "text") and _given(value)


# Parameters without a row keep no history: temperature, top_p, top_k, min_p, logit_bias,
# allowed_token_ids, stop, ignore_eos, logprobs and the like look at one position only.
# repetition_penalty asks only whether a token occurred in prompt *or* answer, so prompt + emitted
# gives the same. min_tokens counts tokens of the answer: the remainder is sent. seed: see Sampler.
NEEDS: Final = (
    Need("presence_penalty", Level.REGENERATE, _not_zero, "counts tokens of the answer only"),
    Need("frequency_penalty", Level.REGENERATE, _not_zero, "counts tokens of the answer only"),
    Need("response_format", Level.REGENERATE, _is_constraint, "a grammar has a state"),
    Need("structured_outputs", Level.REGENERATE, _given, "a grammar has a state"),
    Need("bad_words", Level.REGENERATE, _given, "matches words across tokens of the answer"),
    Need("vllm_xargs", Level.REGENERATE, _given, "a logits processor may keep a history"),
    Need("logits_processors", Level.REGENERATE, _given, "a logits processor may keep a history"),
    Need("repetition_detection", Level.REGENERATE, _given, "looks for patterns in the answer"),
    Need("thinking_token_budget", Level.REGENERATE, _given, "counts tokens of the answer"),
    Need("watermarking", Level.REGENERATE, _given, "may depend on tokens of the answer"),
    Need(
        "tools",
        Level.PASS_THROUGH,
        lambda v: v is not None,
        "tool calls are parsed by the engine's server",
    ),
    Need("functions", Level.PASS_THROUGH, _given, "tool calls are parsed by the engine's server"),
    Need(
        "tool_choice",
        Level.PASS_THROUGH,
        lambda v: v not in (None, "none"),
        "tool calls are parsed by the engine's server",
    ),
    Need("echo", Level.PASS_THROUGH, _given, "the prompt is part of the answer"),
    Need("prompt_logprobs", Level.PASS_THROUGH, lambda v: v is not None, "needs the whole prefill"),
    Need("use_beam_search", Level.PASS_THROUGH, _given, "beams cannot be resumed"),
    Need("suffix", Level.PASS_THROUGH, _given, "is rendered by the engine's server"),
    Need("prompt_embeds", Level.PASS_THROUGH, _given, "a prompt without token ids"),
    Need(
        "truncate_prompt_tokens",
        Level.PASS_THROUGH,
        lambda v: v is not None,
        "would cut the resumed prompt",
    ),
    Need("return_prompt_text", Level.PASS_THROUGH, _given, "is known to the engine's server only"),
    Need("mm_processor_kwargs", Level.PASS_THROUGH, _given, "a prompt that is more than text"),
    Need("media_io_kwargs", Level.PASS_THROUGH, _given, "a prompt that is more than text"),
)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the server fills in for a parameter that the client left out (vLLM's generation
    config).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None  # of a chat that names none
    max_tokens_cap: int | None = None  # of every request

    @staticmethod
    def of(generation: Body, *, source: str | None, override: Body) -> Defaults:
        """As vLLM takes them from the model's generation config, its --generation-config and
        --override-generation-config.

        A model's own max_new_tokens is only what a chat gets that names none; one given by the
        flags bounds every request.
        """
        is_models = source in (None, "auto")
        found = {**({} if source == "vllm" else generation), **override}
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        limit = found.get("max_new_tokens")
        bounding = override if is_models or source == "vllm" else found
        return Defaults(
            **{name: found[name] for name in names if found.get(name) is not None},
            max_tokens=limit,
            max_tokens_cap=bounding.get("max_new_tokens"),
        )


def classify(
    body: Body, *, defaults: Defaults, is_chat: bool, chat_blocker: str | None = None
) -> tuple[Level, str]:
    """The worst level that any parameter needs, and the name of that parameter."""
    transfer = body.get("kv_transfer_params")
    if isinstance(transfer, Mapping) and "concordia" in transfer:
        raise RequestRefused(
            "kv_transfer_params.concordia is written by the router alone",
            param="kv_transfer_params",
        )
    found, reason = Level.STATE_EXACT, ""
    filled = {
        "presence_penalty": defaults.presence_penalty,
        "frequency_penalty": defaults.frequency_penalty,
    }
    for need in NEEDS:
        value = body.get(need.parameter)
        if value is None:
            value = filled.get(need.parameter)
        if need.level > found and need.applies(value):
            found, reason = need.level, need.parameter
    if found < Level.PASS_THROUGH and is_chat:
        if chat_blocker is not None:
            return Level.PASS_THROUGH, chat_blocker
        if _has_media(body.get("messages")):
            return Level.PASS_THROUGH, "multimodal"
    return found, reason


def _has_media(messages: Any) -> bool:
    if not isinstance(messages, list):
        return False
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, str) and (
                not isinstance(part, Mapping) or part.get("type", "text") not in ("text", "refusal")
            ):
                return True
    return False
