# ruff: noqa: N802 - the names are the driver's
"""A CUDA driver of threads, as far as device/{residency,launches,stream_launch}.py use one.

Owns: streams that run what they are given in order, events, and the executor's two kernels as the CPU device compiles them. Promises: a launch
returns at once and its kernel runs later, with the arguments of the call; what waits for the whole device (load, free, unshare) notes whether
an executor was inside. Used by the tests that follow an executor's policy without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import queue
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from concordia.device.compiler import HandlerSource, HostCompiler
from concordia.device.cuda import CudaDevice
from concordia.device.cuda_context import Current
from concordia.device.driver import ExecutorPlan
from concordia.device.host import HostDevice
from concordia.device.policy import DEFAULT, POLICIES, policy_of
from concordia.device.residency import CudaExecutor

# executor.cu with one lane
KERNELS = """#include "executor.h"
static void take_turn(uint64_t* turn) { while (turn != nullptr && exchange_device(turn, 1) != 0) yield_lane(); }
static void give_turn(uint64_t* turn) { if (turn != nullptr) store<kRelease, kDevice>(turn, 0); }
EXPORT void concordia_executor(Executor* executor, uint64_t launch, uint64_t* turn) {
  take_turn(turn);
  executor->call.lanes = 1;
  run_executor(executor, 0, launch);
  give_turn(turn);
}
EXPORT void concordia_stream_tasks(Executor* tasks, Executor* executor, uint64_t* bell, uint64_t* turn) {
  const uint64_t launch = load<kAcquire, kSystem>(bell);
  if (launch == bell[1] || load<kRelaxed, kSystem>(&tasks->ring->stop) != 0) return;
  const uint64_t since_ns = now_ns();
  while (exchange_device(turn, 1) != 0) {
    if (now_ns() - since_ns > 20000000) return;
    yield_lane();
  }
  tasks->call.lanes = 1;
  tasks->call.journal = &executor->journal;
  tasks->table_generation = &executor->ring->generation;
  run_executor(tasks, 0, launch);
  bell[1] = launch;
  give_turn(turn);
}
"""
ARGUMENTS = {b"concordia_executor": 3, b"concordia_stream_tasks": 4}


class Result(enum.IntEnum):
    SUCCESS = 0
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class Function(bytes):
    """A kernel by its name; compiled code knows it by its number."""

    def __int__(self) -> int:
        return 1 + list(ARGUMENTS).index(bytes(self))


class Stream:
    """Runs what it is given, one after the other."""

    def __init__(self) -> None:
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.pending = 0
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], None]) -> None:
        with self.lock:
            self.pending += 1
        self._work.put(call)

    def _run(self) -> None:
        while (call := self._work.get()) is not None:
            call()
            with self.lock:
                self.pending -= 1

    def end(self) -> None:
        self._work.put(None)
        self._thread.join(5)


class FakeDriver:
    """The driver's functions by their names; each returns a tuple that begins with a status."""

    CUresult = Result
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2, CU_EVENT_BLOCKING_SYNC=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    CUstreamCaptureStatus = SimpleNamespace(CU_STREAM_CAPTURE_STATUS_NONE=0, CU_STREAM_CAPTURE_STATUS_ACTIVE=1)
    CUfunction_attribute = enum.Enum("Attribute", ["CU_FUNC_ATTRIBUTE_NUM_REGS", "CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK"])

    def __init__(self) -> None:
        path, _ = HostCompiler().compile(HandlerSource.of("fake_kernels.cpp", text=KERNELS))
        self._kernels = ctypes.CDLL(str(path))
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}  # streams that are being captured
        self._captured: list[list[Callable[[], None]]] = []
        self.inside = 0  # launches that run now
        self.launches: dict[bytes, int] = dict.fromkeys(ARGUMENTS, 0)
        self.lock = threading.Lock()
        self.is_lost = False
        # what compiled code calls: the same, by address
        word, unsigned = ctypes.c_uint64, ctypes.c_uint
        query = ctypes.CFUNCTYPE(ctypes.c_int, word)(lambda stream: int(self.cuStreamQuery(stream)[0]))
        launch = ctypes.CFUNCTYPE(ctypes.c_int, word, *[unsigned] * 7, word, word, word)(
            lambda function, *rest: int(self.cuLaunchKernel(Function(list(ARGUMENTS)[function - 1]), *rest)[0])
        )
        self._callbacks = {"cuStreamQuery": query, "cuLaunchKernel": launch}

    def entry_point(self, name: str) -> int:
        return int(ctypes.cast(self._callbacks[name], ctypes.c_void_p).value or 0)

    def __getattr__(self, name: str) -> Any:
        if name in {"cuCtxPushCurrent", "cuCtxPopCurrent", "cuEventDestroy", "cuModuleUnload"}:
            return lambda *_: (Result.SUCCESS,)
        raise AttributeError(name)

    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> tuple[Any, int]:
        return Result.SUCCESS, mode

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, bytes]:
        return Result.SUCCESS, image

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[Any, bytes]:
        assert name in ARGUMENTS
        return Result.SUCCESS, Function(name)

    def cuFuncGetAttribute(self, attribute: Any, function: bytes) -> tuple[Any, int]:
        return Result.SUCCESS, 512

    def cuStreamCreate(self, flags: int) -> tuple[Any, int]:
        with self.lock:
            handle = len(self.streams) + 1
            self.streams[handle] = Stream()
        return Result.SUCCESS, handle

    def cuStreamDestroy(self, stream: int) -> tuple[Any]:
        self.streams[stream].end()
        return (Result.SUCCESS,)

    def cuStreamQuery(self, stream: int) -> tuple[Any]:
        if self.is_lost:
            return (Result.CUDA_ERROR_ILLEGAL_ADDRESS,)
        with self.streams[stream].lock:
            return (Result.CUDA_ERROR_NOT_READY if self.streams[stream].pending else Result.SUCCESS,)

    def cuEventCreate(self, flags: int) -> tuple[Any, list[threading.Event]]:
        return Result.SUCCESS, [threading.Event()]

    def cuEventRecord(self, event: list[threading.Event], stream: int) -> tuple[Any]:
        event[0] = threading.Event()  # who waits for the one before goes on waiting for that
        self.streams[stream].put(event[0].set)
        return (Result.SUCCESS,)

    def cuEventSynchronize(self, event: list[threading.Event]) -> tuple[Any]:
        assert event[0].wait(10)
        return (Result.SUCCESS,)

    def cuStreamWaitEvent(self, stream: int, event: list[threading.Event], flags: int) -> tuple[Any]:
        self.streams[stream].put(lambda marked=event[0]: marked.wait(10))
        return (Result.SUCCESS,)

    def cuStreamIsCapturing(self, stream: int) -> tuple[Any, int]:
        return Result.SUCCESS, int(stream in self.graphs)

    def cuStreamGetCaptureInfo(self, stream: int) -> tuple[Any, ...]:
        graph = self.graphs.get(stream)
        if graph is None:
            return Result.SUCCESS, 0, 0, None, [], [], 0
        self._captured.append(graph)  # kept, so that no other is ever at its address
        return Result.SUCCESS, 1, id(graph), None, [], [], 0

    def cuStreamWriteValue64(self, stream: int, address: int, value: int, flags: int) -> tuple[Any]:
        word = ctypes.c_uint64.from_address(address)
        self.streams[stream].put(lambda: setattr(word, "value", value))
        return (Result.SUCCESS,)

    def cuLaunchKernel(self, function: bytes, *words: int) -> tuple[Any]:
        *_, stream, arguments, _ = words
        places = (ctypes.c_uint64 * ARGUMENTS[function]).from_address(arguments)
        values = [ctypes.c_uint64.from_address(at).value for at in places]
        kernel = getattr(self._kernels, function.decode())

        def run() -> None:
            with self.lock:
                self.inside += 1
                self.launches[function] += 1
            kernel(*(ctypes.c_uint64(value) for value in values))
            with self.lock:
                self.inside -= 1

        if stream in self.graphs:
            self.graphs[stream].append(run)
        else:
            self.streams[stream].put(run)
        return (Result.SUCCESS,)

    def replay(self, graph: list[Callable[[], None]], stream: int) -> None:
        for run in graph:
            self.streams[stream].put(run)


