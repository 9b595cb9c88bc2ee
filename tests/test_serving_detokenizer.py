"""Ids to text.

Invariants: the text does not depend on how the ids were cut; nothing given out is taken back; half a character is never given out; the
results are those of vLLM's own detokenizer (compared with it where it is installed).
"""

from __future__ import annotations

import importlib.util
import random
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from concordia.serving.detokenizer import Detokenizer
from concordia.serving.tokenizer import Tokenizer, from_json
from fake_engine import EOS, TOKENIZER, encode

TEXT = "naïve café 漢字 🎉🎊 end"


def metaspace_tokenizer() -> Tokenizer:
    """SentencePiece's way: spaces belong to the token, bytes stand in where no token fits."""
    words = [
        "<unk>",
        "\u2581the",
        "\u2581cat",
        "s",
        "\u2581",
        "a",
        *(f"<0x{n:02X}>" for n in range(256)),
    ]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return from_json(backend.to_str())


def pushed(detokenizer: Detokenizer, parts: list[list[int]]) -> tuple[str, str | None]:
    """Push all parts; the text as a client would gather it, and the stop string met."""
    text, met = "", None
    for part in parts:
        _, met = detokenizer.push(part, is_stopped=False)
        text += detokenizer.take(is_finished=met is not None)
        if met is not None:
            break
    return text + detokenizer.take(is_finished=True), met


def cuts(ids: list[int], rng: random.Random) -> list[list[int]]:
    parts, rest = [], list(ids)
    while rest:
        size = rng.randint(1, 4)
        parts.append(rest[:size])
        rest = rest[size:]
    return parts


def test_text_is_the_same_when_the_ids_are_cut_anywhere() -> None:
    ids = encode(TEXT)
    for seed in range(200):
        parts = cuts(ids, random.Random(seed))
        assert pushed(Detokenizer(TOKENIZER, [1, 2]), parts) == (TEXT, None), f"seed {seed}"


def test_no_half_character_is_given_out_when_a_character_is_several_tokens() -> None:
    detokenizer = Detokenizer(TOKENIZER, [])
    for token in encode(TEXT):
        detokenizer.push([token], is_stopped=False)
        assert "\ufffd" not in detokenizer.take(is_finished=False)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    "stop", [("字 🎉",), ("zzz", "🎉🎊 e"), ("e",), ("🎊 end", "end"), ("nd",)]
)
def test_stop_string_cuts_at_the_same_place_when_the_ids_are_cut_anywhere(
    stop: tuple[str, ...], include: bool
) -> None:
    ends = [(TEXT.index(s) + len(s), s) for s in stop if s in TEXT]
    start, met = min(ends, key=lambda end: end[0])  # of two that end together, the first one listed
    expected = TEXT[: start if include else start - len(met)]
    for seed in range(50):
        detokenizer = Detokenizer(TOKENIZER, [], stop=stop, includes_stop=include)
        parts = cuts(encode(TEXT), random.Random(seed))
        assert pushed(detokenizer, parts) == (expected, met), f"seed {seed}"


def test_only_ids_up_to_the_stop_string_are_kept_when_more_came_with_it() -> None:
    detokenizer = Detokenizer(TOKENIZER, [], stop=("b",))
    assert detokenizer.push(encode("abcdef"), is_stopped=False) == (2, "b")


def test_stop_string_counts_only_after_the_minimum_when_there_is_one() -> None:
    detokenizer = Detokenizer(TOKENIZER, [], stop=("a",), min_tokens=3)
    assert pushed(detokenizer, [encode("aaa"), encode("bab")]) == ("aaab", "a")


def test_ending_token_is_left_out_of_the_text_when_it_stopped_the_answer() -> None:
    detokenizer = Detokenizer(TOKENIZER, [], skips_special=False)
    assert detokenizer.push([*encode("ab"), EOS], is_stopped=True) == (3, None)
    assert detokenizer.take(is_finished=True) == "ab"
    shown = Detokenizer(TOKENIZER, [], skips_special=False, includes_stop=True)
    shown.push([*encode("ab"), EOS], is_stopped=True)
    assert shown.take(is_finished=True) == "ab</s>"


def test_unknown_token_adds_nothing_when_an_engine_sends_one() -> None:
    detokenizer = Detokenizer(TOKENIZER, [])
    detokenizer.push([*encode("a"), 99_999, *encode("b")], is_stopped=False)
    assert detokenizer.take(is_finished=True) == "ab"


def test_leading_space_is_kept_when_the_prompt_came_before() -> None:
    tokenizer = metaspace_tokenizer()
    detokenizer = Detokenizer(tokenizer, [1])
    assert pushed(detokenizer, [[2], [3], [1]]) == (" cats the", None)
    assert tokenizer.name(2, []) == " cat"
    assert tokenizer.name(3, []) == "s"


def test_name_of_a_token_is_its_whole_character_when_it_completes_one() -> None:
    ids = encode("a漢b")
    names = [TOKENIZER.name(token, ids[max(0, at - 4) : at]) for at, token in enumerate(ids)]
    assert names == ["a", "", "", "漢", "b"]


def vllm_detokenizer(tokenizer: Tokenizer, prompt: list[int], **options: Any) -> Any:
    from transformers import PreTrainedTokenizerFast
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    params = SamplingParams(**options)
    request = SimpleNamespace(
        sampling_params=params, prompt_token_ids=prompt, request_id="r", prompt_embeds=None
    )
    return FastIncrementalDetokenizer(fast, request)


@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("kind", ["byte", "metaspace"])
def test_text_equals_vllms_when_the_ids_are_random(kind: str) -> None:
    tokenizer = TOKENIZER if kind == "byte" else metaspace_tokenizer()
    size = 258 if kind == "byte" else 262
    for seed in range(300):
        rng = random.Random(seed)
        prompt = [rng.randrange(size) for _ in range(5)]
        ids = [rng.randrange(size) for _ in range(40)]
        if rng.random() < 0.5 and kind == "byte":
            ids = encode(TEXT) + ids
        options: dict[str, Any] = {
            "skip_special_tokens": rng.random() < 0.5,
            "spaces_between_special_tokens": rng.random() < 0.5,
            "stop": rng.choice([[], ["a"], ["é ", "🎉"], ["end", "n"]]),
            "min_tokens": rng.choice([0, 3]),
            "max_tokens": 100,
        }
        options["include_stop_str_in_output"] = bool(options["stop"]) and rng.random() < 0.5
        theirs = vllm_detokenizer(tokenizer, prompt, **options)
        ours = Detokenizer(
            tokenizer,
            prompt,
            skips_special=options["skip_special_tokens"],
            has_spaces=options["spaces_between_special_tokens"],
            stop=tuple(options["stop"]),
            includes_stop=options["include_stop_str_in_output"],
            min_tokens=options["min_tokens"],
        )
        for part in cuts(ids, rng):
            stopped = theirs.update(list(part), False)
            _, met = ours.push(part, is_stopped=False)
            assert met == stopped, f"seed {seed}"
            is_end = met is not None
            text = theirs.get_next_output_text(is_end, delta=True)
            assert ours.take(is_finished=is_end) == text, f"seed {seed}"
            if is_end:
                break
