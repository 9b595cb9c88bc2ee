"""A Python program on a GPU that knows nothing of protection, for test_program_agent.py: protected_child.py STEPS [KILL]."""

import ctypes
import os
import random
import signal
import sys
from typing import Any

CUDA = ctypes.CDLL("libcuda.so.1")
WORDS = 1 << 17


def do(name: str, *arguments: Any) -> None:
    result = getattr(CUDA, name)(*arguments)
    assert result == 0, f"{name}: {result}"


def word(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)


def function(module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
    found = ctypes.c_void_p()
    do("cuModuleGetFunction", ctypes.byref(found), module, name.encode())
    return found


def launch(kernel: ctypes.c_void_p, stream: ctypes.c_void_p, *values: int) -> None:
    words = [word(value) for value in values]
    parameters = (ctypes.c_void_p * len(words))(*(ctypes.addressof(value) for value in words))
    do("cuLaunchKernel", kernel, 1, 1, 1, 32, 1, 1, 0, stream, parameters, None)


def allocate(size: int) -> int:
    found = ctypes.c_uint64()
    do("cuMemAlloc_v2", ctypes.byref(found), ctypes.c_size_t(size))
    return found.value


def make_state() -> tuple[int, int]:
    """The policy names this function."""
    return allocate(8 * WORDS), allocate(8 * WORDS)


def main(steps: int, kill_at: int) -> None:
    context, module, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    do("cuInit", 0)
    do("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    do("cuCtxSetCurrent", context)
    do("cuModuleLoadData", ctypes.byref(module), b".version 8.0")
    do("cuStreamCreate", ctypes.byref(stream), 1)
    fill, mix, update, sums = (function(module, name) for name in ("fill", "mix", "update", "sum"))
    scratch = allocate(8 * WORDS)  # of the same size, and no region
    weights, moments = make_state()
    loss = allocate(8)
    launch(fill, stream, weights, WORDS, 5)
    launch(fill, stream, moments, WORDS, 6)
    rng, got = random.Random(3), ctypes.c_uint64()
    for step in range(1, steps + 1):
        launch(fill, stream, scratch, 4096, rng.getrandbits(60))
        launch(mix, stream, weights, scratch, 4096)
        launch(mix, stream, moments, weights, 4096)
        launch(update, stream, weights, moments, 512)
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        launch(sums, stream, loss, weights, 2048)
        do("cuMemcpyDtoHAsync_v2", ctypes.byref(got), ctypes.c_uint64(loss), ctypes.c_size_t(8), stream)
        do("cuStreamSynchronize", stream)
        rng.seed(got.value)
        print(step, got.value, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
