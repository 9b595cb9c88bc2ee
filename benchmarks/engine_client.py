"""Asking a vLLM engine, or a router, with prompts of token ids, and when each token came.

Owns: prompts, answers with their stamps, one client for one endpoint and way of asking. Promises:
an answer that is short or ends with an error raises ConcordiaError. Called by engine.py and its
parts.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from cost import Arm

from concordia.errors import ConcordiaError

ANSWER_TIMEOUT_S: Final = 120.0
LINE_BYTES_MAX: Final = 4 << 20  # the first event repeats the prompt's ids: 1 MiB for 128K tokens


@dataclass(slots=True)
class Stream:
    """One answer as its client saw it."""

    stamps: list[float] = field(default_factory=list)  # of each token
    ids: list[int] = field(default_factory=list)
    started: float = 0.0


class Client:
    """Asks one endpoint with prompts of token ids; parses no more than it must."""

    def __init__(self, url: str, api_key: str, extra: dict[str, Any]) -> None:
        self._url, self._extra = f"{url}/completions", extra
        self._headers = {"Authorization": f"Bearer {api_key}"}

    @classmethod
    def of(cls, arm: Arm) -> Client:
        """The client of one arm of a comparison."""
        return cls(arm.url, arm.api_key, arm.extra)

    async def ask(
        self, session: aiohttp.ClientSession, prompt: list[int], tokens: int, into: Stream
    ) -> Stream:
        body = {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "return_token_ids": True,
            **self._extra,
        }
        into.started = time.monotonic()
        async with session.post(self._url, json=body, headers=self._headers) as response:
            if response.status != 200:
                raise ConcordiaError(f"{response.status}: {await response.text()}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                now, event = time.monotonic(), json.loads(line[6:])
                if "error" in event:
                    raise ConcordiaError(f"an answer ended: {event['error']}")
                for choice in event["choices"]:
                    ids = choice.get("token_ids") or []
                    into.ids += ids
                    into.stamps += [now] * len(ids)
        if len(into.ids) != tokens:
            raise ConcordiaError(f"{len(into.ids)} of {tokens} tokens came")
        return into

    async def ask_all(
        self, prompts: list[list[int]], tokens: int, streams: list[Stream] | None = None
    ) -> list[Stream]:
        """All at once; `streams` may be watched meanwhile."""
        streams = [Stream() for _ in prompts] if streams is None else streams
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            timeout=timeout, connector=connector, read_bufsize=LINE_BYTES_MAX
        ) as session:
            asked = zip(prompts, streams, strict=True)
            return list(await asyncio.gather(*(self.ask(session, p, tokens, s) for p, s in asked)))


def make_prompts(count: int, tokens: int, rng: random.Random) -> list[list[int]]:
    """Prompts that share no block with any other, of lengths that differ by a block: else all of
    them would fill their blocks in the same step, which arrivals at random do not.
    """
    lengths = [tokens - rng.randrange(16) for _ in range(count)]
    return [[rng.randrange(1, 250) for _ in range(length)] for length in lengths]
