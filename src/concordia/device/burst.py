"""A kernel of the whole GPU that prepares a task of the executor, floor 2.

Owns: one loaded kernel and how wide it is launched. Promises: it is only enqueued, in the stream
that it is given; nothing here waits. Made by device/cuda.py; launched by residency.py between two
stays of the executor. Does not know what the kernel does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

from concordia.device.cuda_call import checked, released
from concordia.device.cuda_context import CudaContext
from concordia.device.loader import CudaImage

THREADS: Final = 512
CTAS_EACH: Final = 1  # of a multiprocessor: with 128 registers a thread, that fills it


class Burst:
    """Call `enqueue`; `close` when nothing that was enqueued is under way any more."""

    def __init__(self, image: CudaImage, name: str, *, context: CudaContext) -> None:
        self._context = context
        with context.current() as driver:
            self._module = checked(driver.cuModuleLoadData(image.cubin), f"load {name}")
            self._function = checked(
                driver.cuModuleGetFunction(self._module, name.encode()), f"find {name}"
            )
            device = checked(driver.cuCtxGetDevice(), "ask for the device")
            count = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
            self.ctas = CTAS_EACH * checked(
                driver.cuDeviceGetAttribute(count, device), "count multiprocessors"
            )

    def enqueue(self, stream: Any, words: Sequence[int], *, zeroed: int = 0) -> None:
        """Set the eight bytes at `zeroed` to zero, if it is given, then launch with these
        arguments.
        """
        values = (ctypes.c_uint64 * len(words))(*words)
        start = ctypes.addressof(values)
        arguments = (ctypes.c_void_p * len(words))(*(start + 8 * i for i in range(len(words))))
        with self._context.current() as driver:
            if zeroed:
                checked(driver.cuMemsetD8Async(zeroed, 0, 8, stream), "empty the list")
            checked(
                driver.cuLaunchKernel(
                    self._function,
                    self.ctas,
                    1,
                    1,
                    THREADS,
                    1,
                    1,
                    0,
                    stream,
                    ctypes.addressof(arguments),
                    0,
                ),
                "launch a burst",
            )

    def close(self) -> None:
        """Unload; the executor is parked."""
        with self._context.current() as driver:
            released(driver.cuModuleUnload(self._module), "unload a burst")
