"""checkpoint/restore_burst.py, restore_tasks.py and page_tasks.py: what a restore or a scan leaves behind when it fails, on a driver of
threads (fake_cuda.py).

Invariants: a burst is put only where the ring had room for its gate; a full ring is waited for within the bound; a restore that fails ends
only once nothing of it writes any more, or says that it has not and refuses the next; what could not be made is given back; nobody's task
comes between a burst and the task that appends what it found, and how long ago the task before was done does not matter.
"""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from concordia import abi, config
from concordia.checkpoint.page_tasks import PageTasks
from concordia.checkpoint.restore_burst import PIECES_MAX, RestoreBurst
from concordia.checkpoint.restore_tasks import KvPiece, restore_by_tasks
from concordia.device.compiler import HandlerSource
from concordia.device.memory import JournalTarget
from concordia.errors import AnswerForgotten, DeviceError, RestoreUnfinished, RingFull, WaitTimeout
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task
from fake_cuda import FakeCuda

SLOTS = 64
TARGET = JournalTarget(0, 0, 0, 0)
GEOMETRY = SimpleNamespace(tail_bytes=lambda tokens: 64 * tokens, raw_bytes=lambda: 4096, block_tokens=16)
WAITING = """#include "call.h"
HANDLER {
  const uint64_t* word = reinterpret_cast<const uint64_t*>(call->task.source);
  while (word != nullptr && load<kAcquire, kSystem>(word) == 0) yield_lane();
}
"""


class FakeBurst:
    """A kernel of the whole device: says of every piece that it is right, once it is let go."""

    ctas = 1

    def __init__(self, device: FakeCuda) -> None:
        self._driver = device.driver
        self.open = threading.Event()
        self.open.set()
        self.launched = self.ran = 0

    def enqueue(self, stream: Any, words: Any, *, zeroed: int = 0) -> None:
        self.launched += 1
        self._driver.streams[stream].put(lambda: self._run(words))

    def _run(self, words: Any) -> None:
        assert self.open.wait(10)
        if len(words) > 4:
            _, _, count, answers, *_ = words
            np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint64 * count).from_address(answers))[:] = abi.STATUS_OK
        self.ran += 1

    def close(self) -> None:
        pass


@pytest.fixture
def device() -> Iterator[FakeCuda]:
    device = FakeCuda()
    yield device
    device.close()


@pytest.fixture
def runtime(device: FakeCuda) -> Iterator[Runtime]:
    runtime = Runtime(device, slots=SLOTS)
    yield runtime
    runtime.close()


@pytest.fixture
def burst(device: FakeCuda, runtime: Runtime) -> Iterator[FakeBurst]:
    burst = FakeBurst(device)
    yield burst
    burst.open.set()
    runtime.drain()


@pytest.fixture
def restore(device: FakeCuda, burst: FakeBurst) -> RestoreBurst:
    region: Any = SimpleNamespace(geometry=GEOMETRY, entry=SimpleNamespace(address=1))
    return RestoreBurst(device, burst, region)


def pieces(count: int, address: int = 0) -> list[KvPiece]:
    return [KvPiece(abi.KIND_KV_TAIL, 0, 1, (block,), address, 64, 0) for block in range(count)]


def fill(runtime: Runtime) -> None:
    assert len(runtime.submit_many([Task()] * SLOTS)) == SLOTS


def later(call: Callable[[], Any]) -> None:
    threading.Timer(0.1, call).start()


def test_nothing_is_put_when_the_ring_has_no_room_for_the_gate(runtime: Runtime) -> None:
    put: list[Any] = []
    with runtime.parked():
        fill(runtime)
        with pytest.raises(RingFull):
            runtime.run_burst(put.append)
    assert put == []


def test_burst_waits_for_room_when_others_fill_the_ring(runtime: Runtime, restore: RestoreBurst) -> None:
    assert runtime.executor.park(1)
    fill(runtime)
    later(runtime.executor.unpark)
    assert restore.restore(runtime, TARGET, pieces(3 * PIECES_MAX), 5) == [abi.STATUS_OK] * (3 * PIECES_MAX)


def test_failed_restore_ends_only_when_nothing_of_it_writes(runtime: Runtime, restore: RestoreBurst, burst: FakeBurst) -> None:
    burst.open.clear()
    later(burst.open.set)
    with pytest.raises(WaitTimeout):
        restore.restore(runtime, TARGET, pieces(2 * PIECES_MAX), 0.01)
    assert burst.ran == burst.launched == 2
    assert restore.restore(runtime, TARGET, pieces(1), 5) == [abi.STATUS_OK]


