"""serving/recovery_times.py: where the time of a failover went.

Invariants: phases follow each other without gaps and add up to the whole; it is told once, when no answer waits any more, and never of a
failover in which none went on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

import pytest

from concordia.serving.recovery_times import PHASES, RecoveryTimes, in_words


class Told:
    """What was told, and when."""

    def __init__(self) -> None:
        self.said: list[tuple[dict[str, float], int]] = []
        self.times = RecoveryTimes(time.monotonic_ns(), tell=lambda phases, count: self.said.append((dict(phases), count)))


def test_phases_add_up_to_the_whole_when_everything_happened() -> None:
    told = Told()
    told.times.note({"sealed": 0.002, "struck": 0.005, "replaced": 0.006})
    for moment in ("known", "counted", "moved"):
        told.times.mark(moment)
    for name in "abc":
        told.times.expect(name)
    for name in "abc":
        assert told.said == []
        told.times.resumed(name)
    ((phases, count),) = told.said
    assert count == 3
    assert tuple(phases) == PHASES
    assert phases["seal"] == 0.002
    assert phases["strike"] == pytest.approx(0.003)
    assert min(phases.values()) >= 0
    assert in_words(phases).endswith(f"{sum(phases.values()):.3f} s in all")


def test_strike_takes_nothing_of_its_own_when_it_ended_before_the_seal() -> None:
    told = Told()
    told.times.note({"sealed": 0.2, "struck": 0.01, "replaced": 0.25})
    assert told.times.phases() == {"seal": 0.2, "strike": 0.0, "promote": pytest.approx(0.05)}


def test_nothing_is_told_when_no_answer_went_on() -> None:
    told = Told()
    told.times.expect("a")
    told.times.gone("a")
    told.times.gone("a")
    told.times.resumed("b")
    assert told.said == []


@pytest.mark.parametrize("seed", range(20))
def test_it_is_told_once_when_answers_go_on_and_leave_in_any_order(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    told = Told()
    names = [f"r{i}" for i in range(8)]
    for name in names:
        told.times.expect(name)
    went_on = set()
    for name in rng.sample(names, len(names)):
        if rng.random() < 0.6:
            told.times.resumed(name)
            went_on.add(name)
        else:
            told.times.gone(name)
        told.times.resumed(rng.choice([*went_on, "unknown"]))
    expected = [len(went_on)] if went_on else []
    # the last one may have left after others went on: it is told of those
    assert [count for _, count in told.said] == expected


def test_missing_moments_have_no_phase_when_nobody_noted_them() -> None:
    told = Told()
    told.times.mark("moved")
    phases: Mapping[str, float] = told.times.phases()
    assert list(phases) == ["submit"]
