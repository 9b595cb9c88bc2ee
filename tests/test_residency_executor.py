"""A GPU's executor under each policy, on a driver of threads (fake_cuda.py).

Invariants: every task runs once and in order whatever the policy; a resident executor is inside without work, comes back after its lease and
after a park, and is out whenever a call of ours waits for the whole device; a stream's places run what was handed in before them, take turns
with the executor's own launches, and have left once it is parked; closing ends everything, also when the context was lost.
"""

import ctypes
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from concordia import abi, config
from concordia.device import driver_park, quick_swap
from concordia.device.compiler import HandlerSource
from concordia.device.policy import POLICIES
from concordia.errors import DeviceError, HandlerRefused, UsageError, WaitTimeout
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task
from fake_cuda import FakeCuda, Result
from waiting import until

COUNTING = """#include "call.h"
HANDLER {
  uint64_t* words = reinterpret_cast<uint64_t*>(call->task.arg);
  if (lane != 0) return;
  if (exchange_device(words + 1, 1) != 0) call->status = kStatusTooLarge;  // two at once
  call->result = words[0] * 16 + VERSION;
  words[0] += 1;
  store<kRelease, kDevice>(words + 1, 0);
}
"""


def source(version: int) -> HandlerSource:
    return HandlerSource.of("counting", {"VERSION": version}, text=COUNTING)


@pytest.fixture
def device() -> Iterator[FakeCuda]:
    device = FakeCuda()
    yield device
    assert all(executor._is_closed for executor in device._executors)
    assert device.driver.inside == 0
    device.close()


@pytest.fixture
def words() -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.zeros(2, np.uint64)


@pytest.fixture(params=list(POLICIES))
def runtime(device: FakeCuda, request: pytest.FixtureRequest) -> Iterator[Runtime]:
    runtime = Runtime(device, slots=64, residency=request.param)
    yield runtime
    runtime.close()


def task(runtime: Runtime, words: np.ndarray[tuple[int], np.dtype[np.uint64]], version: int = 1) -> Task:
    operator = runtime.install("count", source(version))
    return Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=words.ctypes.data)


def test_tasks_run_once_in_order_whatever_the_policy(runtime: Runtime, words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
    wanted = task(runtime, words)
    for start in range(0, 600, 30):
        tickets = [runtime.submit(wanted) for _ in range(30)]
        assert [runtime.wait(ticket).result >> 4 for ticket in tickets] == list(range(start, start + 30))
    assert runtime.stats().done == runtime.stats().submitted


def test_nothing_runs_when_parked_whatever_the_policy(runtime: Runtime, words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
    wanted = task(runtime, words)
    runtime.wait(runtime.submit(wanted))
    other = Runtime(runtime.device, slots=64)
    with runtime.parked(), runtime.parked():
        assert runtime.device._executors[0]._launches.are_over()  # type: ignore[attr-defined]
        ticket = runtime.submit(wanted)
        runtime.executor.launch()
        other.drain()  # what is not parked has run meanwhile
        with pytest.raises(WaitTimeout):
            runtime.wait(ticket, 0.02)
        assert words[0] == 1
    assert runtime.wait(ticket).result == 17
    other.close()


def test_new_code_runs_when_swapped_whatever_the_policy(runtime: Runtime, words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
    for version in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12):
        assert runtime.wait(runtime.submit(task(runtime, words, version))).result % 16 == version


@pytest.mark.parametrize("residency", ["leased", "resident"])
def test_swap_is_one_call_when_the_executor_leaves_at_once(
    device: FakeCuda, words: np.ndarray[tuple[int], np.dtype[np.uint64]], monkeypatch: pytest.MonkeyPatch, residency: str
) -> None:
    monkeypatch.setattr(quick_swap, "QUICK_SWAP_NS", 1_000_000_000)  # a busy machine has the executor leave late
    runtime = Runtime(device, slots=64, residency=residency)
    said: list[bool] = []
    swap = runtime.executor.swap_operator
    monkeypatch.setattr(runtime.executor, "swap_operator", lambda prepare: said.append(swap(prepare)) or said[-1])
    first, answers, is_over = task(runtime, words), [], threading.Event()
    images = [device.build(source(version)) for version in (1, 2)]

    def flood() -> None:
        while not is_over.is_set():
            tickets = [runtime.submit(first) for _ in range(8)]
            answers.extend(runtime.wait(ticket).result for ticket in tickets)

    thread = threading.Thread(target=flood)
    thread.start()
    for turn in range(1, 41):
        runtime.adopt("count", images[turn % 2])
    until(lambda: bool(answers))
    is_over.set()
    thread.join(10)
    assert [answer >> 4 for answer in answers] == list(range(len(answers)))  # none lost, twice or out of order
    assert runtime.wait(runtime.submit(first)).result % 16 == 1
    assert said == [True] * 41
    runtime.close()


def test_swap_waits_without_the_lock_when_a_task_is_inside(device: FakeCuda) -> None:
    runtime = Runtime(device, slots=64)
    holding = '#include "call.h"\nHANDLER { while (load<kAcquire, kSystem>(reinterpret_cast<uint64_t*>(call->task.arg)) == 0) yield_lane(); call->result = VERSION; }\n'
    images = [device.build(HandlerSource.of("hold", {"VERSION": version}, text=holding)) for version in (1, 2)]
    operator = runtime.adopt("hold", images[0])
    free = np.zeros(2, np.uint64)
    runtime.ring.store("lease_ns", 1_000_000_000)  # both tasks in one stay
    tickets = [runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=free[i:].ctypes.data)) for i in (0, 1)]
    timers = [threading.Timer(0.05 * (i + 1), free.__setitem__, (i, 1)) for i in (0, 1)]
    for timer in timers:
        timer.start()
    swapped = runtime.adopt("hold", images[1])
    assert [runtime.wait(ticket).result for ticket in tickets] == [1, 1]  # both had started before it
    assert runtime.wait(runtime.submit(Task(opcode=swapped.opcode, kind=abi.TASK_COMPUTE, arg=free.ctypes.data))).result == 2
    assert runtime.ring.load("stop") == 0
    runtime.close()


