"""What a request needs to go on.

Invariants: every row of the table decides what it says, for values that mean something and not for those that mean nothing; what has no row
needs nothing; the worst row wins; what the client leaves out is what the server would fill in.
"""

from __future__ import annotations

from typing import Any

import pytest

from concordia.errors import RequestRefused
from concordia.serving.need import NEEDS, Defaults, Level, classify

GIVEN: dict[str, Any] = {
    "presence_penalty": 0.5,
    "frequency_penalty": -0.1,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"choice": ["a", "b"]},
    "bad_words": ["no"],
    "vllm_xargs": {"x": 1},
    "logits_processors": ["a.b"],
    "repetition_detection": {"max_pattern_size": 3},
    "thinking_token_budget": 5,
    "watermarking": True,
    "tools": [{"type": "function"}],
    "functions": [{"name": "f"}],
    "tool_choice": "auto",
    "echo": True,
    "prompt_logprobs": 0,
    "use_beam_search": True,
    "suffix": "end",
    "prompt_embeds": "AAAA",
    "truncate_prompt_tokens": 0,
    "return_prompt_text": True,
    "mm_processor_kwargs": {"a": 1},
    "media_io_kwargs": {"a": 1},
}
EMPTY: dict[str, Any] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "response_format": {"type": "text"},
    "tool_choice": "none",
    "echo": False,
    "tools": None,
    "functions": [],
    "bad_words": [],
    "vllm_xargs": {},
    "suffix": "",
    "use_beam_search": False,
}


def need(is_chat: bool = False, defaults: Defaults | None = None, **body: Any) -> tuple[Level, str]:
    return classify(body, defaults=defaults or Defaults(), is_chat=is_chat)


@pytest.mark.parametrize("row", NEEDS, ids=lambda row: row.parameter)
def test_row_decides_when_its_parameter_is_given(row: Any) -> None:
    assert need(**{row.parameter: GIVEN[row.parameter]}) == (row.level, row.parameter)
    assert row.why


@pytest.mark.parametrize("name", sorted(EMPTY))
def test_row_is_silent_when_its_parameter_means_nothing(name: str) -> None:
    assert need(**{name: EMPTY[name]}) == (Level.STATE_EXACT, "")


def test_request_is_exact_when_no_parameter_keeps_a_history() -> None:
    found = need(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.3,
        min_tokens=4,
        logit_bias={"1": 2},
        allowed_token_ids=[1],
        stop=["a"],
        stop_token_ids=[3],
        ignore_eos=True,
        logprobs=3,
        seed=1,
        priority=1,
        cache_salt="s",
        something_new=1,
    )
    assert found == (Level.STATE_EXACT, "")


def test_worst_row_wins_when_several_apply() -> None:
    assert need(presence_penalty=1, tools=[1]) == (Level.PASS_THROUGH, "tools")


def test_servers_default_counts_when_the_client_leaves_a_penalty_out() -> None:
    defaults = Defaults(presence_penalty=0.3)
    assert need(defaults=defaults) == (Level.REGENERATE, "presence_penalty")
    assert need(defaults=defaults, presence_penalty=0.0) == (Level.STATE_EXACT, "")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text", Level.STATE_EXACT),
        ([{"type": "text", "text": "a"}], Level.STATE_EXACT),
        ([{"type": "image_url", "image_url": {}}], Level.PASS_THROUGH),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], Level.PASS_THROUGH),
        ([7], Level.PASS_THROUGH),
    ],
)
def test_chat_is_passed_through_when_it_has_more_than_text(content: Any, expected: Level) -> None:
    assert need(is_chat=True, messages=[{"role": "user", "content": content}])[0] is expected


def test_chat_is_passed_through_when_the_server_parses_what_the_model_says() -> None:
    found = classify({"messages": []}, defaults=Defaults(), is_chat=True, chat_blocker="reasoning")
    assert found == (Level.PASS_THROUGH, "reasoning")
    found = classify({"prompt": "a"}, defaults=Defaults(), is_chat=False, chat_blocker="reasoning")
    assert found == (Level.STATE_EXACT, "")


def test_request_is_refused_when_a_client_claims_an_identity() -> None:
    with pytest.raises(RequestRefused, match="router alone"):
        need(kv_transfer_params={"concordia": {"request": "theirs"}})
    assert need(kv_transfer_params={"other": 1}) == (Level.STATE_EXACT, "")


@pytest.mark.parametrize(
    ("source", "override", "expected"),
    [
        (None, {}, Defaults(temperature=0.6, max_tokens=50)),
        ("auto", {"temperature": 0.1}, Defaults(temperature=0.1, max_tokens=50)),
        ("auto", {"max_new_tokens": 9}, Defaults(temperature=0.6, max_tokens=9, max_tokens_cap=9)),
        ("vllm", {}, Defaults()),
        ("vllm", {"max_new_tokens": 9}, Defaults(max_tokens=9, max_tokens_cap=9)),
        ("a/folder", {}, Defaults(temperature=0.6, max_tokens=50, max_tokens_cap=50)),
    ],
)
def test_defaults_are_taken_as_vllm_takes_them(
    source: Any, override: Any, expected: Defaults
) -> None:
    generation = {"temperature": 0.6, "max_new_tokens": 50, "do_sample": True}
    assert Defaults.of(generation, source=source, override=override) == expected


def test_every_level_has_a_label_when_it_is_shown() -> None:
    assert len({level.label for level in Level}) == len(Level)
