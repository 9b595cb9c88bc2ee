"""Ring, executor and operator table of the CPU device, as Python uses them.

Invariants: tasks run in order, once, and answers are each task's own; a full ring raises and nothing is lost; parked means nothing runs; every
wait ends; an idle executor sleeps and a waiting thread lets others run. Swaps are in test_swap.py.
"""

import os
import threading
import time
from contextlib import ExitStack, closing
from functools import partial

import numpy as np
import pytest

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.device.compiler import HostCompiler
from concordia.device.cuda_call import CudaError
from concordia.device.driver import open_device
from concordia.device.host import HostDevice
from concordia.device.memory import JournalTarget
from concordia.errors import (
    DeviceError,
    EnvironmentRefused,
    JournalRefused,
    RingFull,
    UsageError,
    WaitTimeout,
)
from concordia.runtime.executor import Runtime
from concordia.runtime.executor_plan import plan_executor
from concordia.runtime.ring import Ring, Task, Ticket, when_room
from held_task import VERSIONED, Gate, source
from scratch_stream import ScratchStream, tree_hash
from waiting import until

ECHO = """#include "hash.h"
HANDLER {
  if (lane == 0) call->result = call->task.block_count * 1000000000ull + call->task.source_bytes;
  hash_payload(call, lane, reinterpret_cast<uint8_t*>(call->task.source), call->task.source_bytes);
}
"""


def test_tasks_run_in_order_when_many_are_handed_in(runtime: Runtime) -> None:
    count = np.zeros(1, np.uint64)
    operator = runtime.install("count", source(VERSIONED, VERSION=3))
    for _ in range(40):
        tickets = [
            runtime.submit(
                Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=count.ctypes.data)
            )
            for _ in range(50)
        ]
        answer = runtime.wait(tickets[-1])
        assert (answer.status, answer.result, answer.sequence) == (abi.STATUS_OK, 3, None)
    assert count[0] == 2000
    assert runtime.stats().done == runtime.stats().submitted


@pytest.mark.parametrize("is_device", [0, 1], ids=["host shape", "device shape"])
def test_empty_tasks_take_just_their_places_when_others_stand_among_them(is_device: int) -> None:
    seed = int(time.time())
    print(f"seed {seed}")
    generator = np.random.default_rng(seed)
    device = HostDevice(HostCompiler(flags=("-O1", f"-DCONCORDIA_DEVICE_SHAPE={is_device}")))
    runtime = Runtime(device, slots=32)
    count = np.zeros(1, np.uint64)
    operator = runtime.install("count", source(VERSIONED, VERSION=3))
    counted = Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=count.ctypes.data)
    wanted = 0
    for _ in range(300):
        # an empty one with arguments takes several places; an opcode is none of its business
        some = [
            [Task(), Task(opcode=int(generator.integers(0, 64))), Task(payload=bytes(int(generator.integers(1, 9000)))), counted][kind]
            for kind in generator.choice(4, int(generator.integers(1, 12)), p=[0.5, 0.2, 0.1, 0.2])
        ]
        tickets = [(one, when_room(partial(runtime.submit, one), time.monotonic() + 5)) for one in some]
        for one, ticket in tickets:
            wanted += one is counted
            answer = runtime.wait(ticket)
            assert (answer.status, answer.result, answer.sequence) == (abi.STATUS_OK, 3 if one is counted else 0, None)
        assert count[0] == wanted
    assert runtime.ring.load("head") == runtime.ring.load("tail")
    runtime.close()
    device.close()


@pytest.mark.parametrize(
    ("blocks", "size"), [(0, 0), (1, 0), (511, 17), (512, 1), (600, 3000), (4000, 40000)]
)
def test_arguments_arrive_whole_when_they_need_several_windows(
    runtime: Runtime, blocks: int, size: int
) -> None:
    operator = runtime.install("echo", source(ECHO))
    payload = np.random.default_rng(size).bytes(size)
    for _ in range(7):  # so that some of them meet the end of the ring
        answer = runtime.wait(
            runtime.submit(
                Task(
                    opcode=operator.opcode,
                    kind=abi.TASK_COMPUTE,
                    blocks=range(blocks),
                    payload=payload,
                )
            )
        )
        assert (answer.result, answer.payload_hash) == (
            blocks * 1_000_000_000 + size,
            tree_hash(payload),
        )


def test_submission_is_refused_when_arguments_exceed_half_the_arena(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        runtime.submit(Task(payload=bytes(33 * 2048)))
    for wrong in (
        Task(key=1 << 128),
        Task(token_start=1 << 32),
        Task(token_start=-1),
        Task(blocks=[-1]),
        Task(blocks=[1 << 32]),
    ):
        with pytest.raises(UsageError, match="does not fit"):
            runtime.submit(wrong)


def test_tasks_handed_in_together_run_in_order_with_their_own_ids(runtime: Runtime) -> None:
    operator = runtime.install("echo", source(ECHO))
    tasks = [Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, blocks=range(n)) for n in (0, 3, 600, 1, 40)]
    for _ in range(7):  # so that some of them meet the end of the ring
        tickets = runtime.submit_many(tasks)
        answers = [runtime.wait(ticket).result for ticket in tickets]
        assert answers == [len(task.blocks) * 1_000_000_000 for task in tasks]
    assert runtime.submit_many([]) == []


