"""What one step of the engine schedules, and what it asks of workers and journal.

Owns: the values that go between scheduler side, write set and workers. Promises: plain values that
pickle small. Made by compat.py and write_set.py. Does nothing by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from concordia import config


class Scheduled(NamedTuple):
    """One request of one step, as compat.py read it from the scheduler's output (a tuple, as others
    here that are made for every request in every step: a frozen dataclass takes 2 us to make).

    blocks:  the request's block ids (replaces) or those added to them
    start    first token computed in this step; everything below is in the cache
    end      start + tokens of this step, drafts included
    """

    request: str
    blocks: Sequence[int]
    replaces: bool
    start: int
    end: int
    drafts: int = 0
    # with `replaces`: tokens found in the engine's own prefix cache, whole blocks; the rest is
    # newly given
    hit: int = 0
    # block index -> key of the record it is filled from
    loaded_keys: Mapping[int, int] = MappingProxyType({})


class Write(NamedTuple):
    """What one request appends in one step: full blocks as (index, block id), then the partial last
    block.
    """

    request: str
    key: int
    incarnation: int
    full: tuple[tuple[int, int], ...]
    tail: tuple[int, int, int] | None  # (first token, end, block id)
    model_hash: int = 0

    @property
    def blocks(self) -> list[int]:
        """Block ids that are appended from."""
        return [block for _, block in self.full] + ([self.tail[2]] if self.tail else [])


def runs_of(
    full: Sequence[tuple[int, int]], most: int = config.APPEND_BLOCKS
) -> list[tuple[int, tuple[int, ...]]]:
    """Full blocks, (index, block id), as (first index, ids) of those that follow each other, at
    most so many together.
    """
    runs: list[tuple[int, list[int]]] = []
    for index, block in full:
        if runs and runs[-1][0] + len(runs[-1][1]) == index and len(runs[-1][1]) < most:
            runs[-1][1].append(block)
        else:
            runs.append((index, [block]))
    return [(first, tuple(blocks)) for first, blocks in runs]


@dataclass(frozen=True, slots=True)
class KeyNote:
    """Keys of blocks of one request, for KIND_BLOCK_KEY: (block index, key)."""

    request: str
    key: int
    incarnation: int
    entries: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class StepWrites:
    """All that one step asks of the workers and of the scheduler's own stream."""

    writes: list[Write] = field(default_factory=list)
    notes: list[KeyNote] = field(default_factory=list)
    # blocks given out in this step: nothing may still read their old bytes
    reused: list[int] = field(default_factory=list)
    # (request, why it is unprotected from here)
    lost: list[tuple[str, str]] = field(default_factory=list)
