"""Where the time of a recovery's cohort went in the engine that takes it over.

Owns: the moments of each such cohort, from its first member's coming to its last member's KV being
in place. Promises: it is told once, when every member that was loaded is confirmed; a cohort of
which nothing was loaded is never told of, and forgotten with its last member. Called by the
restorer, with its clock. It decides nothing.

    phases:  gather | look_up | enter | load        first comes | last comes | all verified |
                                                    scheduled | in place, hashed there
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from concordia import config
from concordia.integrations.vllm.lookup import Answer


@dataclass(slots=True)
class _Times:
    """Of one cohort."""

    first_came: float
    last_came: float
    answered: float = 0.0  # the last of its look-ups
    entered: float = 0.0
    cut_s: float = 0.0  # the slowest question to the journal
    verify_s: float = 0.0  # the slowest hashing of one member's records
    load_s: float = 0.0
    payload_bytes: int = 0
    is_mapped: bool = True
    members: set[str] = field(default_factory=set)
    loading: set[str] = field(default_factory=set)
    loaded_count: int = 0


class CohortTimes:
    """All recoveries under way."""

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self._say = say
        self._times: dict[str, _Times] = {}
        self._of: dict[str, str] = {}  # cohort by request

    def come(self, request: str, cohort: str, *, now: float) -> None:
        """A member has come."""
        times = self._times.setdefault(cohort, _Times(now, now))
        times.last_came = now
        times.members.add(request)
        self._of[request] = cohort
        if len(self._times) > config.COHORTS_REMEMBERED:
            self._drop(next(iter(self._times)))

    def enter(self, request: str, answer: Answer | None, *, is_loaded: bool, now: float) -> None:
        """A member is in the step that was just scheduled, with or without a load."""
        times = self._times.get(self._of.get(request, ""))
        if times is None:
            return
        times.entered = now
        if answer is not None:
            times.answered = max(times.answered, answer.ended)
            times.cut_s = max(times.cut_s, answer.took_s - answer.verify_s)
            times.verify_s = max(times.verify_s, answer.verify_s)
            times.is_mapped = times.is_mapped and answer.is_mapped
        if not is_loaded:
            self.leave(request)
            return
        times.loading.add(request)
        if answer is not None and answer.plan is not None:
            times.payload_bytes += answer.plan.payload_bytes

    def confirm(self, request: str, *, load_s: float) -> None:
        """Its KV is in place on every rank; the slowest took so long for all of the step."""
        times = self._times.get(self._of.get(request, ""))
        if times is not None and request in times.loading:
            times.load_s = max(times.load_s, load_s)
            times.loaded_count += 1
            self.leave(request)

    def leave(self, request: str) -> None:
        """Nothing more is to be expected of it."""
        name = self._of.pop(request, "")
        times = self._times.get(name)
        if times is None:
            return
        times.loading.discard(request)
        times.members.discard(request)
        if times.members:
            return
        del self._times[name]
        if times.loaded_count:
            self._say(_facts(name, times))

    def _drop(self, name: str) -> None:
        for request in self._times.pop(name).members:
            self._of.pop(request, None)


def _facts(name: str, times: _Times) -> dict[str, Any]:
    answered = max(times.last_came, times.answered)
    phases = {
        "gather": times.last_came - times.first_came,
        "look_up": answered - times.last_came,
        "enter": times.entered - answered,
        "load": times.load_s,
    }
    return {
        "event": "cohort-restored",
        "cohort": name,
        "loaded": times.loaded_count,
        "bytes": times.payload_bytes,
        "phases": {phase: round(max(0.0, seconds), 4) for phase, seconds in phases.items()},
        "cut_s_max": round(times.cut_s, 4),
        "verify_s_max": round(times.verify_s, 4),
        "is_mapped": times.is_mapped,
    }
