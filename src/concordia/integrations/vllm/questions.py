"""What the journal is asked for a request, and when its answer is believed.

Owns: the questions, as look-ups ask them. Promises: an answer is a plan of which every byte was
hashed; a difference is believed only when a second look finds it too. Made by the restorer, asked
on a look-up's thread. It neither waits nor decides who asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from concordia.errors import Corruption
from concordia.integrations.vllm.track import Track
from concordia.journal.client import JournalClient
from concordia.recovery.restore import RestorePlan, plan_restore, verify


@dataclass(frozen=True, slots=True)
class Source:
    """Where KV comes from: the journal's answers, its bytes, and what must match."""

    client: JournalClient
    pool: memoryview
    segment_bytes: int
    layout_hash: int
    world: int
    block_tokens: int
    is_mapped: Callable[[], bool] = lambda: True  # whether all pages of the pool are, by now


def cut_question(source: Source, track: Track, known: int) -> Callable[[float], RestorePlan]:
    """The request's own KV of its first `known` tokens; where the journal has none, that of others
    with these tokens.
    """
    made_by = track.model_hash
    size = source.block_tokens
    keys: list[int] = []
    if track.chain is not None:
        track.chain.extend(track.tokens, limit=len(track.tokens))
        keys = track.chain.keys[: max(0, known - 1) // size]

    def question(deadline: float) -> RestorePlan:
        cut = source.client.cut(
            track.identity.key,
            tokens_known=known,
            layout_hash=source.layout_hash,
            world=source.world,
            bounds=track.identity.bounds,
        )
        if cut.tokens == 0 and keys:
            return _match(source, keys, made_by, deadline)
        return _verified(source, cut, made_by, deadline)

    return _twice(question)


def prefix_question(
    source: Source, keys: list[int], made_by: int
) -> Callable[[float], RestorePlan]:
    """The blocks of these keys, as far as the journal has them."""

    def question(deadline: float) -> RestorePlan:
        return _match(source, keys, made_by, deadline)

    return _twice(question)


def _match(source: Source, keys: list[int], made_by: int, deadline: float) -> RestorePlan:
    cut = source.client.match_prefix(keys, layout_hash=source.layout_hash, world=source.world)
    return _verified(source, cut, made_by, deadline)


def _verified(source: Source, cut: Any, made_by: int, deadline: float) -> RestorePlan:
    plan = plan_restore(
        cut, world=source.world, layout_hash=source.layout_hash, pool=source.pool,
        segment_bytes=source.segment_bytes, model_hash=made_by,
    )  # fmt: skip
    is_mapped, started = source.is_mapped(), time.monotonic()
    verify(plan, source.pool, deadline=deadline)
    return replace(plan, verify_s=time.monotonic() - started, is_mapped=is_mapped)


def _twice(question: Callable[[float], RestorePlan]) -> Callable[[float], RestorePlan]:
    """Ask again before a difference is believed: the cleaner may have moved the bytes between the
    answer and the look.
    """

    def ask(deadline: float) -> RestorePlan:
        try:
            return question(deadline)
        except Corruption:
            return question(deadline)

    return ask
