"""How long an executor stays, as far as no GPU is needed for it.

Invariants: a residency that the device has not got is refused with what to use instead; `auto` takes the default unless another is clearly
cheaper, and says so; tasks handed in for a stream run at the next place of that stream and never before, once, in order, with the code that
their opcode means then; `parked` is there whatever the policy.
"""

import ctypes
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.device.compiler import HandlerSource, HostCompiler
from concordia.device.driver import ExecutorPlan, open_device
from concordia.device.host import HostDevice
from concordia.device.memory import Buffer, JournalTarget
from concordia.device.policy import DEFAULT, POLICIES, policy_of
from concordia.errors import DeviceError, RingFull, UsageError, WaitTimeout
from concordia.runtime.executor import Runtime
from concordia.runtime.residency_choice import Cost, choose, pick
from concordia.runtime.ring import Task
from concordia.runtime.stream_tasks import StreamTasks

COUNTING = """#include "call.h"
HANDLER { if (lane == 0) call->result = add_device(reinterpret_cast<uint64_t*>(call->task.arg), 1) * 16 + VERSION; }
"""
# concordia_stream_tasks of executor.cu with one lane: the same executor, bounded by the same bell.
PLACE = """#include "executor.h"
EXPORT void run_place(Executor* tasks, Executor* main, uint64_t bell) {
  tasks->table_generation = &main->ring->generation;
  run_executor(tasks, 0, bell);
}
"""


@pytest.fixture
def device() -> Iterator[HostDevice]:
    device = open_device("host")
    assert isinstance(device, HostDevice)
    yield device
    device.close()


