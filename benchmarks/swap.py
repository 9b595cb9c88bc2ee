"""A hot swap as the tasks see it.

Owns: a flood of tasks beside swaps of their handler. Promises: every answer counts, none is left
out; the pause is from the last answer of the old handler to the first of the new one. Called by the
GPU benchmarks.
"""

from __future__ import annotations

import itertools
import threading
import time

from bench import Bench
from figures import Figures, us
from peers import NOTHING, restart_us

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.device.compiler import HandlerSource
from concordia.errors import DeviceError
from concordia.runtime.ring import Task


def hot_swap(bench: Bench) -> None:
    """hot_swap_pause, beside a restart of the kernel with and without compilation."""
    checkpointer = Checkpointer(bench.device, None, lanes=1)
    found = swap(checkpointer, count=40)
    checkpointer.close()
    bench.say(f"a swap's own call: {found['swap_us']}; from task to task: {found['task_pace_us']}")
    peer = {
        "restart_recompiled": restart_us(bench.device, rounds=4, is_compiled=True),
        "restart_from_cache": restart_us(bench.device, rounds=8, is_compiled=False),
    }
    bench.report("hot_swap_pause", found["swap_pause_us"], peer=peer)


def swap(checkpointer: Checkpointer, *, count: int = 11) -> Figures:
    """`count` swaps while a thread hands in one task after the other."""
    device, runtime = checkpointer.device, checkpointer.runtime
    images = [
        device.build(HandlerSource.of("nothing", {"VERSION": v}, text=NOTHING))
        for v in range(count + 1)
    ]
    operator = runtime.adopt("nothing", images[0])
    task = Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE)
    answers: list[tuple[float, int]] = []  # when, from which version
    is_over = threading.Event()

    def flood() -> None:
        while not is_over.is_set():
            done = runtime.wait(runtime.submit(task))
            answers.append((time.perf_counter(), done.result))

    thread = threading.Thread(target=flood)
    thread.start()
    spent = []
    try:
        for image in images[1:]:
            time.sleep(0.005)
            started = time.perf_counter()
            runtime.adopt("nothing", image)
            spent.append(time.perf_counter() - started)
        time.sleep(0.005)
    finally:
        is_over.set()
        thread.join()
    changes = itertools.pairwise(answers)
    pause = [later[0] - last[0] for last, later in changes if last[1] != later[1]]
    if len(pause) != count:
        raise DeviceError(f"{len(pause)} of {count} swaps were seen by the tasks")
    gaps = [later[0] - last[0] for last, later in itertools.pairwise(answers)]
    return {"swap_pause_us": us(pause), "swap_us": us(spent), "task_pace_us": us(gaps)}
