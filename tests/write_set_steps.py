"""Requests of a write set and the steps that they are scheduled in, for tests."""

from __future__ import annotations

from typing import Any

from concordia.integrations.vllm.identity import Identity, KeyChain
from concordia.integrations.vllm.step_writes import Scheduled
from concordia.integrations.vllm.track import Track

SIZE = 4
SEED = b"model"


def track(name: str, tokens: list[int], *, seed: bytes | None = SEED) -> Track:
    chain = None if seed is None else KeyChain(seed, block_tokens=SIZE)
    return Track(Identity(name=name), chain, tokens)


def new(request: str, blocks: list[int], end: int, *, start: int = 0, hit: int = 0, **more: Any) -> Scheduled:
    return Scheduled(request, blocks, True, start, end, hit=hit, **more)


def more(request: str, start: int, end: int, blocks: tuple[int, ...] = (), drafts: int = 0) -> Scheduled:
    return Scheduled(request, blocks, False, start, end, drafts)
