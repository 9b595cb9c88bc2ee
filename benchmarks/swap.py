"""A hot swap as the tasks see it.

Owns: a flood of tasks beside swaps of their handler, by a native producer and by a thread of the
interpreter. Promises: every answer counts, none is left out; the pause is from the last answer of
the old handler to the first of the new one. Called by the GPU benchmarks.
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Final

from bench import Bench
from figures import Figures, us
from loops import Loops
from peers import NOTHING, restart_us

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.device.compiler import HandlerSource
from concordia.errors import DeviceError, WaitTimeout
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task

APART_S: Final = 0.005  # between two swaps
SEEN_TASKS: Final = 3  # of one version, that its answers are seen before the next one comes


def hot_swap(bench: Bench) -> None:
    """hot_swap_pause, beside a restart of the kernel with and without compilation."""
    peer = {
        "restart_recompiled": restart_us(bench.device, rounds=4, is_compiled=True),
        "restart_from_cache": restart_us(bench.device, rounds=8, is_compiled=False),
    }
    for key, loops in (("hot_swap_pause", bench.loops), ("hot_swap_pause_python", None)):
        checkpointer = Checkpointer(bench.device, None, lanes=1)
        found = swap(checkpointer, count=40, loops=loops)
        checkpointer.close()
        bench.say(f"{key}: a swap's own call: {found['swap_us']}")
        bench.report(key, found["swap_pause_us"], peer=peer)


def swap(checkpointer: Checkpointer, *, count: int = 11, loops: Loops | None = None) -> Figures:
    """`count` swaps while a thread hands in one task after the other: a native producer of `loops`,
    or a thread of the interpreter.
    """
    device, runtime = checkpointer.device, checkpointer.runtime
    images = [
        device.build(HandlerSource.of("nothing", {"VERSION": v}, text=NOTHING))
        for v in range(count + 1)
    ]
    operator = runtime.adopt("nothing", images[0])
    task = Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE)
    is_over = ctypes.c_uint64()
    pauses: list[float] = []

    def flood() -> None:
        if loops is None:
            pauses.extend(_flood(runtime, task, is_over))
        else:

            def launch() -> None:
                runtime.submit(Task())  # who finds the executor out sends it in

            found = loops.changes_ns(runtime.ring.address, task, is_over, launch, count + 1)
            pauses.extend(ns / 1e9 for ns in found)

    thread = threading.Thread(target=flood)
    thread.start()
    spent = []
    try:
        for image in images[1:]:
            _wait_for_tasks(runtime)
            time.sleep(APART_S)
            started = time.perf_counter()
            runtime.adopt("nothing", image)
            spent.append(time.perf_counter() - started)
        _wait_for_tasks(runtime)
    finally:
        is_over.value = 1
        thread.join()
    if len(pauses) != count:
        raise DeviceError(f"{len(pauses)} of {count} swaps were seen by the tasks")
    return {"swap_pause_us": us(pauses), "swap_us": us(spent)}


def _wait_for_tasks(runtime: Runtime) -> None:
    """Until some more tasks are done: one is handed in at a time, so that the answers of those
    before it were read.
    """
    wanted = runtime.stats().done + SEEN_TASKS
    deadline = time.monotonic() + config.WAIT_TASK_S
    while runtime.stats().done < wanted:
        if time.monotonic() > deadline:
            raise WaitTimeout(f"no {SEEN_TASKS} tasks were done within {config.WAIT_TASK_S} s")
        time.sleep(0)


def _flood(runtime: Runtime, task: Task, is_over: ctypes.c_uint64) -> list[float]:
    """Seconds from the last answer of one version to the first of the next."""
    pauses, last, last_at = [], None, 0.0
    while not is_over.value:
        result = runtime.wait(runtime.submit(task)).result
        now = time.perf_counter()
        if last is not None and result != last:
            pauses.append(now - last_at)
        last, last_at = result, now
    return pauses