def test_restore_says_that_blocks_are_written_and_refuses_the_next_when_launches_do_not_end(
    runtime: Runtime, restore: RestoreBurst, burst: FakeBurst, monkeypatch: pytest.MonkeyPatch
) -> None:
    burst.open.clear()
    with monkeypatch.context() as patched:
        patched.setattr(config, "WAIT_TASK_S", 0.01)
        with pytest.raises(RestoreUnfinished, match="still being written"):
            restore.restore(runtime, TARGET, pieces(1), 0.01)
        assert burst.ran == 0
    with pytest.raises(RestoreUnfinished, match="earlier restore"):
        restore.restore(runtime, TARGET, pieces(1), 5)
    assert burst.launched == 1


def test_restore_gives_up_within_its_bound_when_another_goes_on(runtime: Runtime, restore: RestoreBurst) -> None:
    restore._lock.acquire()
    later(restore._lock.release)
    with pytest.raises(WaitTimeout, match="another restore"):
        restore.restore(runtime, TARGET, pieces(1), 0.01)


def test_burst_gives_back_what_it_took_when_a_list_cannot_be_shared(device: FakeCuda, burst: FakeBurst) -> None:
    held = set(device._buffers)
    shared: list[int] = []

    def share(address: int, size: int) -> int:
        if shared:
            raise DeviceError("no more")
        shared.append(address)
        return address

    device.share = share  # type: ignore[method-assign]
    region: Any = SimpleNamespace(geometry=GEOMETRY, entry=SimpleNamespace(address=1))
    with pytest.raises(DeviceError, match="no more"):
        RestoreBurst(device, burst, region)
    del device.share
    assert set(device._buffers) == held


@pytest.fixture
def word() -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.zeros(1, np.uint64)


def waiting_region(runtime: Runtime) -> Any:
    """A region whose pieces are written once the word at their address is set; their hash is 0."""
    held = runtime.install("held", HandlerSource.of("waiting", text=WAITING))
    return SimpleNamespace(number=1, apply=held, hash=held)


def test_tasks_wait_for_room_when_others_fill_the_ring(runtime: Runtime) -> None:
    region = waiting_region(runtime)
    assert runtime.executor.park(1)
    fill(runtime)
    later(runtime.executor.unpark)
    assert restore_by_tasks(runtime, region, pieces(SLOTS), 5) == [abi.STATUS_OK] * SLOTS


def test_failed_restore_by_tasks_ends_only_when_its_tasks_have(
    runtime: Runtime, word: np.ndarray[tuple[int], np.dtype[np.uint64]], monkeypatch: pytest.MonkeyPatch
) -> None:
    region, held = waiting_region(runtime), pieces(2, word.ctypes.data)
    with monkeypatch.context() as patched:
        patched.setattr(config, "WAIT_TASK_S", 0.01)
        with pytest.raises(RestoreUnfinished, match="still being written"):
            restore_by_tasks(runtime, region, held, 0.01)
    later(lambda: word.__setitem__(0, 1))
    with pytest.raises(WaitTimeout):
        restore_by_tasks(runtime, region, held, 0.01)
    assert runtime.stats().done == runtime.stats().submitted


def go_round(runtime: Runtime) -> None:
    for _ in range(SLOTS * config.COMPLETION_LAPS // 32):
        runtime.wait(runtime.submit_many([Task()] * 32)[-1])


def test_task_is_finished_when_its_answer_is_no_longer_kept(runtime: Runtime) -> None:
    ticket = runtime.submit(Task())
    go_round(runtime)
    with pytest.raises(AnswerForgotten):
        runtime.wait(ticket)
    runtime.finish(ticket)


def page_region(runtime: Runtime, burst: FakeBurst) -> Any:
    scan = runtime.install("scan", HandlerSource.of("waiting", text=WAITING))
    entry = SimpleNamespace(address=1)
    return SimpleNamespace(number=1, scan=scan, burst=burst, entry=entry, page_count=8, page_bytes=4096, found_count=0)


def test_scan_goes_on_when_the_last_was_laps_ago(runtime: Runtime, burst: FakeBurst) -> None:
    tasks = PageTasks(runtime, page_region(runtime, burst))
    for _ in range(2):
        assert runtime.wait(tasks.scan(0, 8, is_burst=True)).is_ok
        go_round(runtime)
    assert burst.ran == 2


def test_nobody_comes_between_a_burst_and_the_task_that_appends_what_it_found(
    runtime: Runtime, burst: FakeBurst, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = PageTasks(runtime, page_region(runtime, burst))
    other = threading.Thread(target=lambda: tasks.append([1, 2, 3]))
    submitted: list[bool] = []
    run_burst, submit = runtime.run_burst, runtime.submit

    def interrupted(enqueue: Callable[[Any], None]) -> Any:
        found = run_burst(enqueue)
        other.start()
        other.join(0.1)
        return found

    monkeypatch.setattr(runtime, "run_burst", interrupted)
    monkeypatch.setattr(runtime, "submit", lambda task: (submitted.append(task.arg == abi.PAGES_NOTED), submit(task))[1])
    tasks.scan(0, 8, is_burst=True)
    other.join(5)
    assert submitted == [True, False]
