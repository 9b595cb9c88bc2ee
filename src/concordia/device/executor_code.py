"""The executor's kernels, loaded, floor 2.

Owns: their module. Promises: both were launched with what the lint lets a handler need, or they are
not loaded; after this nothing of them is loaded lazily. Made by residency.py, which launches them.
"""

from __future__ import annotations

import itertools
from typing import Final

from concordia.device import nvrtc
from concordia.device.cuda_call import checked, released
from concordia.device.cuda_context import CudaContext
from concordia.device.loader import CudaImage
from concordia.errors import DeviceError

KERNELS: Final = (b"concordia_executor", b"concordia_stream_tasks")


class ExecutorCode:
    """`function` runs a ring in a stay of its own, `stream_function` in a framework's stream."""

    def __init__(self, image: CudaImage, *, threads: int, context: CudaContext) -> None:
        self._context = context
        with context.current() as driver:
            self._module = checked(driver.cuModuleLoadData(image.cubin), "load the executor")
            self.function, self.stream_function = (
                checked(driver.cuModuleGetFunction(self._module, name), "find the executor")
                for name in KERNELS
            )
            names = driver.CUfunction_attribute
            needs = (
                (names.CU_FUNC_ATTRIBUTE_NUM_REGS, nvrtc.REGISTERS_MAX),
                (names.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, threads),
            )
            functions = (self.function, self.stream_function)
            for (attribute, least), function in itertools.product(needs, functions):
                found = checked(driver.cuFuncGetAttribute(attribute, function), attribute.name)
                if found < least:
                    raise DeviceError(f"the executor's {attribute.name} is {found}, not {least}")

    def close(self) -> None:
        """Unload; nobody is inside, and no graph that will be replayed has a node of it."""
        with self._context.current() as driver:
            released(driver.cuModuleUnload(self._module), "unload the executor")
