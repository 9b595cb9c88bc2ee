"""A GPU, a control block and launches of every kind, for tests of hooks in machine code.

Owns: memory, modules and launches of one process on the first GPU. Promises: a kernel that does not end is named within seconds, by an
error that ends the scenario; every other wait ends at the bound of the child that it runs in. Called by scenarios_splice.py,
scenarios_sass_marks.py and scenarios_ptx.py.
"""

from __future__ import annotations

import ctypes
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from concordia import abi
from concordia.device.cuda_call import checked
from concordia.device.cuda_context import CudaContext
from concordia.instrument.report import fill
from concordia.instrument.splice import splice_cubin

ENDS_S = 5.0  # what takes microseconds, beside other programs on the same GPU
POLL_S = 0.0002
WORDS = abi.CONTROL_PROGRESS_WORDS * abi.CONTROL_PROGRESS_STRIDE


class Hangs(Exception):
    """What was launched does not end: the context is lost, and whatever would wait for it again waits for ever."""


@dataclass(frozen=True)
class Shape:
    """How a kernel is launched."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    launch: str = ""  # "cooperative", "pdl" or a plain one


def wait_for(driver: Any, stream: Any, what: str, bound_s: float = ENDS_S) -> None:
    """Until the stream is done; raises Hangs with this name at the bound."""
    until, not_ready = time.monotonic() + bound_s, driver.CUresult.CUDA_ERROR_NOT_READY
    while (answer := driver.cuStreamQuery(stream))[0] == not_ready:
        if time.monotonic() > until:
            raise Hangs(f"{what} did not end within {bound_s:g} s")
        threading.Event().wait(POLL_S)
    checked(answer, f"wait for {what}")


class HookStage:
    """Everything on the first GPU, until the process ends."""

    def __init__(self) -> None:
        self._latest = "nothing"  # the kernel that was asked for last
        self._context = CudaContext(0)
        driver = self.driver = self._context.driver
        checked(driver.cuCtxSetCurrent(self._context.handle), "enter the context")
        self.stream = checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "create a stream")
        self.control = self.allocate(abi.CONTROL_ALLOCATED_BYTES)
        self.clear()

    def allocate(self, size: int) -> int:
        return int(checked(self.driver.cuMemAlloc(size), f"allocate {size} bytes"))

    def write(self, address: int, data: np.ndarray[Any, Any]) -> None:
        checked(self.driver.cuMemcpyHtoD(address, data.ctypes.data, data.nbytes), "write")
        checked(self.driver.cuCtxSynchronize(), "write")  # our stream waits for no other

    def read(self, address: int, size: int) -> bytes:
        data = np.empty(size, dtype=np.uint8)
        checked(self.driver.cuMemcpyDtoH(data.ctypes.data, address, size), "read")
        return data.tobytes()

    def clear(self) -> None:
        """All counts become 0."""
        self.write(self.control, np.zeros(abi.CONTROL_ALLOCATED_BYTES, dtype=np.uint8))

    def counts(self) -> tuple[int, int]:
        """CTAs that came in and went out since `clear`; every other byte of the block must be 0."""
        block = np.frombuffer(self.read(self.control, abi.CONTROL_ALLOCATED_BYTES), dtype="<u8")
        words = abi.CONTROL_PROGRESS_STRIDE // 8
        entry, leaving = (slice(at // 8, (at + WORDS) // 8, words) for at in (abi.CONTROL_ENTRY_OFFSET, abi.CONTROL_EXIT_OFFSET))
        assert int(block.sum()) == int(block[entry].sum() + block[leaving].sum()), "a hook wrote elsewhere"
        return int(block[entry].sum()), int(block[leaving].sum())

    def hooked(self, cubin: bytes, *, entry: bool, exit: bool) -> bytes:
        """With hooks that count in our control block."""
        spliced = splice_cubin(cubin, entry=entry, exit=exit)
        return fill(spliced.cubin, spliced.slots, self.control)

    def function(self, cubin: bytes, name: str) -> Any:
        self._latest = name
        module = checked(self.driver.cuModuleLoadData(cubin), f"load {name}")
        return checked(self.driver.cuModuleGetFunction(module, name.encode()), f"find {name}")

    def launch(self, function: Any, shape: Shape, arguments: list[Any]) -> None:
        """`arguments` are ctypes values."""
        driver = self.driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = shape.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = shape.block
        config.sharedMemBytes, config.hStream = shape.shared_bytes, self.stream
        ids = driver.CUlaunchAttributeID
        attribute = driver.CUlaunchAttribute()
        if shape.launch == "cooperative":
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attribute.value.cooperative = 1
        elif shape.launch == "pdl":
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
        if shape.launch:
            config.attrs, config.numAttrs = [attribute], 1
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0), "launch")

    def wait(self, what: str = "") -> None:
        """`what` was launched, or the kernel that was asked for last."""
        wait_for(self.driver, self.stream, what or self._latest)

    def graph(self, enqueue: Any) -> Any:
        """What `enqueue` puts into the stream, as a graph that can be launched."""
        driver = self.driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        checked(driver.cuStreamBeginCapture(self.stream, mode), "begin a graph")
        enqueue()
        graph = checked(driver.cuStreamEndCapture(self.stream), "end a graph")
        return checked(driver.cuGraphInstantiate(graph, 0), "make a graph")

    def replay(self, graph: Any) -> None:
        checked(self.driver.cuGraphLaunch(graph, self.stream), "launch a graph")
