"""Whether a replica has failed, decided from what was seen of it, floor 5.

Owns: the decision, per replica, and the memory that it needs (learned step times, how long
something stalled). Promises: the same samples give the same answer; a process that is starved of
cores, or that computes, is not called hung: time counts against it only while its busiest thread
slept. Called by the watch in serving/ about every WATCH_PERIOD_S. It reads no clock, no /proc and
no journal, and does nothing about a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from concordia import config
from concordia.recovery.deadline import StepDeadline
from concordia.recovery.fault import Fault, FaultKind

ThreadTimes = Mapping[int, tuple[int, int]]  # thread id -> (ns run, ns waited for a core)
ReadTimes = Callable[[int], ThreadTimes]

_STOPPED: Final = "T"
_TRACED: Final = "t"
_DEAD: Final = frozenset("ZXx")


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One process of a replica; `state` is the letter of /proc/PID/stat, X when it is gone."""

    pid: int
    name: str
    state: str


@dataclass(frozen=True, slots=True)
class StreamSample:
    """The step words of one writer of the replica, and the processes that do the work of a step."""

    pids: tuple[int, ...]
    label: str
    step_started: int
    step_tokens: int
    step_started_ns: int
    step_done: int
    step_done_ns: int
    waiting_count: int


@dataclass(frozen=True, slots=True)
class ApiSample:
    """What the last requests to /health gave; `status` 0 means no answer."""

    pid: int
    answered_ns: int
    status: int


@dataclass(frozen=True, slots=True)
class Sample:
    """All that was seen of one replica at one moment (CLOCK_MONOTONIC)."""

    now_ns: int
    processes: Sequence[ProcessSample]
    streams: Sequence[StreamSample]
    api: ApiSample | None
    requests_in_flight: int