def test_swap_changes_nothing_when_the_context_is_lost(device: FakeCuda) -> None:
    runtime = Runtime(device, slots=64)
    image = device.build(source(1))
    runtime.adopt("count", image)
    device.driver.is_lost = True
    with pytest.raises(DeviceError, match="swap an operator: CUDA_ERROR_ILLEGAL_ADDRESS"):
        runtime.adopt("count", device.build(source(2)))
    assert runtime.operators.find("count").digest == image.digest  # type: ignore[union-attr]
    with pytest.raises(DeviceError):
        runtime.submit(Task())
    runtime.close()


def test_tasks_wait_for_a_framework_s_stream_whatever_the_policy(runtime: Runtime, words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
    driver = runtime.device.driver  # type: ignore[attr-defined]
    wanted = task(runtime, words)
    _, stream = driver.cuStreamCreate(1)
    held = threading.Event()
    driver.streams[stream].put(lambda: held.wait(5) and words.__setitem__(0, 7))
    early = runtime.submit(wanted)
    runtime.order_after(stream)
    ticket = runtime.submit(wanted)
    assert runtime.wait(early).result == 1
    threading.Timer(0.02, held.set).start()
    assert runtime.wait(ticket).result >> 4 == 7  # the word that the stream's work wrote, not what was there before


def test_runtime_ends_when_forgotten_whatever_the_policy(device: FakeCuda) -> None:
    for residency in POLICIES:
        forgotten = Runtime(device, slots=64, residency=residency)
        forgotten.submit(Task())
        del forgotten
        assert device._executors[-1]._is_closed
        assert device.driver.inside == 0


def test_resident_is_inside_without_work_and_again_after_a_park(device: FakeCuda) -> None:
    runtime = Runtime(device, residency="resident")
    until(lambda: runtime.stats().is_inside and device.driver.inside == 1)
    launches = runtime.stats().launches
    beats = runtime.stats().heartbeat
    until(lambda: runtime.stats().heartbeat > beats + 1000)  # it looks, and does not leave
    assert runtime.stats().launches == launches
    with runtime.parked():
        assert device.driver.inside == 0
    until(lambda: device.driver.inside == 1)
    assert runtime.stats().launches == launches + 1
    runtime.close()


def test_resident_renews_its_lease_without_work(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(POLICIES["resident"], lease_ns=20_000_000)
    runtime = Runtime(device)
    runtime.executor.settle(short)
    until(lambda: runtime.stats().launches >= 5)
    runtime.executor.settle(POLICIES["leased"])
    until(lambda: not runtime.stats().is_inside)
    launches = runtime.stats().launches
    threading.Event().wait(0.06)
    assert (runtime.stats().launches, runtime.stats().residency) == (launches, "leased")
    runtime.close()


def test_resident_is_out_when_a_call_of_ours_waits_for_the_device(device: FakeCuda, words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
    first = Runtime(device, residency="resident")
    until(lambda: device.driver.inside == 1)
    other = Runtime(device)
    assert other.wait(other.submit(task(other, words))).is_ok
    until(lambda: not other.stats().is_inside)
    device.free(device.allocate(4096))
    other.close()
    until(lambda: device.driver.inside == 1)
    assert device.met == []
    assert first.wait(first.submit(Task())).is_ok
    first.close()


def test_device_says_so_when_a_refused_candidate_does_not_end(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(device, slots=64)
    word = np.zeros(1, np.uint64)
    holding = '#include "call.h"\nHANDLER { while (load<kAcquire, kSystem>(reinterpret_cast<uint64_t*>(call->task.arg)) == 0) yield_lane(); }\n'
    with monkeypatch.context() as patched:
        patched.setattr(config, "WAIT_TASK_S", 0.05)
        patched.setattr(config, "WAIT_PARK_S", 0.05)
        with pytest.raises(HandlerRefused, match="no answer"):
            runtime.register_operator("hold", holding, self_test=lambda trial: trial.compute(arg=word.ctypes.data))
    for waits in (lambda: runtime.install("count", source(1)), lambda: device.free(0), lambda: device.unshare(0)):
        with pytest.raises(DeviceError, match="does not end"):
            waits()
    word[0] = 1
    assert device._executors[1].close(1)
    runtime.install("count", source(1))
    runtime.close()


@pytest.mark.parametrize("failing", ["cuModuleGetFunction", "cuStreamCreate", "cuEventCreate", "cuLaunchKernel"])
def test_nothing_is_kept_when_an_executor_cannot_be_made(device: FakeCuda, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, streams = set(device._buffers), []
    monkeypatch.setattr(device.driver, failing, lambda *_: (Result.CUDA_ERROR_ILLEGAL_ADDRESS, None))
    destroy = device.driver.cuStreamDestroy
    monkeypatch.setattr(device.driver, "cuStreamDestroy", lambda stream: (streams.append(stream), destroy(stream))[1])
    with pytest.raises(DeviceError):
        Runtime(device, slots=64, residency="resident")
    assert set(device._buffers) == held
    assert streams == list(device.driver.streams)
    assert device._executors == []


def test_close_ends_when_the_context_was_lost(device: FakeCuda) -> None:
    for residency in POLICIES:
        runtime = Runtime(device, residency=residency)
        runtime.wait(runtime.submit(Task()))
        runtime.executor.park(1)
        device.driver.is_lost = True
        runtime.executor.lost = DeviceError("lost")
        runtime.close()
        device.driver.is_lost = False


@pytest.mark.parametrize("residency", ["leased", "resident"])
def test_stream_tasks_are_refused_when_the_policy_has_other_launches(device: FakeCuda, residency: str) -> None:
    runtime = Runtime(device, residency=residency)
    with pytest.raises(UsageError, match="want residency stream"):
        runtime.stream_tasks(1)
    runtime.close()


def test_replays_run_what_was_handed_in_with_the_code_of_then(device: FakeCuda, words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
    driver = device.driver
    runtime = Runtime(device, residency="stream")
    _, stream = driver.cuStreamCreate(1)
    _, side = driver.cuStreamCreate(1)
    tasks = runtime.stream_tasks(stream, slots=64)
    driver.graphs = {stream: [], side: []}
    with pytest.raises(UsageError, match="being captured"):
        tasks.hand_in([Task()])
    tasks.enqueue(captured=side)
    graph = driver.graphs.pop(side)
    assert driver.graphs.pop(stream) == []
    for version in range(1, 12):
        wanted = task(runtime, words, version)
        tickets = []
        for _ in range(4):
            tickets += tasks.hand_in([wanted, wanted])
            driver.replay(graph, stream)
            ring = runtime.submit(wanted)  # at the same time, by the executor's own launch
            driver.replay(graph, stream)  # and one for which nothing was handed in
        answers = [tasks.wait(ticket) for ticket in tickets] + [runtime.wait(ring)]
        assert all(answer.is_ok and answer.result % 16 == version for answer in answers)
        counts = [answer.result >> 4 for answer in answers[:-1]]
        assert counts == sorted(counts)
    runtime.drain()
    assert (words[0], tasks.pending_count) == (11 * 12, 0)
    assert driver.launches[b"concordia_stream_tasks"] == 1 + 88  # one to begin with
    runtime.close()
    with pytest.raises(DeviceError, match="closed"):
        tasks.enqueue()


def test_place_lets_its_stream_go_on_when_a_handler_of_the_executor_hangs(device: FakeCuda) -> None:
    runtime = Runtime(device, residency="stream")
    _, stream = device.driver.cuStreamCreate(1)
    tasks = runtime.stream_tasks(stream, slots=16)
    word = np.zeros(1, np.uint64)
    holding = '#include "call.h"\nHANDLER { while (load<kAcquire, kSystem>(reinterpret_cast<uint64_t*>(call->task.arg)) == 0) yield_lane(); }\n'
    operator = runtime.install("hold", HandlerSource.of("hold", text=holding))
    hung = runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word.ctypes.data))
    until(lambda: device.driver.inside == 1)
    (ticket,) = tasks.hand_in([Task()])
    for _ in range(2):
        tasks.enqueue()
        until(lambda: int(device.driver.cuStreamQuery(stream)[0]) == 0)
        assert tasks.result(ticket) is None
    word[0] = 1
    runtime.wait(hung)
    tasks.enqueue()
    assert tasks.wait(ticket).is_ok
    runtime.close()


def test_park_waits_for_a_place_that_is_inside(device: FakeCuda) -> None:
    runtime = Runtime(device, residency="stream")
    _, stream = device.driver.cuStreamCreate(1)
    tasks = runtime.stream_tasks(stream, slots=16)
    word = np.zeros(1, np.uint64)
    holding = '#include "call.h"\nHANDLER { while (load<kAcquire, kSystem>(reinterpret_cast<uint64_t*>(call->task.arg)) == 0) yield_lane(); }\n'
    operator = runtime.install("hold", HandlerSource.of("hold", text=holding))
    (ticket,) = tasks.hand_in([Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word.ctypes.data)])
    tasks.enqueue()
    until(lambda: device.driver.inside == 1)
    threading.Timer(0.05, lambda: word.__setitem__(0, 1)).start()
    with runtime.parked():
        assert tasks.result(ticket) is not None
        assert device.driver.inside == 0
    runtime.close()


class StandInShim:
    """native/park.c as far as an executor sees it."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, int]] = []
        self.exempt: list[int] = []

    def concordia_park_register(self, park: ctypes.c_void_p, unpark: ctypes.c_void_p, context: ctypes.c_void_p) -> int:
        assert park.value
        assert unpark.value
        assert context.value
        self.told.append((park.value, unpark.value, context.value))
        return len(self.told) - 1

    def concordia_park_unregister(self, handle: int) -> int:
        return int(handle == len(self.told) - 1)

    def concordia_park_exempt(self, function: ctypes.c_void_p) -> None:
        assert function.value
        self.exempt.append(function.value)

    def call(self, which: int) -> None:
        """As the thread of a driver call does it, without an interpreter's lock."""
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.told[-1][which])(self.told[-1][2])


def test_executor_is_out_while_a_call_of_the_framework_waits_for_the_whole_gpu(device: FakeCuda, words: np.ndarray[tuple[int], np.dtype[np.uint64]], monkeypatch: pytest.MonkeyPatch) -> None:
    shim = StandInShim()
    monkeypatch.setattr(driver_park, "_shim", lambda: shim)
    runtime = Runtime(device, slots=64, residency="resident")
    wanted = task(runtime, words)
    assert runtime.wait(runtime.submit(wanted)).is_ok
    assert len(shim.exempt) == 1
    for round_number in range(20):
        until(lambda: device.driver.inside == 1)
        shim.call(0)
        until(lambda: device.driver.inside == 0)
        ticket = runtime.submit(wanted)
        if round_number % 2:
            shim.call(0)  # another thread's
            shim.call(1)
        assert runtime.result(ticket) is None
        assert device.driver.inside == 0
        with runtime.parked():  # ours beside theirs
            assert device.driver.inside == 0
        assert runtime.result(ticket) is None, "ours has ended, theirs has not"
        shim.call(1)
        assert runtime.wait(ticket).is_ok
    runtime.close()


def test_nobody_is_told_of_driver_calls_when_the_executor_leaves_by_itself(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    shim = StandInShim()
    monkeypatch.setattr(driver_park, "_shim", lambda: shim)
    for residency in ("leased", "stream"):
        Runtime(device, slots=64, residency=residency).close()
    assert shim.told == []
