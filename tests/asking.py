"""How the serving tests ask, and what a client makes of the answer."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from fake_engine import Bench, FakeEngine, served

PROMPT = [10, 20, 30]


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run one scenario within a bound."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())


def engines(count: int, **options: Any) -> list[FakeEngine]:
    return [FakeEngine(f"e{n}", **options) for n in range(count)]


async def ask(bench: Bench, path: str = "/v1/completions", **body: Any) -> tuple[int, str]:
    """One request; ids and times of this run are taken out of the answer."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(bench.url + path, json=body) as response,
    ):
        text = (await response.read()).decode()
    text = re.sub(r'"id":"[a-z]+-[^"]*"', '"id":"X"', text)
    return response.status, re.sub(r'"created":\d+', '"created":0', text)


async def unfailed(path: str, body: dict[str, Any], **options: Any) -> tuple[int, str]:
    """The same request at an engine that does not fail."""
    async with served(*engines(1, **options)) as bench:
        return await ask(bench, path, **body)


def completion(**more: Any) -> dict[str, Any]:
    body = {
        "prompt": PROMPT,
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    return body | {"return_token_ids": True, "stream_options": {"include_usage": True}} | more


def chat(**more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "temperature": 0,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
        **more,
    }


def events(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def joined(text: str) -> dict[str, Any]:
    """What a client makes of a stream: everything but the way it was cut."""
    found: dict[str, Any] = {
        "text": "",
        "ids": [],
        "logprobs": [],
        "finish": [],
        "roles": [],
        "usage": [],
    }
    assert text.count("data: [DONE]\n\n") == 1
    assert text.endswith("data: [DONE]\n\n")
    for event in events(text):
        assert "error" not in event, event
        for choice in event["choices"]:
            delta = choice.get("delta")
            found["text"] += (delta.get("content") or "") if delta is not None else choice["text"]
            if delta and "role" in delta:
                found["roles"].append(delta["role"])
            found["ids"] += choice.get("token_ids") or []
            rows = choice["logprobs"] or {}
            found["logprobs"] += rows.get("content") or list(zip(*rows.values(), strict=True))
            if choice["finish_reason"]:
                found["finish"].append((choice["finish_reason"], choice["stop_reason"]))
        if event.get("usage"):
            found["usage"].append((event["usage"], event.get("system_fingerprint")))
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the scenario's own bound ends it."""
    while not condition():
        await asyncio.sleep(0.005)


async def health(bench: Bench) -> int:
    async with aiohttp.ClientSession() as session, session.get(bench.url + "/health") as response:
        return response.status
