"""recovery/detector.py, deadline.py: what counts as a fault, as a table.

Invariants: a dead, stopped or long traced process is a fault at once; a step is overdue only by time in which its threads slept; one that
computes or is starved of cores is not, within STEP_SPIN_FACTOR deadlines of processor time; a deadline never goes below its minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from concordia import config
from concordia.recovery.deadline import StepDeadline
from concordia.recovery.detector import (
    ApiSample,
    Detector,
    ProcessSample,
    Sample,
    StreamSample,
    ThreadTimes,
)
from concordia.recovery.fault import Fault, FaultKind

SECOND = 1_000_000_000
TICK = int(config.WATCH_PERIOD_S * SECOND)
STEP = StreamSample(
    pids=(20,),
    label="rank 0",
    step_started=9,
    step_tokens=4,
    step_started_ns=0,
    step_done=8,
    step_done_ns=0,
    waiting_count=0,
)
IDLE = replace(STEP, step_done=9, step_done_ns=1)
PREFILL = replace(STEP, step_tokens=4000)
ALIVE = ProcessSample(10, "api", "S")
CORE = ProcessSample(20, "VLLM::EngineCore", "R")


@dataclass
class Threads:
    """Thread times as a machine would show them: nanoseconds run and waited, per second of wall time."""

    run: float = 0.0
    wait: float = 0.0
    now_ns: int = 0

    def read(self, pid: int) -> ThreadTimes:
        return {pid: (int(self.run * self.now_ns), int(self.wait * self.now_ns)), pid + 1: (0, 0)}


def watch(
    sample: Callable[[int], Sample],
    *,
    seconds: float,
    threads: Threads,
    learned: float | None = 0.02,
) -> Fault | None:
    """The first fault within `seconds` of samples; `learned` is the step time taught before, per step of 4 tokens."""
    detector = Detector(7, threads.read)
    if learned is not None:
        for _ in range(config.STEP_SAMPLES_MIN):
            detector._deadlines.setdefault(STEP.label, StepDeadline()).learn(4, learned)
    for now in range(TICK, int(seconds * SECOND) + 1, TICK):
        threads.now_ns = now
        fault = detector.observe(sample(now))
        if fault is not None:
            return fault
    return None


def at(
    now: int,
    *,
    stream: StreamSample = IDLE,
    in_flight: int = 0,
    answered: int | None = None,
    status: int = 200,
) -> Sample:
    api = ApiSample(10, now if answered is None else answered, status)
    return Sample(now, (ALIVE, CORE), (stream,), api, in_flight)


@pytest.mark.parametrize(
    ("state", "seconds", "kind"),
    [
        ("S", 5.0, None),
        ("R", 5.0, None),
        ("D", 5.0, None),
        ("T", 0.1, FaultKind.PROCESS_STOPPED),
        ("Z", 0.1, FaultKind.PROCESS_DEATH),
        ("X", 0.1, FaultKind.PROCESS_DEATH),
        ("t", 1.5, None),
        ("t", 3.0, FaultKind.PROCESS_STOPPED),
    ],
)
def test_process_state_is_judged_as_listed_when_seen(
    state: str, seconds: float, kind: FaultKind | None
) -> None:
    def sample(now: int) -> Sample:
        return replace(at(now), processes=(ALIVE, replace(CORE, state=state)))

    fault = watch(sample, seconds=seconds, threads=Threads())
    assert (fault and fault.kind) == kind
    if fault:
        assert fault.pid == 20
        assert fault.replica == 7


@pytest.mark.parametrize(
    ("stream", "threads", "learned", "after", "kind"),
    [
        (STEP, Threads(), 0.02, (1.0, 1.5), FaultKind.STEP_OVERDUE),
        (STEP, Threads(), 0.5, (2.5, 3.1), FaultKind.STEP_OVERDUE),
        (STEP, Threads(), None, (30.0, 30.7), FaultKind.STEP_OVERDUE),
        (STEP, Threads(run=1.0), 0.02, (4.0, 4.7), FaultKind.STEP_SPINNING),
        (STEP, Threads(run=0.05, wait=0.95), 0.02, (20.0, None), None),
        (
            STEP,
            Threads(wait=0.5),
            0.02,
            (1.5, 2.7),
            FaultKind.STEP_OVERDUE,
        ),
        (
            PREFILL,
            Threads(run=0.5, wait=0.5),
            0.02,
            (100.0, None),
            None,
        ),
        (PREFILL, Threads(), 0.02, (30.0, 30.7), FaultKind.STEP_OVERDUE),
        (IDLE, Threads(), 0.02, (60.0, None), None),
    ],
    ids=[
        "asleep",
        "asleep, slow model",
        "asleep, unlearned",
        "computing",
        "starved",
        "half starved, half asleep",
        "maximal prefill beside a start",
        "prefill asleep",
        "between steps",
    ],
)
def test_step_is_judged_by_the_time_it_slept_when_it_does_not_end(
    stream: StreamSample,
    threads: Threads,
    learned: float | None,
    after: tuple[float, float | None],
    kind: FaultKind | None,
) -> None:
    earliest, latest = after
    quiet = watch(
        lambda now: at(now, stream=stream),
        seconds=earliest - 0.05,
        threads=threads,
        learned=learned,
    )
    assert quiet is None
    if latest is not None:
        fault = watch(
            lambda now: at(now, stream=stream), seconds=latest, threads=threads, learned=learned
        )
        assert (fault and fault.kind) == kind


@pytest.mark.parametrize(
    ("what", "sample", "threads", "kind"),
    [
        ("no answer", lambda n: at(n, answered=0), Threads(), FaultKind.API_SILENT),
        ("no answer, tokenising", lambda n: at(n, answered=0), Threads(run=1.0), None),
        ("no answer, starved", lambda n: at(n, answered=0), Threads(wait=1.0), None),
        ("answers 503", lambda n: at(n, status=503), Threads(), FaultKind.API_UNHEALTHY),
        ("answers 200", lambda n: at(n), Threads(), None),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_api_is_judged_by_its_answers_when_asked(
    what: str, sample: Callable[[int], Sample], threads: Threads, kind: FaultKind | None
) -> None:
    fault = watch(sample, seconds=8.0, threads=threads)
    assert (fault and fault.kind) == kind


@pytest.mark.parametrize(
    ("in_flight", "waiting", "threads", "kind"),
    [
        (1, 0, Threads(), FaultKind.UNSCHEDULED),
        (0, 1, Threads(), FaultKind.UNSCHEDULED),
        (1, 0, Threads(run=1.0), None),
        (0, 0, Threads(), None),
    ],
)
def test_unscheduled_request_is_a_fault_when_nothing_happens_for_long(
    in_flight: int, waiting: int, threads: Threads, kind: FaultKind | None
) -> None:
    stream = replace(IDLE, waiting_count=waiting)
    early = watch(
        lambda n: at(n, stream=stream, in_flight=in_flight),
        seconds=config.UNSCHEDULED_S - 1,
        threads=threads,
    )
    assert early is None
    fault = watch(
        lambda n: at(n, stream=stream, in_flight=in_flight),
        seconds=config.UNSCHEDULED_S + 1,
        threads=threads,
    )
    assert (fault and fault.kind) == kind


def test_steps_are_learned_once_each_when_seen_many_times() -> None:
    detector = Detector(7, Threads().read)
    for step in range(1, 20):
        done = replace(
            STEP, step_started=step, step_done=step, step_started_ns=1, step_done_ns=1 + SECOND // 2
        )
        for _ in range(3):
            assert detector.observe(replace(at(SECOND), streams=(done,))) is None
    assert detector.deadline_s(STEP.label, 4) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("step_done", "seconds", "kind"), [(8, 1.5, FaultKind.STEP_OVERDUE), (7, 4.5, None)]
)
def test_deadline_is_that_of_the_largest_step_when_two_are_under_way(
    step_done: int, seconds: float, kind: FaultKind | None
) -> None:
    threads = Threads()
    detector = Detector(7, threads.read)
    deadlines = detector._deadlines.setdefault(STEP.label, StepDeadline())
    for _ in range(config.STEP_SAMPLES_MIN):
        deadlines.learn(4, 0.02)
        deadlines.learn(2000, 1.0)
    faults = []
    for now in range(TICK, int(seconds * SECOND), TICK):
        threads.now_ns = now
        faults.append(detector.observe(at(now, stream=replace(STEP, step_done=step_done))))
    assert next((f.kind for f in faults if f), None) == kind


def test_short_steps_are_learned_when_only_some_are_seen() -> None:
    detector = Detector(7, Threads().read)
    step_ns = 2_000_000
    for tick in range(1, 12):  # 25 steps between two looks, and one under way at each
        number = 25 * tick
        stream = replace(
            STEP,
            step_started=number + 1,
            step_done=number,
            step_started_ns=number * step_ns + 1,
            step_done_ns=number * step_ns,
        )
        assert detector.observe(replace(at(TICK * tick), streams=(stream,))) is None
    assert detector.deadline_s(STEP.label, 4) == config.STEP_DEADLINE_MIN_S


def test_long_step_is_learned_with_its_own_size_when_the_next_has_begun() -> None:
    detector = Detector(7, Threads(run=1.0).read)
    for number in range(1, 13):
        begun = replace(
            STEP,
            step_started=number,
            step_done=number - 1,
            step_tokens=2000,
            step_started_ns=number * SECOND,
        )
        after = replace(
            STEP,
            step_started=number + 1,
            step_done=number,
            step_tokens=4,
            step_started_ns=(number + 1) * SECOND - 5,
            step_done_ns=(number + 1) * SECOND - 10,
        )
        for stream in (begun, after):
            assert (
                detector.observe(replace(at(stream.step_started_ns + 1), streams=(stream,))) is None
            )
    assert detector.deadline_s(STEP.label, 2000) == pytest.approx(5.0, rel=0.01)


def test_what_was_learned_counts_for_the_next_engine_when_shared() -> None:
    deadlines: dict[str, StepDeadline] = {}
    first = Detector(7, Threads().read, deadlines)
    for step in range(1, 20):
        done = replace(
            STEP, step_started=step, step_done=step, step_started_ns=1, step_done_ns=1 + SECOND // 2
        )
        first.observe(replace(at(SECOND), streams=(done,)))
    assert Detector(8, Threads().read, deadlines).deadline_s(STEP.label, 4) == pytest.approx(2.5)


def test_late_watcher_does_not_blame_the_engine_when_it_was_starved_itself() -> None:
    threads = Threads(now_ns=8 * SECOND)
    detector = Detector(7, threads.read)
    for _ in range(config.STEP_SAMPLES_MIN):
        detector._deadlines.setdefault(STEP.label, StepDeadline()).learn(4, 0.02)
    assert detector.observe(at(8 * SECOND, stream=STEP)) is None


@pytest.mark.parametrize(
    ("seen", "tokens", "low", "high"),
    [
        ([], 1, config.STEP_DEADLINE_UNLEARNED_S, config.STEP_DEADLINE_UNLEARNED_S),
        ([(1, 0.001)] * 20, 1, config.STEP_DEADLINE_MIN_S, config.STEP_DEADLINE_MIN_S),
        ([(4, 0.4)] * 20, 4, 2.0, 2.0),
        ([(4, 0.4)] * 20, 16, 2.0, 2.0),
        ([(4, 0.4)] * 20, 17, config.STEP_DEADLINE_UNLEARNED_S, config.STEP_DEADLINE_UNLEARNED_S),
        ([(1, 0.1)] * 9 + [(1000, 5.1)] * 3, 2000, 50.0, 51.0),
        ([(1, 0.1)] * 9 + [(1000, 5.1)] * 2, 1000, 30.0, 30.0),
        ([(4, 0.4)] * 15 + [(4, 60.0)] * 7, 4, 2.0, 2.0),
        (
            [(4, 0.0), (0, 1.0)] * 9,
            4,
            config.STEP_DEADLINE_UNLEARNED_S,
            config.STEP_DEADLINE_UNLEARNED_S,
        ),
    ],
)
def test_deadline_follows_what_was_seen_when_asked_for_a_size(
    seen: list[tuple[int, float]], tokens: int, low: float, high: float
) -> None:
    deadline = StepDeadline()
    for size, seconds in seen:
        deadline.learn(size, seconds)
    assert low <= deadline.deadline_s(tokens) <= high