def test_as_many_tasks_are_taken_as_there_is_room_for_when_they_come_together(runtime: Runtime) -> None:
    gate = Gate(runtime)
    tickets = runtime.submit_many([Task()] * 100)
    assert len(tickets) == 63
    with pytest.raises(RingFull, match="64 slots"):
        runtime.submit_many([Task()])
    with pytest.raises(UsageError, match="do not fit"):
        runtime.submit_many([Task(blocks=range(1 << 16))])
    gate.open()
    assert runtime.wait(tickets[-1]).is_ok


def test_task_is_answered_when_it_names_no_operator(runtime: Runtime) -> None:
    for opcode in (0, 77, abi.OPERATOR_CAPACITY - 1, abi.OPERATOR_CAPACITY, 0xFFFFFFFF):
        assert (
            runtime.wait(runtime.submit(Task(opcode=opcode, kind=abi.TASK_APPEND))).status
            == abi.STATUS_BAD_TASK
        )
    assert runtime.wait(runtime.submit(Task())).is_ok


def test_submission_raises_when_the_ring_is_full_and_goes_on_when_it_is_not(
    runtime: Runtime,
) -> None:
    gate = Gate(runtime)
    tickets = [runtime.submit(Task()) for _ in range(63)]
    with pytest.raises(RingFull, match="64 slots"):
        runtime.submit(Task())
    assert runtime.result(tickets[0]) is None
    gate.open()
    assert runtime.wait(tickets[-1]).is_ok
    assert runtime.wait(runtime.submit(Task())).is_ok


def test_wait_raises_at_its_bound_when_a_task_does_not_end(runtime: Runtime) -> None:
    gate = Gate(runtime)
    ticket = runtime.submit(Task())
    with pytest.raises(WaitTimeout, match=rf"task {ticket} is not done after 0.05 s"):
        runtime.wait(ticket, 0.05)
    with pytest.raises(WaitTimeout, match="did not leave"), runtime.parked():
        raise AssertionError("parked around a running task")
    gate.open()
    assert runtime.wait(ticket).is_ok


def test_answer_is_kept_for_laps_and_then_said_to_be_gone(runtime: Runtime) -> None:
    first = runtime.submit(Task())
    laps = config.COMPLETION_LAPS - 1
    for _ in range(laps):
        runtime.wait([runtime.submit(Task()) for _ in range(63)][-1])
    assert runtime.wait(first).is_ok
    for _ in range(3):
        runtime.wait([runtime.submit(Task()) for _ in range(63)][-1])
    with pytest.raises(DeviceError, match="long ago"):
        runtime.result(first)
    assert runtime.result(Ticket(first + 10_000_000)) is None


def test_nothing_runs_when_parked(runtime: Runtime) -> None:
    with runtime.parked(), runtime.parked():
        ticket = runtime.submit(Task())
        with pytest.raises(WaitTimeout):
            runtime.wait(ticket, 0.02)
    assert runtime.wait(ticket).is_ok


