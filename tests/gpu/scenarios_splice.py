"""Scenarios of hooks in machine code: each kernel with and without them, launched and in a graph."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import splice_kernels
from hook_stage import HookStage, Shape

ROUNDS = 5
NODES, REPLAYS = 3, 4
VARIANTS = {"entry": (True, False), "exit": (False, True), "both": (True, True)}


def _inputs(words: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(words).integers(0, 1 << 32, words, dtype=np.uint32)


class _Runs:
    """One kernel over the same memory again and again."""

    def __init__(self, stage: HookStage, shape: Shape, words: int, arguments: list[Any], *, zero_at: int = 0) -> None:
        self._stage, self._shape, self._zero_at = stage, shape, zero_at
        self._words = words
        self._source, self._target = stage.allocate(4 * words), stage.allocate(4 * words)
        stage.write(self._source, _inputs(words))
        self._arguments = [ctypes.c_uint64(self._target), ctypes.c_uint64(self._source), *arguments]

    def launched(self, function: Any) -> bytes:
        self._reset()
        for _ in range(ROUNDS):
            self._stage.launch(function, self._shape, self._arguments)
        self._stage.wait()
        return self._stage.read(self._target, 4 * self._words)

    def replayed(self, function: Any) -> bytes:
        def enqueue() -> None:
            for _ in range(NODES):
                self._stage.launch(function, self._shape, self._arguments)

        self._reset()
        graph = self._stage.graph(enqueue)
        for _ in range(REPLAYS):
            self._stage.replay(graph)
        self._stage.wait()
        return self._stage.read(self._target, 4 * self._words)

    def _reset(self) -> None:
        target = _inputs(self._words)[::-1].copy()
        target[self._zero_at] = 0  # where CTAs of one grid count each other
        self._stage.write(self._target, target)
        self._stage.clear()


def _compared(stage: HookStage, cubin: bytes, name: str, runs: _Runs) -> dict[str, Any]:
    """For each variant: where the outputs differ first, and the counts; launched and replayed."""
    plain = stage.function(cubin, name)
    wanted = {"launched": runs.launched(plain), "replayed": runs.replayed(plain)}
    assert stage.counts() == (0, 0)
    found = {}
    for variant, (entry, leaving) in VARIANTS.items():
        function = stage.function(stage.hooked(cubin, entry=entry, exit=leaving), name)
        for how, run in (("launched", runs.launched), ("replayed", runs.replayed)):
            output = np.frombuffer(run(function), np.uint8)
            differing = np.flatnonzero(output != np.frombuffer(wanted[how], np.uint8))
            found[f"{variant} {how}"] = [int(differing[0]) if len(differing) else None, *stage.counts()]
    return found


def kernels(generation: str) -> dict[str, dict[str, Any] | str]:
    """All of splice_kernels.py, by name; what could not be run is a line that says why. A lost context loses those behind it."""
    stage = HookStage()
    found: dict[str, dict[str, Any] | str] = {}
    for name in splice_kernels.BY_NAME:
        try:
            found[name] = kernel(stage, name, generation)
        except (AssertionError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def kernel(stage: HookStage, name: str, generation: str) -> dict[str, Any]:
    """One of them."""
    case = splice_kernels.BY_NAME[name]
    cubin = (splice_kernels.old_cubin if generation == "V1" else splice_kernels.new_cubin)(name)
    shape = Shape(case.grid, case.block, launch=case.launch)
    words = 2 * case.thread_count + 1024
    return _compared(stage, cubin, name, _Runs(stage, shape, words, [ctypes.c_uint32(case.count)], zero_at=case.count))


def triton_kernel(rows: int, columns: int) -> dict[str, Any]:
    """A kernel that Triton compiled; floats are any words but those that are no numbers."""
    import triton_kernel as own

    stage, made = HookStage(), own.compiled()
    shape = Shape((rows, 1, 1), (32 * own.WARPS, 1, 1), shared_bytes=made.metadata.shared)
    nothing = [ctypes.c_uint64(0), ctypes.c_uint64(0)]  # scratch memory, which this kernel has none of
    runs = _Runs(stage, shape, rows * columns, [ctypes.c_int32(columns), *nothing])
    return _compared(stage, made.asm["cubin"], "softmax_rows", runs)


def attributes(name: str) -> dict[str, Any]:
    """What the driver says of a kernel with and without hooks."""
    stage = HookStage()
    names = stage.driver.CUfunction_attribute
    cubin = splice_kernels.new_cubin(name)
    answer: dict[str, Any] = {}
    for key, image in (("plain", cubin), ("hooked", stage.hooked(cubin, entry=True, exit=True))):
        function = stage.function(image, name)
        occupancy = stage.driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, 1024, 0)
        registers = stage.driver.cuFuncGetAttribute(names.CU_FUNC_ATTRIBUTE_NUM_REGS, function)
        answer[key] = {"registers": int(registers[1]), "ctas": int(occupancy[1])}
    return answer
