"""Appends of a step: what each reads until it is done, and what became of it.

Owns: the values that the worker side and the pump share. Promises: nothing but their words. Does
nothing by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


class Event(Protocol):
    """What a GPU step is waited for with."""

    def synchronize(self) -> None: ...


@dataclass(slots=True)
class Append:
    """One append: its task, how many records that makes, and which blocks it reads until it is
    done.
    """

    request: str
    start: int  # first token that is not saved if this fails
    blocks: tuple[int, ...]
    task: Any
    records: int = 1
    ticket: Any = None
    is_claimed: bool = False  # being submitted: it cannot be called back any more
    is_done: bool = False
    is_elsewhere: bool = False  # it runs in the engine's stream, not by the executor's own launches


@dataclass(frozen=True, slots=True)
class Failure:
    """From which token on a request is not saved, why, and whether the same may go well later."""

    start: int
    reason: str
    may_pass: bool


@dataclass(slots=True)
class Batch:
    """The appends of one step, and something to run on the pump's thread before them."""

    appends: list[Append] = field(default_factory=list)
    event: Event | None = None
    before: Callable[[], None] | None = None
