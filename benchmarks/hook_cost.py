"""What a hook in machine code adds to a small kernel.

Owns: kernels of some microseconds, as many back to back in a CUDA graph, with and without hooks in
turn. Promises: each figure is the difference of two medians over the same number of kernels, with
the interval that 95 of 100 resamplings lie in; both arms ran in the same minute, one after the
other. Run by `make hook-cost`, on the first GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import pathlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from concordia import abi
from concordia.device.cuda_call import checked
from concordia.device.cuda_context import CudaContext
from concordia.device.nvrtc import compile_ptx, link_cubin
from concordia.instrument.report import fill
from concordia.instrument.splice import splice_cubin
from concordia.testing.machine import machine

RESULT: Final = pathlib.Path(__file__).parent / "results" / "hook_cost_h200.json"
NODES: Final = 500  # kernels of a graph: 2 ms
SEED: Final = 4
RESAMPLINGS: Final = 2_000
GOAL_NS: Final = 100.0  # of an entry hook, on a kernel of 3 us
ARMS: Final = {"plain": (False, False), "entry": (True, False), "exit": (False, True)}
# a chain of dependent additions: as long on every clock, and no memory in it but one store
TEXT: Final = """
extern "C" __global__ void chain(float* out, int steps) {
  float x = threadIdx.x;
  for (int i = 0; i < steps; ++i) x = x * 1.0001f + 0.5f;
  out[blockIdx.x * blockDim.x + threadIdx.x] = x;
}
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of kernel."""

    name: str
    ctas: int
    threads: int
    steps: int


CASES: Final = (
    Case("3 us, a CTA on each multiprocessor", 132, 256, 250),
    Case("3 us, eight on each", 132 * 8, 256, 120),
    Case("empty, a CTA on each", 132, 128, 0),
    Case("empty, 64 CTAs on each, of one warp", 132 * 64, 32, 0),
    Case("20 us, a CTA on each", 132, 1024, 2_500),
)


class Bench:
    """The first GPU, and one stream of it."""

    def __init__(self) -> None:
        self._context = CudaContext(0)
        driver = self._driver = self._context.driver
        checked(driver.cuCtxSetCurrent(self._context.handle), "enter the context")
        self._stream = checked(driver.cuStreamCreate(1), "create a stream")
        self._events = [checked(driver.cuEventCreate(0), "create an event") for _ in range(2)]
        size = abi.CONTROL_ALLOCATED_BYTES
        self._control = int(checked(driver.cuMemAlloc(size), "allocate"))
        checked(driver.cuMemsetD8(self._control, 0, size), "clear")
        self._out = int(checked(driver.cuMemAlloc(64 << 20), "allocate"))
        checked(driver.cuCtxSynchronize(), "clear")

    def graph(self, cubin: bytes, case: Case, arm: str) -> Any:
        """NODES launches of the kernel, hooked as the arm says."""
        driver = self._driver
        entry, leaving = ARMS[arm]
        if entry or leaving:
            done = splice_cubin(cubin, entry=entry, exit=leaving)
            cubin = fill(done.cubin, done.slots, self._control)
        module = checked(driver.cuModuleLoadData(cubin), "load")
        function = checked(driver.cuModuleGetFunction(module, b"chain"), "find")
        values = [ctypes.c_uint64(self._out), ctypes.c_int32(case.steps)]
        pointers = (ctypes.c_void_p * 2)(*(ctypes.addressof(value) for value in values))
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        checked(driver.cuStreamBeginCapture(self._stream, mode), "begin a graph")
        shape = (case.ctas, 1, 1, case.threads, 1, 1, 0)
        for _ in range(NODES):
            launched = driver.cuLaunchKernel(
                function, *shape, self._stream, ctypes.addressof(pointers), 0
            )
            checked(launched, "launch")
        graph = checked(driver.cuStreamEndCapture(self._stream), "end a graph")
        return checked(driver.cuGraphInstantiate(graph, 0), "make a graph")

    def kernel_ns(self, graph: Any) -> float:
        """One replay, per kernel."""
        driver = self._driver
        checked(driver.cuEventRecord(self._events[0], self._stream), "begin")
        checked(driver.cuGraphLaunch(graph, self._stream), "replay")
        checked(driver.cuEventRecord(self._events[1], self._stream), "end")
        checked(driver.cuEventSynchronize(self._events[1]), "wait")
        elapsed = checked(driver.cuEventElapsedTime(*self._events), "measure")
        return float(elapsed) * 1e6 / NODES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    arguments = parser.parse_args()
    bench, cubin = Bench(), _cubin()
    cases = [_measured(bench, cubin, case, arguments.replays) for case in CASES]
    found = machine()
    result = {
        "what": "ns that a hook adds to a kernel, back to back in a CUDA graph",
        "machine": found,
        "commit": found["commit"],
        "nodes": NODES,
        "replays": arguments.replays,
        "goal_ns": GOAL_NS,
        "is_reached": cases[0]["entry_ns"] < GOAL_NS,
        "cases": cases,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for case in cases:
        print(
            f"{case['case']:40} {case['plain_ns']:9.0f} ns  entry {case['entry_ns']:+7.1f}"
            f" {case['entry_ns_interval_95']}  exit {case['exit_ns']:+7.1f}"
        )
    return 0


def _measured(bench: Bench, cubin: bytes, case: Case, replays: int) -> dict[str, Any]:
    graphs = {arm: bench.graph(cubin, case, arm) for arm in ARMS}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm, graph in graphs.items():  # clocks and caches come up
        for _ in range(10):
            bench.kernel_ns(graph)
        assert arm in times
    for _ in range(replays):
        for arm, graph in graphs.items():
            times[arm].append(bench.kernel_ns(graph))
    found: dict[str, Any] = {"case": case.name, "ctas": case.ctas, "threads": case.threads}
    found["plain_ns"] = round(float(np.median(times["plain"])), 1)
    for arm in ("entry", "exit"):
        found[f"{arm}_ns"] = round(float(np.median(times[arm]) - np.median(times["plain"])), 1)
        found[f"{arm}_ns_interval_95"] = _interval(times[arm], times["plain"])
    return found


def _interval(hooked: Sequence[float], plain: Sequence[float]) -> list[float]:
    """Of the difference of medians, by resampling."""
    rng = np.random.default_rng(SEED)
    medians = [
        np.median(rng.choice(np.asarray(arm), (RESAMPLINGS, len(arm))), axis=1)
        for arm in (hooked, plain)
    ]
    low, high = np.percentile(medians[0] - medians[1], [2.5, 97.5])
    return [round(float(low), 1), round(float(high), 1)]


def _cubin() -> bytes:
    nowhere = pathlib.Path(tempfile.gettempdir())
    ptx = compile_ptx(TEXT, name="chain.cu", architecture="sm_90", include=nowhere)
    return link_cubin([ptx], name="chain", architecture="sm_90")


if __name__ == "__main__":
    raise SystemExit(main())