class Detector:
    """Decides for one replica; `observe` returns the first fault that a sample shows."""

    def __init__(
        self, replica: int, read_times: ReadTimes, deadlines: dict[str, StepDeadline] | None = None
    ) -> None:
        self.replica = replica
        self._read_times = read_times
        # By writer; engines of one server may share what they learned, since they run the same
        # model on alike parts of one machine.
        self._deadlines = {} if deadlines is None else deadlines
        self._steps: dict[str, _Step] = {}
        self._before: dict[str, StreamSample] = {}
        self._traced_since: dict[int, int] = {}
        self._api_stall: _Stall | None = None
        self._idle_stall: _Stall | None = None
        self._idle_mark = 0

    def observe(self, sample: Sample) -> Fault | None:
        """The fault that this sample shows, if any; cheap causes are looked at first."""
        return (
            self._process_fault(sample)
            or self._api_fault(sample)
            or self._step_fault(sample)
            or self._unscheduled_fault(sample)
        )

    def deadline_s(self, label: str, tokens: int) -> float:
        """When a step of this writer is overdue at present."""
        return self._deadline(label).deadline_s(tokens)

    def _process_fault(self, sample: Sample) -> Fault | None:
        self._traced_since = {
            p.pid: self._traced_since.get(p.pid, sample.now_ns)
            for p in sample.processes
            if p.state == _TRACED
        }
        for process in sample.processes:
            if process.state in _DEAD:
                return self._fault(
                    sample, FaultKind.PROCESS_DEATH, f"{process.name} ended", process.pid
                )
            if process.state == _STOPPED:
                return self._fault(
                    sample, FaultKind.PROCESS_STOPPED, f"{process.name} is stopped", process.pid
                )
            held_s = (sample.now_ns - self._traced_since.get(process.pid, sample.now_ns)) / 1e9
            if held_s > config.TRACED_S:
                return self._fault(
                    sample,
                    FaultKind.PROCESS_STOPPED,
                    f"{process.name} is held by a tracer since {held_s:.1f} s",
                    process.pid,
                )
        return None

    def _api_fault(self, sample: Sample) -> Fault | None:
        api = sample.api
        if api is None:
            return None
        if api.status >= 500:
            return self._fault(
                sample, FaultKind.API_UNHEALTHY, f"/health answered {api.status}", api.pid
            )
        silent_s = (sample.now_ns - api.answered_ns) / 1e9
        if silent_s < 2 * config.API_PERIOD_S + config.STEP_SUSPECT_S:
            self._api_stall = None
            return None
        if self._api_stall is None:
            self._api_stall = _Stall((api.pid,), since_ns=api.answered_ns)
        self._api_stall.advance(sample.now_ns, self._read_times)
        if self._api_stall.stalled_s > config.API_SILENT_S:
            return self._fault(
                sample, FaultKind.API_SILENT, f"/health unanswered for {silent_s:.1f} s", api.pid
            )
        return None

    def _step_fault(self, sample: Sample) -> Fault | None:
        for stream in sample.streams:
            self._learn(stream)
            if stream.step_started <= stream.step_done:
                self._steps.pop(stream.label, None)
                continue
            step = self._steps.get(stream.label)
            if step is None or step.number != stream.step_started:
                step = _Step(stream.step_started)
                self._steps[stream.label] = step
            elapsed_s = (sample.now_ns - stream.step_started_ns) / 1e9
            if elapsed_s < config.STEP_SUSPECT_S:
                continue
            if step.stall is None:
                step.stall = _Stall(stream.pids, since_ns=stream.step_started_ns)
            step.stall.advance(sample.now_ns, self._read_times)
            deadline_s = self._deadline_of(stream)
            what = (
                f"{stream.label}: step {stream.step_started} of {stream.step_tokens} tokens after "
                f"{elapsed_s:.2f} s, deadline {deadline_s:.2f} s"
            )
            if step.stall.stalled_s > deadline_s:
                return self._fault(sample, FaultKind.STEP_OVERDUE, what, stream.pids[0])
            if step.stall.ran_s > config.STEP_SPIN_FACTOR * deadline_s:
                return self._fault(sample, FaultKind.STEP_SPINNING, what, stream.pids[0])
        return None

    def _unscheduled_fault(self, sample: Sample) -> Fault | None:
        """Work at hand, and no writer has begun or ended a step for too long."""
        if not sample.streams:
            return None
        has_work = sample.requests_in_flight > 0 or any(s.waiting_count for s in sample.streams)
        in_step = any(s.step_started > s.step_done for s in sample.streams)
        mark = max(s.step_started + s.step_done for s in sample.streams)
        if not has_work or in_step or mark != self._idle_mark:
            self._idle_mark = mark
            self._idle_stall = None
            return None
        if self._idle_stall is None:
            pids = {p.pid for p in sample.processes}
            self._idle_stall = _Stall(tuple(sorted(pids)), since_ns=sample.now_ns)
            return None
        if (sample.now_ns - self._idle_stall.since_ns) / 1e9 < config.STEP_SUSPECT_S:
            return None
        self._idle_stall.advance(sample.now_ns, self._read_times)
        if self._idle_stall.stalled_s > config.UNSCHEDULED_S:
            return self._fault(
                sample,
                FaultKind.UNSCHEDULED,
                f"{sample.requests_in_flight} requests in flight and no step for "
                f"{self._idle_stall.stalled_s:.1f} s",
                sample.streams[0].pids[0],
            )
        return None

    def _deadline(self, label: str) -> StepDeadline:
        return self._deadlines.setdefault(label, StepDeadline())

    def _deadline_of(self, stream: StreamSample) -> float:
        """With two steps under way the words name the later one only, and the earlier may be of any
        size.
        """
        if stream.step_started - stream.step_done <= 1:
            return self.deadline_s(stream.label, stream.step_tokens)
        deadlines = self._deadline(stream.label)
        return max(deadlines.deadline_s(stream.step_tokens), deadlines.longest_s())

    def _learn(self, stream: StreamSample) -> None:
        """Take what steps have ended since the last sample into account.

        A step's own stamps are seen when it ends between two samples or is the last one. An engine
        that schedules ahead announces the next step before the one under way ends: what then lies
        between the two stamps is the time of the one that ended. Of many short steps only their
        mean is seen. The size is the announced one each time; where that is wrong, medians outvote
        it.
        """
        before = self._before.get(stream.label)
        self._before[stream.label] = stream
        if before is not None and stream.step_done <= before.step_done:
            return
        tokens, duration_ns = stream.step_tokens, 0
        if before is not None and stream.step_done == before.step_started:
            tokens, duration_ns = before.step_tokens, stream.step_done_ns - before.step_started_ns
        elif stream.step_started - 1 <= stream.step_done <= stream.step_started:
            duration_ns = stream.step_done_ns - stream.step_started_ns
        if duration_ns <= 0 and before is not None and before.step_tokens == tokens:
            span_ns = stream.step_started_ns - before.step_started_ns
            if 0 < span_ns < config.STEP_SUSPECT_S * 1e9:  # longer ones may hold a pause
                duration_ns = span_ns // (stream.step_started - before.step_started)
        if duration_ns > 0:
            self._deadline(stream.label).learn(tokens, duration_ns / 1e9)

    def _fault(self, sample: Sample, kind: FaultKind, detail: str, pid: int) -> Fault:
        return Fault(kind, self.replica, sample.now_ns, detail, pid)


class _Stall:
    """How long the busiest thread of some processes neither ran nor waited for a core.

    Between two looks the busiest thread is the one whose run plus run-queue time grew most; what is
    missing to wall time, all threads slept. Run time alone is kept beside it, to bound a loop that
    never ends. Nothing is known of the time before the first look: it counts STEP_SUSPECT_S at
    most, because whoever looks may have been starved too.
    """

    def __init__(self, pids: tuple[int, ...], *, since_ns: int) -> None:
        self.since_ns = since_ns
        self.stalled_s = 0.0
        self.ran_s = 0.0
        self._pids = pids
        self._looked_ns = since_ns
        self._times: dict[tuple[int, int], tuple[int, int]] = {}

    def advance(self, now_ns: int, read_times: ReadTimes) -> None:
        times = {(pid, tid): value for pid in self._pids for tid, value in read_times(pid).items()}
        known = [(times[k], self._times[k]) for k in times.keys() & self._times.keys()]
        ran = max((new[0] - old[0] for new, old in known), default=0)
        busy = max((sum(new) - sum(old) for new, old in known), default=0)
        wall = now_ns - self._looked_ns
        if not self._times:
            wall = min(wall, int(config.STEP_SUSPECT_S * 1e9))
        self.stalled_s += max(0, wall - busy) / 1e9
        self.ran_s += min(wall, ran) / 1e9
        self._looked_ns = now_ns
        self._times = times


@dataclass(slots=True)
class _Step:
    number: int
    stall: _Stall | None = None
