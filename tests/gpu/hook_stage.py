"""A GPU, a control block and launches of every kind, for tests of hooks in machine code.

Owns: memory, modules and launches of one process on the first GPU. Promises: each wait ends in an error or at the bound of the child
that it runs in. Called by scenarios_splice.py.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from concordia import abi
from concordia.device.cuda_call import checked
from concordia.device.cuda_context import CudaContext
from concordia.instrument.report import fill
from concordia.instrument.splice import splice_cubin

WORDS = abi.CONTROL_PROGRESS_WORDS * abi.CONTROL_PROGRESS_STRIDE


@dataclass(frozen=True)
class Shape:
    """How a kernel is launched."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    launch: str = ""  # "cooperative", "pdl" or a plain one


class HookStage:
    """Everything on the first GPU, until the process ends."""

    def __init__(self) -> None:
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

    def wait(self) -> None:
        checked(self.driver.cuStreamSynchronize(self.stream), "wait for the stream")

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
