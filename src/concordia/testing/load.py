"""Streaming questions through the real `openai` client, with every token and its time kept.

Owns: what a client saw (`Answer`) and how two answers are compared. Promises: an answer keeps
tokens in the order they came, never repairs or drops one. Called by the demo, the soak and the
benchmarks. Does not start servers and does not break anything.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

WORDS: Final = [
    "journal",
    "epoch",
    "cohort",
    "router",
    "standby",
    "parity",
    "segment",
    "record",
    "commit",
    "fence",
    "replica",
    "shard",
    "stripe",
    "lease",
    "ring",
    "slot",
    "task",
    "owner",
    "seal",
    "cut",
    "stream",
    "token",
    "block",
    "page",
    "kernel",
    "handler",
    "region",
    "device",
    "memory",
    "host",
    "engine",
    "fault",
    "error",
    "failure",
]


@dataclass(frozen=True, slots=True)
class Question:
    """One chat request; `max_tokens` is always reached because the end token is ignored."""

    text: str
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Answer:
    """What one client received: token ids, their log-probabilities and arrival times (seconds,
    monotonic).
    """

    question: Question
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    report: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    request_id: str = ""


def make_questions(
    count: int,
    *,
    seed: int,
    max_tokens: int,
    words_min: int = 20,
    words_max: int = 120,
    temperature: float = 0.0,
) -> list[Question]:
    """Text prompts of different lengths, the same for the same seed."""
    rng = random.Random(seed)
    questions = []
    for index in range(count):
        words = rng.choices(WORDS, k=rng.randint(words_min, words_max))
        questions.append(
            Question(
                text=f"Question {index}: explain {' '.join(words)}?",
                max_tokens=max_tokens,
                temperature=temperature,
                seed=rng.randrange(1 << 30) if temperature > 0 else None,
            )
        )
    return questions


async def ask(
    client: Any,
    model: str,
    question: Question,
    *,
    on_token: Callable[[Answer], None] | None = None,
    concordia: dict[str, Any] | None = None,
) -> Answer:
    """Stream one chat completion; an error of any kind ends up in `Answer.error`, never raised."""
    answer = Answer(question)
    body: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True, **question.extra}
    body["concordia"] = {"report": True, **(concordia or {})}
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question.text}],
            max_tokens=question.max_tokens,
            temperature=question.temperature,
            seed=question.seed,
            logprobs=True,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=body,
        )
        async for chunk in stream:
            _take(answer, chunk)
            if on_token is not None:
                on_token(answer)
    except Exception as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def ask_all(
    client: Any,
    model: str,
    questions: Sequence[Question],
    *,
    cohort: str | None = None,
    on_token: Callable[[Answer], None] | None = None,
    concordia: dict[str, Any] | None = None,
) -> list[Answer]:
    """Ask all at once; with `cohort` they start in one step of the engine and stay its only
    work.
    """
    extension = dict(concordia or {})
    if cohort is not None:
        extension["cohort"] = {"id": cohort, "size": len(questions)}
    tasks = []
    for question in questions:
        tasks.append(
            asyncio.create_task(
                ask(client, model, question, on_token=on_token, concordia=extension)
            )
        )
        # The batch's row order is the order of arrival, and arithmetic depends on it.
        await asyncio.sleep(0.02 if cohort is not None else 0)
    return list(await asyncio.gather(*tasks))


def first_difference(left: Sequence[object], right: Sequence[object]) -> int | None:
    """Index of the first place where two sequences differ, or None when they are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def _take(answer: Answer, chunk: Any) -> None:
    now = time.monotonic()
    answer.request_id = answer.request_id or chunk.id
    extra = chunk.model_extra or {}
    if extra.get("concordia"):
        answer.report = dict(extra["concordia"])
    if chunk.usage is not None:
        answer.usage = chunk.usage.model_dump()
    for choice in chunk.choices:
        ids = (choice.model_extra or {}).get("token_ids") or []
        answer.tokens.extend(ids)
        answer.stamps.extend([now] * len(ids))
        answer.text += choice.delta.content or ""
        if choice.logprobs is not None and choice.logprobs.content:
            answer.logprobs.extend(entry.logprob for entry in choice.logprobs.content)
        if choice.finish_reason is not None:
            answer.finish_reason = choice.finish_reason
