"""What a user would pick instead of the device runtime, done as well as we can do it.

Owns: launch and synchronise, the driver's copies piece by piece, a kernel that is restarted to
change its code. Promises: loops are compiled where an interpreter would be most of the time; a
copy's time ends when its bytes are there. Called by the GPU benchmarks.
"""

from __future__ import annotations

import ctypes
import pathlib
import statistics
import tempfile
import time
from typing import Any, Final

from figures import timed, us
from loops import Array, Loops

from concordia import abi
from concordia.device import nvrtc
from concordia.device.compiler import HandlerSource
from concordia.device.cuda import CudaCompiler, CudaDevice
from concordia.device.cuda_call import checked
from concordia.device.kernel_cache import KernelCache
from concordia.errors import DeviceError
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task

NOTHING: Final = '#include "call.h"\nHANDLER { if (lane == 0) call->result = VERSION; }\n'
COPIES: Final = {
    "to_host": "cuMemcpyDtoHAsync_v2",
    "to_device": "cuMemcpyHtoDAsync_v2",
    "to_device_sync": "cuMemcpyHtoD_v2",
}


def launch_and_sync(device: CudaDevice) -> dict[str, Any]:
    """A plain kernel launch and stream synchronisation in the same context: what residency is
    compared with.
    """
    text = 'extern "C" __global__ void nothing() {}'
    ptx = nvrtc.compile_ptx(text, name="nothing.cu", architecture="sm_90", include=pathlib.Path())
    cubin = nvrtc.link_cubin([ptx], name="nothing", architecture="sm_90")
    with device._context.current() as driver:
        module = driver.cuModuleLoadData(cubin)[1]
        function = driver.cuModuleGetFunction(module, b"nothing")[1]
        stream = driver.cuStreamCreate(1)[1]

        def once() -> None:
            driver.cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, stream, 0, 0)
            driver.cuStreamSynchronize(stream)

        found = timed(2000, once)
        driver.cuStreamDestroy(stream)
        driver.cuModuleUnload(module)
    return us(found)


class Copies:
    """The driver's copies of many pieces of one size, in a compiled loop on one stream."""

    def __init__(self, device: CudaDevice, loops: Loops) -> None:
        self._device, self._loops = device, loops
        self._library = ctypes.CDLL("libcuda.so.1")
        with device._context.current() as driver:
            self._stream = checked(driver.cuStreamCreate(1), "create a stream")

    def seconds(self, way: str, targets: Array, sources: Array, size: int, *, rounds: int) -> float:
        """Median time of all pieces; `way` is a key of COPIES, the arrays are addresses."""
        call = getattr(self._library, COPIES[way])
        times = []
        for _ in range(rounds + 1):
            with self._device._context.current() as driver:
                started = time.perf_counter()
                self._loops.copy_pieces(call, targets, sources, size, stream=int(self._stream))
                for stream in (self._stream, 0):  # 0: what the synchronous calls use
                    checked(driver.cuStreamSynchronize(stream), "wait for copies")
                times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def close(self) -> None:
        with self._device._context.current() as driver:
            driver.cuStreamDestroy(self._stream)


def restart_us(device: CudaDevice, *, rounds: int, is_compiled: bool) -> float:
    """Median microseconds to change a handler without a hot swap: close the runtime, with
    `is_compiled` compile executor and handler anew, open, run the first task.
    """
    kept = device._compiler
    times = []
    for turn in range(rounds):
        version = 1000 + turn
        runtime = Runtime(device)
        source = HandlerSource.of("nothing", {"VERSION": version}, text=NOTHING)
        if not is_compiled:
            device.build(source)
        runtime.wait(runtime.submit(Task()))
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            runtime.close()
            if is_compiled:
                cache = KernelCache(pathlib.Path(folder))
                device._compiler = CudaCompiler(device._context.architecture(), cache)
            try:
                runtime = Runtime(device)
                operator = runtime.install("nothing", source)
                task = Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE)
                done = runtime.wait(runtime.submit(task))
                times.append((time.perf_counter() - started) * 1e6)
            finally:
                device._compiler = kept
            if done.result != version:
                raise DeviceError(f"the restarted kernel answered {done.result}, not {version}")
            runtime.close()
    return statistics.median(times)