def test_answers_are_their_own_when_threads_hand_in_together(device: HostDevice) -> None:
    runtime = Runtime(device)
    operator = runtime.install("echo", source(ECHO))
    wrong: list[int] = []

    def produce(index: int) -> None:
        random = np.random.default_rng(index)
        for _ in range(200):
            payload = random.bytes(int(random.integers(0, 5000)))
            ticket = runtime.submit(
                Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, payload=payload)
            )
            if runtime.wait(ticket).payload_hash != tree_hash(payload):
                wrong.append(index)

    threads = [threading.Thread(target=produce, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    runtime.close()


def test_other_threads_run_when_one_waits(runtime: Runtime) -> None:
    gate = Gate(runtime)
    opener = threading.Timer(0.05, gate.open)
    opener.start()
    assert runtime.wait(gate.ticket, 5.0).is_ok
    opener.join()


def test_executor_uses_no_processor_when_idle(runtime: Runtime) -> None:
    runtime.wait(runtime.submit(Task()))
    until(lambda: not runtime.stats().is_inside)
    beats = runtime.stats().heartbeat
    threading.Event().wait(0.15)  # longer than the bounded sleep of its threads
    assert runtime.stats().heartbeat == beats


def test_lanes_may_use_every_core_when_their_opener_is_bound_to_one(device: HostDevice) -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("there is one core only")
    before = {int(name) for name in os.listdir("/proc/self/task")}
    masks: list[set[int]] = []

    def open_bound() -> None:
        os.sched_setaffinity(threading.get_native_id(), {min(cores)})
        runtime = Runtime(device)
        lanes = (
            {int(name) for name in os.listdir("/proc/self/task")}
            - before
            - {threading.get_native_id()}
        )
        masks.extend(os.sched_getaffinity(lane) for lane in lanes)
        runtime.close()

    thread = threading.Thread(target=open_bound)
    thread.start()
    thread.join()
    assert masks == [cores]


def test_runtime_ends_when_it_is_closed_twice_or_forgotten(device: HostDevice) -> None:
    runtime = Runtime(device)
    tickets = [runtime.submit(Task()) for _ in range(100)]
    assert runtime.wait(tickets[0]).is_ok
    runtime.close()
    runtime.close()
    for action in (
        lambda: runtime.submit(Task()),
        lambda: runtime.result(tickets[0]),
        runtime.stats,
    ):
        with pytest.raises(DeviceError, match="closed"):
            action()
    forgotten = Runtime(device)
    forgotten.submit(Task())
    before = threading.active_count()
    del forgotten
    assert threading.active_count() == before


def test_close_says_so_when_a_handler_hangs(
    device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "WAIT_TASK_S", 0.05)
    monkeypatch.setattr(config, "WAIT_PARK_S", 0.05)
    runtime = Runtime(device)
    gate = Gate(runtime)
    with pytest.raises(WaitTimeout, match="memory is kept"):
        runtime.close()
    gate.open()


def test_every_call_says_why_when_the_executor_was_killed(device: HostDevice) -> None:
    runtime = Runtime(device)
    gate = Gate(runtime)
    # what the driver answers for a kernel that its own watchdog has ended
    runtime.executor.lost = CudaError("wait for the executor's end", "CUDA_ERROR_LAUNCH_TIMEOUT")
    assert runtime.executor.lost.context_lost
    for call in (lambda: runtime.wait(gate.ticket, 1.0), lambda: runtime.submit(Task()), lambda: runtime.submit_many([Task()])):
        with pytest.raises(DeviceError, match="wait for the executor's end: CUDA_ERROR_LAUNCH_TIMEOUT"):
            call()
    gate.open()
    runtime.close()


def test_target_is_refused_when_its_numbers_cannot_be_true(device: HostDevice) -> None:
    stream = ScratchStream()
    good = stream.target
    for wrong in (
        JournalTarget(
            good.pool_address, good.pool_bytes, good.segment_bytes + 1, good.control_address
        ),
        JournalTarget(
            good.pool_address, good.segment_bytes - 4096, good.segment_bytes, good.control_address
        ),
        JournalTarget(
            good.pool_address + 8, good.pool_bytes, good.segment_bytes, good.control_address
        ),
        JournalTarget(
            good.pool_address, good.pool_bytes, good.segment_bytes, good.control_address + 8
        ),
    ):
        with pytest.raises(JournalRefused):
            Runtime(device, target=wrong)
    stream.close()


def test_device_is_refused_when_its_name_is_unknown() -> None:
    for name in ("gpu", "cuda:x", "host:1", ""):
        with pytest.raises(EnvironmentRefused, match="unknown device"):
            open_device(name)


def test_step_words_are_there_when_announced() -> None:
    stream = ScratchStream()
    with Checkpointer.open("host", stream.target) as checkpointer:
        before = time.monotonic_ns()
        checkpointer.announce_step(4, 100)
        checkpointer.step_done(3)
        checkpointer.heartbeat(waiting_count=2)
        checkpointer.count_unprotected(5)
        checkpointer.count_unprotected(1)
        after = time.monotonic_ns()
    words = [
        stream.word(name)
        for name in (
            "step_started",
            "step_tokens",
            "step_done",
            "waiting_count",
            "unprotected_count",
        )
    ]
    assert words == [4, 100, 3, 2, 6]
    for name in ("step_started_ns", "step_done_ns", "heartbeat_ns"):
        assert before <= stream.word(name) <= after
    stream.close()


@pytest.mark.parametrize("leaves", [1, 7, 1024])
def test_ids_have_room_for_what_the_executor_takes_when_the_stage_is_small(leaves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device, taken = HostDevice(), dict[int, int]()
    allocate = device.allocate

    def noted(size: int) -> int:
        address = allocate(size)
        taken[address] = size
        return address

    monkeypatch.setattr(device, "stage_bytes", leaves * abi.LEAF_BYTES, raising=False)
    monkeypatch.setattr(device, "allocate", noted)
    with closing(Ring(device)) as ring, ExitStack() as undo:
        plan = plan_executor(device, ring, None, 1, undo)
        assert plan.stage_bytes == taken[plan.stage] == leaves * abi.LEAF_BYTES
        assert taken[plan.ids] == 4 * leaves * abi.IDS_PER_LEAF