class Streams:
    """A stream launch of this processor: streams are lists, and what is enqueued runs when `run` says."""

    def __init__(self, runtime: Runtime, ring: int) -> None:
        library = runtime.device.library
        path, _ = HostCompiler().compile(HandlerSource.of("place.cpp", text=PLACE))
        self._place = ctypes.CDLL(str(path)).run_place
        self._place.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
        self._memory = [Buffer(library.executor_bytes() + 128) for _ in range(2)]
        stage = runtime.device.allocate(1 << 16)
        self._states = []
        for buffer, of in zip(self._memory, (ring, runtime.ring.device_address), strict=True):
            plan = ExecutorPlan(of, 0, 0, 1 << 16, 0, stage, 4096, stage, stage, 4096, 1)
            self._states.append(-(-buffer.address // 128) * 128)
            library.executor_image(self._states[-1], plan.pack(), self._states[-1])
        self.streams: dict[int, list[Any]] = {}
        self.captured: set[int] = set()
        self.bell = 0
        self.closed = 0

    def enqueue(self, stream: int) -> None:
        self.streams.setdefault(stream, []).append("place")

    def check(self, stream: int) -> None:
        if stream in self.captured:
            raise UsageError("being captured")

    def ring_bell(self, stream: int, number: int) -> None:
        self.streams.setdefault(stream, []).append(number)

    def run(self, stream: int) -> None:
        for what in self.streams.pop(stream):
            if what == "place":
                self._place(*self._states, self.bell)
            else:
                self.bell = what

    def close(self) -> None:
        self.closed += 1


class StreamExecutor:
    """An executor that lets tasks run in streams; nobody else runs tasks of these tests."""

    lost: DeviceError | None = None

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def stream_launch(self, ring: int) -> Streams:
        self.launch = Streams(self._runtime, ring)
        return self.launch


class Staged:
    """A runtime for its operators, stream tasks, the streams, and a word to count in."""

    def __init__(self, device: HostDevice, slots: int) -> None:
        self.runtime = Runtime(device)
        self.executor = StreamExecutor(self.runtime)
        self.tasks = StreamTasks(device, self.executor, self.runtime.operators, stream=1, slots=slots)  # type: ignore[arg-type]
        self.streams = self.executor.launch
        self.word = np.zeros(1, np.uint64)
        self.swap(1)

    def swap(self, version: int) -> None:
        self.opcode = self.runtime.install("count", HandlerSource.of("count", {"VERSION": version}, text=COUNTING)).opcode

    def task(self, **words: Any) -> Task:
        return Task(opcode=self.opcode, kind=abi.TASK_COMPUTE, arg=self.word.ctypes.data, **words)


@pytest.fixture
def staged(device: HostDevice) -> Iterator[Staged]:
    staged = Staged(device, 16)
    yield staged
    staged.tasks.close()
    staged.runtime.close()


@pytest.mark.parametrize("residency", sorted(set(POLICIES) - {DEFAULT}))
def test_residency_is_refused_when_the_device_has_only_threads(
    device: HostDevice, residency: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []
    monkeypatch.setattr(device, "share", lambda address, size: (shared.append(address), address)[1])
    monkeypatch.setattr(device, "unshare", shared.remove)
    pool, control = Buffer(1 << 16), Buffer(4096)
    with pytest.raises(UsageError, match=f"residency {residency} wants a GPU"):
        Runtime(device, target=JournalTarget(pool.address, pool.size, 4096, control.address), residency=residency)
    assert (device._buffers, shared) == ({}, [])  # and nothing of it is left


def test_residency_is_refused_when_its_name_is_unknown(device: HostDevice) -> None:
    with pytest.raises(UsageError, match="unknown residency 'always': use leased, resident, stream or auto"):
        Checkpointer(device, None, residency="always")


@pytest.mark.parametrize("residency", ["leased", "auto"])
def test_stats_say_the_residency_when_it_was_asked_for(residency: str) -> None:
    with Checkpointer.open("host", None, residency=residency) as checkpointer:
        with checkpointer.parked(), checkpointer.parked():
            ticket = checkpointer.runtime.submit(Task())
            with pytest.raises(WaitTimeout):
                checkpointer.wait(ticket, 0.02)
        assert checkpointer.wait(ticket).is_ok
        assert checkpointer.runtime.stats().residency == "leased"


def test_stream_tasks_are_refused_when_the_device_has_no_streams(device: HostDevice) -> None:
    runtime = Runtime(device)
    with pytest.raises(UsageError, match="no streams"):
        runtime.stream_tasks(0)
    runtime.close()


def test_policies_keep_a_foreign_call_late_and_never_stuck_when_they_stay() -> None:
    assert all(policy.lease_ns <= config.RESIDENT_LEASE_NS for policy in POLICIES.values())
    assert config.RESIDENT_LEASE_NS <= config.WAIT_PARK_S * 1e9
    assert config.PLACE_LEASE_NS <= config.WAIT_PARK_S * 1e9 / 4  # no stop reaches a place: parks wait for all of it
    assert [name for name, policy in POLICIES.items() if policy.stays] == ["resident"]
    assert policy_of("stream").idle_ns == 0


def test_page_states_the_limits_when_they_change() -> None:
    text = (pathlib.Path(__file__).parents[1] / "docs" / "residency.md").read_text(encoding="utf-8")
    leased, resident, stream = (POLICIES[name] for name in ("leased", "resident", "stream"))
    for words in (
        f"leaves after {leased.idle_ns // 1000} us of silence",
        f"a lease, {leased.lease_ns // 1_000_000} ms, at most",
        f"late by up to {resident.lease_ns // 1_000_000_000} s, never stuck",
        f"a launch stays {stream.lease_ns // 1_000_000} ms at most",
        f"for a step of {config.AUTO_STEP_US / 1000:.0f} ms",
        f"cheaper by {100 * config.AUTO_GAIN_MIN:.0f} %",
        f"and {config.PLACE_LEASE_NS // 1_000_000} ms at most",
        f"its ring ({config.STREAM_TASK_SLOTS:,} slots)",
    ):
        assert words in text
    assert config.AUTO_S < 0.2


@pytest.mark.parametrize(
    ("costs", "picked"),
    [
        ([Cost("leased", 14.0, 0.0), Cost("resident", 6.0, 0.11), Cost("stream", 13.5, 0.0)], "leased"),
        ([Cost("leased", 14.0, 0.0), Cost("resident", 6.0, 0.009), Cost("stream", 13.5, 0.0)], "resident"),
        ([Cost("leased", 14.0, 0.05), Cost("resident", 6.0, 0.11), Cost("stream", 20.0, 0.0)], "stream"),
        ([Cost("leased", 14.0, -0.02), Cost("stream", 12.7, -0.5)], "leased"),
        ([Cost("leased", 14.0, 0.0)], "leased"),
    ],
)
def test_cheapest_is_picked_when_it_beats_the_default_clearly(costs: list[Cost], picked: str) -> None:
    assert pick(costs).residency == picked


class Probed(HostDevice):
    """A device whose executors follow every policy in name, and whose neighbour pays for one that stays."""

    residencies = tuple(POLICIES)

    def __init__(self, slow_down: float) -> None:
        super().__init__()
        self._slow_down, self._is_staying = slow_down, False
        self.settled: list[str] = []

    def executor(self, plan: ExecutorPlan, residency: str = DEFAULT) -> Any:
        executor = super().executor(plan)

        def settle(policy: Any) -> None:
            executor.residency = policy.name  # type: ignore[misc]
            self._is_staying = policy.stays
            self.settled.append(policy.name)

        executor.settle = settle  # type: ignore[method-assign]
        return executor

    def neighbour(self) -> Any:
        device = self

        class Neighbour:
            closed = 0

            def time_us(self) -> float:
                return 100.0 * (1 + device._slow_down * device._is_staying)

            def close(self) -> None:
                Neighbour.closed += 1

        self.probe = Neighbour
        return Neighbour()


def test_auto_measures_every_residency_and_says_why_when_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    device = Probed(0.11)
    with caplog.at_level(logging.INFO):
        runtime = Runtime(device, residency="auto")
    assert device.settled == [*POLICIES, DEFAULT, runtime.stats().residency]
    assert runtime.stats().residency != "resident"  # 11 % of a step is a millisecond
    assert device.probe.closed == 1
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("residency")]
    for name in POLICIES:
        assert f"{name} " in line
    assert "a full neighbour +11.0 %" in line
    runtime.close()
    device.close()


def test_auto_leaves_the_default_when_measuring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Probed(0.0)
    runtime = Runtime(device)
    monkeypatch.setattr(config, "WAIT_PARK_S", 0.0)
    with pytest.raises(WaitTimeout):
        choose(device, runtime.ring, runtime.executor)
    monkeypatch.undo()
    assert device.settled == [DEFAULT, DEFAULT]  # the first to be measured, and the way back
    assert device.probe.closed == 1
    runtime.close()
    device.close()


def test_stream_tasks_run_at_the_next_place_of_their_stream_and_never_before(staged: Staged) -> None:
    early = staged.tasks.hand_in([staged.task(), staged.task()])
    staged.tasks.enqueue()
    late = staged.tasks.hand_in([staged.task()])
    assert staged.tasks.pending_count == 2
    staged.streams.streams[1].remove(2)  # the second bell has not been reached yet
    staged.streams.run(1)
    assert [staged.tasks.wait(ticket).result for ticket in early] == [1, 17]
    assert staged.tasks.result(late[0]) is None
    assert staged.tasks.pending_count == 1
    staged.streams.ring_bell(1, 2)
    staged.tasks.enqueue()
    staged.streams.run(1)
    assert staged.tasks.wait(late[0]).result == 33
    assert (staged.word[0], staged.tasks.pending_count) == (3, 0)


def test_replay_does_nothing_when_nothing_was_handed_in(staged: Staged) -> None:
    for _ in range(3):
        staged.tasks.enqueue()
        staged.streams.run(1)
    assert staged.word[0] == 0
    staged.tasks.hand_in([])
    staged.tasks.enqueue()
    staged.streams.run(1)
    assert staged.tasks.pending_count == 0


def test_stream_tasks_run_the_newest_code_when_it_was_swapped_after_capture(staged: Staged) -> None:
    results = []
    for version in (1, 2, 3, 4):
        staged.swap(version)
        (ticket,) = staged.tasks.hand_in([staged.task()])
        staged.tasks.enqueue()
        staged.streams.run(1)
        results.append(staged.tasks.wait(ticket).result % 16)
    assert results == [1, 2, 3, 4]


def test_stream_tasks_go_on_for_many_laps_when_the_ring_is_small(staged: Staged) -> None:
    for step in range(100):
        tickets = staged.tasks.hand_in([staged.task(blocks=range(3))] * 5)
        staged.tasks.enqueue()
        staged.streams.run(1)
        assert [staged.tasks.wait(ticket).result >> 4 for ticket in tickets] == list(range(step * 5, step * 5 + 5))


def test_as_many_stream_tasks_are_taken_as_there_is_room_for(staged: Staged) -> None:
    tickets = staged.tasks.hand_in([staged.task()] * 40)
    assert len(tickets) == 15  # one slot is the gate's
    with pytest.raises(RingFull):
        staged.tasks.hand_in([staged.task()])
    assert staged.tasks.pending_count == 1
    staged.tasks.enqueue()
    staged.streams.run(1)
    assert staged.tasks.wait(tickets[-1]).result >> 4 == 14
    assert len(staged.tasks.hand_in([staged.task()])) == 1


def test_nothing_is_handed_in_when_the_stream_is_being_captured(staged: Staged) -> None:
    staged.streams.captured.add(1)
    with pytest.raises(UsageError, match="being captured"):
        staged.tasks.hand_in([staged.task()])
    staged.tasks.enqueue()
    staged.streams.run(1)
    assert (staged.word[0], staged.tasks.pending_count) == (0, 0)


def test_wait_says_so_when_the_graph_was_not_replayed(staged: Staged) -> None:
    (ticket,) = staged.tasks.hand_in([staged.task()])
    with pytest.raises(WaitTimeout, match="launch 1, left 0"):
        staged.tasks.wait(ticket, 0.02)
    staged.executor.lost = DeviceError("the context is lost")
    with pytest.raises(DeviceError, match="context is lost"):
        staged.tasks.wait(ticket, 0.02)


def test_stream_tasks_say_that_they_are_closed(staged: Staged) -> None:
    staged.tasks.close()
    staged.tasks.close()
    assert staged.streams.closed == 1
    for call in (lambda: staged.tasks.enqueue(), lambda: staged.tasks.hand_in([]), lambda: staged.tasks.pending_count):
        with pytest.raises(DeviceError, match="closed"):
            call()