class FakeMemory:
    """Device memory that is this process's."""

    def __init__(self, device: HostDevice) -> None:
        self.allocate, self.write = device.allocate, device.write
        self.free = lambda address: HostDevice.free(device, address)  # its caller has parked


class FakeCuda(HostDevice):
    """The CPU device with a GPU's executor."""

    name = "cuda:0"
    needs_parking = True
    residencies = tuple(POLICIES)
    parked = CudaDevice.parked  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.driver = FakeDriver()
        self._context: Any = SimpleNamespace(current=lambda: Current(self.driver, 0), entry_point=self.driver.entry_point)
        self._executors: list[CudaExecutor] = []
        self.met: list[str] = []  # calls that wait for the whole device, and found one inside

    @contextlib.contextmanager
    def _waiting(self, name: str) -> Iterator[None]:
        with self.parked():
            if self.driver.inside:
                self.met.append(name)
            yield

    def load(self, image: Any) -> Any:
        with self._waiting("load"):
            return super().load(image)

    def free(self, address: int) -> None:
        with self._waiting("free"):
            super().free(address)

    def unshare(self, address: int) -> None:
        with self._waiting("unshare"):
            super().unshare(address)

    def executor(self, plan: ExecutorPlan, residency: str = DEFAULT) -> Any:
        executor = CudaExecutor(
            context=self._context, memory=FakeMemory(self), library=self.library,  # type: ignore[arg-type]
            image=SimpleNamespace(cubin=b""), plan=plan, policy=policy_of(residency),  # type: ignore[arg-type]
        )  # fmt: skip
        self._executors.append(executor)
        return executor
