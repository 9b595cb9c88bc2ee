"""Parsing of client requests.

Invariants: what is valid is kept; what is not is refused with the field at fault; fields that the router does not know go to vLLM unchanged,
those it answers itself do not.
"""

from __future__ import annotations

from typing import Any

import pytest

from concordia import config
from concordia.errors import RequestRefused
from concordia.serving.need import Defaults, Level
from concordia.serving.renderer import chat_body
from concordia.serving.request import Endpoint, GenerationRequest, Sampler, parse

MESSAGES = [{"role": "user", "content": "hi"}]


def completion(sampler: Sampler = Sampler.GENERATOR, **body: Any) -> GenerationRequest:
    body = {"prompt": "a", **body}
    return parse(Endpoint.COMPLETIONS, body, defaults=Defaults(), sampler=sampler)


def chat(**body: Any) -> GenerationRequest:
    body = {"messages": MESSAGES, **body}
    return parse(Endpoint.CHAT, body, defaults=Defaults(), sampler=Sampler.GENERATOR)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        ([1, 2], ((1, 2),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_prompts_are_kept_when_they_have_one_of_the_four_forms(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        None,
        5,
        {"a": 1},
        [1, "a"],
        [[]],
        [-1],
        [True],
        [["a"]],
        [1.5],
        ["a"] * (config.PROMPTS_MAX + 1),
    ],
)
def test_prompt_is_refused_when_it_is_none_of_them(prompt: Any) -> None:
    with pytest.raises(RequestRefused) as caught:
        completion(prompt=prompt)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", "2"),
        ("seed", 1.5),
        ("max_tokens", "ten"),
        ("min_tokens", -1),
        ("logprobs", "yes"),
        ("logprobs", -2),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["a", 1]),
        ("temperature", "hot"),
        ("top_p", True),
        ("stream_options", {"include_usage": True}),
        ("concordia", 5),
        ("concordia", {"cohort": {"id": "", "size": 1}}),
        ("concordia", {"cohort": {"id": "a", "size": 0}}),
        ("concordia", {"cohort": {"id": "a", "size": True}}),
        ("concordia", {"cohort": {"id": "a"}}),
    ],
)
def test_field_is_refused_by_name_when_its_value_is_wrong(field: str, value: Any) -> None:
    with pytest.raises(RequestRefused) as caught:
        completion(**{field: value})
    assert (caught.value.status, caught.value.param) == (400, field)


@pytest.mark.parametrize("body", [None, [], "text", 5])
def test_body_is_refused_when_it_is_no_object(body: Any) -> None:
    with pytest.raises(RequestRefused):
        parse(Endpoint.CHAT, body, defaults=Defaults(), sampler=Sampler.POSITION)


@pytest.mark.parametrize("messages", [None, [], "hi", [5]])
def test_chat_is_refused_when_it_has_no_messages(messages: Any) -> None:
    with pytest.raises(RequestRefused) as caught:
        chat(messages=messages)
    assert caught.value.param == "messages"


def test_several_answers_are_refused_when_all_would_be_the_same() -> None:
    with pytest.raises(RequestRefused, match="greedy"):
        completion(n=2, temperature=0)
    assert completion(n=2, temperature=0.1).count == 2


def test_fields_reach_vllm_unchanged_when_the_router_has_no_use_for_them() -> None:
    known = {
        "model": "m",
        "temperature": 0.5,
        "logit_bias": {"1": 1},
        "response_format": {"type": "json_object"},
    }
    own = {
        "n": 1,
        "stop": "x",
        "stream": True,
        "seed": 3,
        "min_tokens": 1,
        "concordia": {},
        "echo": False,
    }
    request = completion(**known, **own, brand_new={"a": [1]}, kv_transfer_params={"x": 1})
    assert request.upstream == {**known, "brand_new": {"a": [1]}, "kv_transfer_params": {"x": 1}}
    assert request.stop == ("x",)


def test_logprobs_are_asked_for_as_each_endpoint_means_them() -> None:
    assert completion().logprobs is None
    assert completion(logprobs=0).logprobs == 0
    assert completion(logprobs=3).logprobs == 3
    assert chat(logprobs=True).logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).logprobs == 4
    assert chat(logprobs=False).logprobs is None
    with pytest.raises(RequestRefused):
        chat(top_logprobs=4)


def test_newer_limit_wins_when_a_chat_gives_both() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).max_tokens == 7
    assert chat(max_tokens=5).max_tokens == 5
    assert completion(max_tokens=5, max_completion_tokens=7).max_tokens == 5


@pytest.mark.parametrize(
    ("body", "sampler", "expected"),
    [
        ({"temperature": 0}, Sampler.COUNTER, None),
        ({"temperature": 1e-6}, Sampler.COUNTER, None),
        ({}, Sampler.GENERATOR, Sampler.GENERATOR),
        ({"temperature": 1}, Sampler.COUNTER, Sampler.COUNTER),
        ({"temperature": 1}, Sampler.POSITION, Sampler.POSITION),
        # The counter runs before penalties, and vLLM refuses what is out of range.
        ({"repetition_penalty": 1.1}, Sampler.COUNTER, Sampler.GENERATOR),
        ({"presence_penalty": 0.1}, Sampler.COUNTER, Sampler.GENERATOR),
        ({"top_p": 1.5}, Sampler.COUNTER, Sampler.GENERATOR),
    ],
)
def test_drawing_is_as_exact_as_engine_and_parameters_allow(
    body: dict[str, Any], sampler: Sampler, expected: Sampler | None
) -> None:
    assert completion(sampler, **body).draw is expected


def test_default_temperature_decides_when_the_client_names_none() -> None:
    defaults = Defaults(temperature=0.0)
    request = parse(
        Endpoint.COMPLETIONS, {"prompt": "a"}, defaults=defaults, sampler=Sampler.POSITION
    )
    assert request.draw is None


def test_rendering_asks_for_what_the_chat_endpoint_would_render() -> None:
    request = chat(
        model="m",
        chat_template_kwargs={"a": 1},
        documents=[{"text": "d"}],
        reasoning_effort="low",
        add_generation_prompt=False,
        temperature=1,
    )
    assert chat_body(request.body) == {
        "model": "m",
        "messages": MESSAGES,
        "add_generation_prompt": False,
        "chat_template_kwargs": {
            "a": 1,
            "documents": [{"text": "d"}],
            "reasoning_effort": "low",
            "enable_thinking": True,
        },
    }
    assert request.role == "user"
    assert chat().role == "assistant"


def test_extension_is_read_when_a_client_uses_it() -> None:
    request = completion(
        concordia={"report": True, "restore": False, "cohort": {"id": "x", "size": 3}}
    )
    assert (request.wants_report, request.allows_restore) == (True, False)
    assert request.cohort is not None
    assert (request.cohort.name, request.cohort.size) == ("x", 3)
    assert completion().allows_restore
    assert completion().need is Level.STATE_EXACT
