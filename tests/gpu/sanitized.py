"""Every kernel on small regions, as a sanitizer can watch it; a program of its own: `python sanitized.py`, or with a planted fault's name.

A sanitizer lets one kernel run at a time and makes it a hundred times slower. So the executor is leased here (it leaves when the ring is
empty), waits are long, and its CTAs are small: watched code needs more registers than the 128 that 512 threads have each. Called by
benchmarks/sanitize.py. The planted faults lie in handlers: a tool that finds them looks into code that is loaded apart and called by
pointer.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pathlib
import sys
import time
from typing import Any

from concordia import config

DEVICE = "cuda:0"
THREADS = 256  # 255 registers each, the most there are, still fit
STACK_BYTES = 4096  # of a lane: what watches a handler has frames of its own
LINES = ("--generate-line-info",)  # a tool then names ours; the code stays the same, by a test
SEED = 7

PROGRAMS: list[tuple[str, dict[str, Any]]] = [
    *(("handlers", {"shape_name": shape, "lanes": 1}) for shape in ("flash", "transposed", "tiled", "latent", "fp8")),
    ("handlers", {"shape_name": "flash", "lanes": 2}),
    *(("pages", {"size": size, "lanes": lanes}) for size in (4096, 16384) for lanes in (1, 2)),
    *(("appended_bytes", {"lanes": lanes}) for lanes in (1, 2)),
    *(("tokens", {"shape_name": "flash", "lanes": lanes}) for lanes in (1, 2)),
    *(("grouped", {"shape_name": "odd", "lanes": lanes, "segment_bytes": 1 << 15}) for lanes in (1, 2)),
    ("restored", {"shape_name": "odd", "count": 24}),
]
PLANTED = {
    "memcheck": "call->result = *reinterpret_cast<volatile uint64_t*>(call->task.arg + 4096 + 8 * lane);",
    "racecheck": "volatile uint64_t* words = call->scratch; words[0] = lane; words[1] = words[0] + lane;",
    # Lanes that wait by a mask without them. A __syncthreads in two branches of one warp is no error to this tool: what is called by
    # pointer may have unaligned barriers.
    "synccheck": "if (threadIdx.x / 32 == 1) __syncwarp(0xffffu);",
}


def prepare() -> None:
    """Before any room takes these numbers: longer waits, smaller CTAs, more stack."""
    config.WAIT_TASK_S, config.WAIT_PARK_S = 60.0, 30.0  # type: ignore[misc]
    from concordia.device import burst, nvrtc, residency
    from concordia.device.cuda_call import checked
    from concordia.device.cuda_context import CudaContext

    residency.THREADS = burst.THREADS = THREADS  # type: ignore[misc]
    nvrtc.OPTIONS = LINES  # type: ignore[misc]
    context = CudaContext(0)  # the primary one, which every device below shares; kept to the end
    with context.current() as driver:
        checked(driver.cuCtxSetLimit(driver.CUlimit.CU_LIMIT_STACK_SIZE, STACK_BYTES), "set the stack")


def run_programs(path: pathlib.Path) -> list[str]:
    """What was wrong, by program; a watched program must still be right."""
    scenarios = importlib.import_module("scenarios_kv")
    wrong = []
    for name, words in PROGRAMS:
        started = time.monotonic()
        answer = getattr(scenarios, name)(device=DEVICE, seed=SEED, path=str(path), **words)
        said = f"{name} {words}"
        if answer["wrong"]:
            wrong.append(f"{said}: {answer['wrong'][:3]}")
        print(f"RAN {said} {time.monotonic() - started:.1f} s", flush=True)
    return wrong


def planted_text(tool: str) -> str:
    """The source of that handler."""
    return f'#include "call.h"\nHANDLER {{\n  {PLANTED[tool]}\n}}\n'


def run_planted(tool: str) -> None:
    """A handler with one fault that this tool must find."""
    from concordia import abi
    from concordia.device.compiler import HandlerSource
    from concordia.device.driver import open_device
    from concordia.runtime.executor import Runtime
    from concordia.runtime.ring import Task

    opened = open_device(DEVICE)
    runtime = Runtime(opened)
    operator = runtime.install("planted", HandlerSource.of("planted.cu", text=planted_text(tool)))
    address = opened.allocate(4096)
    runtime.wait(runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=address)))
    print(f"RAN planted {tool}", flush=True)


def main(arguments: list[str]) -> int:
    prepare()
    if arguments:
        run_planted(arguments[0])
        return 0
    path = pathlib.Path("/dev/shm") / f"concordia-sanitize-{os.getpid()}"
    try:
        wrong = run_programs(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    for text in wrong:
        print(f"WRONG {text}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
