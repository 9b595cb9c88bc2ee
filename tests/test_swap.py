"""runtime/swap.py: code that is replaced beside a running executor, on the CPU device.

Invariants: a hot swap loses no task and runs none twice; code that fails its checks never replaces code that works; a handler that hangs is
said, and nothing is loaded beside it.
"""

import threading

import numpy as np
import pytest

from concordia import abi, config
from concordia.device.driver import open_device
from concordia.device.host import HostDevice
from concordia.errors import CompileError, HandlerRefused, RingFull, WaitTimeout
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task
from held_task import VERSIONED, Gate, source
from waiting import until


def test_no_task_is_lost_or_repeated_when_code_is_swapped_under_load(device: HostDevice) -> None:
    runtime = Runtime(device, lanes=2)
    runtime.install("swapped", source(VERSIONED, VERSION=1))
    images = [runtime.device.build(source(VERSIONED, VERSION=version)) for version in (1, 2)]
    count = np.zeros(1, np.uint64)
    seen: list[set[int]] = [set(), set(), set()]
    stop = threading.Event()
    handed_in = [0, 0, 0]

    def produce(index: int) -> None:
        opcode = runtime.operators.find("swapped").opcode  # type: ignore[union-attr]
        while not stop.is_set():
            tickets = []
            for _ in range(8):
                try:
                    tickets.append(
                        runtime.submit(
                            Task(opcode=opcode, kind=abi.TASK_COMPUTE, arg=count.ctypes.data)
                        )
                    )
                except RingFull:
                    break
            handed_in[index] += len(tickets)
            seen[index] |= {runtime.wait(ticket).result for ticket in tickets}

    threads = [threading.Thread(target=produce, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    generations = []
    for swap in range(60):
        generations.append(runtime.adopt("swapped", images[swap % 2]).generation)
    stop.set()
    for thread in threads:
        thread.join()
    runtime.drain()
    assert count[0] == sum(handed_in)
    assert set.union(*seen) == {1, 2}
    assert generations == sorted(set(generations))
    assert not runtime.operators.has_retired
    runtime.close()


def test_new_code_runs_when_the_swap_has_returned(runtime: Runtime) -> None:
    for version in (1, 2, 1, 3):
        operator = runtime.install("swapped", source(VERSIONED, VERSION=version))
        answer = runtime.wait(runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE)))
        assert (answer.result, answer.generation) == (version, operator.generation)


def test_swap_succeeds_when_the_executor_is_parked(runtime: Runtime) -> None:
    runtime.install("swapped", source(VERSIONED, VERSION=1))
    with runtime.parked():
        runtime.install("swapped", source(VERSIONED, VERSION=2))
        operator = runtime.install("swapped", source(VERSIONED, VERSION=3))
    assert (
        runtime.wait(runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE))).result
        == 3
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int nothing;", "not a handler"),
        ('#include "call.h"\nEXPORT void concordia_handler(Call*, uint64_t) {}', "not a handler"),
        ('#include "call.h"\nextern "C" void missing_function();\nHANDLER { if (call->lanes > lane + 1000) missing_function(); }',
         "missing_function"),
        ('extern "C" { __attribute__((visibility("default"))) extern const unsigned long concordia_handler_abi;\n'
         '__attribute__((visibility("default"))) const unsigned long concordia_handler_abi = 99;\n'
         '__attribute__((visibility("default"))) void concordia_handler(void*, unsigned long) {} }', "ABI 99"),
    ],
)  # fmt: skip
def test_handler_is_refused_when_it_fails_the_lint(
    runtime: Runtime, text: str, reason: str
) -> None:
    before = runtime.install("linted", source(VERSIONED, VERSION=5))
    with pytest.raises(HandlerRefused, match=reason):
        runtime.install("linted", source(text))
    assert (
        runtime.wait(runtime.submit(Task(opcode=before.opcode, kind=abi.TASK_COMPUTE))).result == 5
    )


def test_compiler_is_quoted_when_a_handler_does_not_compile(runtime: Runtime) -> None:
    with pytest.raises(CompileError, match="what_is_this"):
        runtime.install("broken", source("what_is_this;"))
    assert runtime.operators.find("broken") is None


def test_swap_says_so_and_loads_nothing_when_a_handler_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "WAIT_PARK_S", 0.05)
    device = open_device("host")
    runtime = Runtime(device)
    gate = Gate(runtime)
    until(lambda: runtime.stats().is_inside)
    # a device whose loading waits, without a bound, until the executor is out
    device.needs_parking = True
    loaded = []
    monkeypatch.setattr(device, "load", loaded.append)
    with pytest.raises(WaitTimeout, match=f"task {gate.ticket} has been running for 0.05 s"):
        runtime.install("count", source(VERSIONED, VERSION=1))
    assert loaded == []
    monkeypatch.undo()
    gate.open()
    assert runtime.wait(gate.ticket).is_ok
    operator = runtime.install("count", source(VERSIONED, VERSION=2))
    assert runtime.wait(runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE))).result == 2
    runtime.close()
    device.close()
