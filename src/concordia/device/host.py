"""The CPU device, floor 2: threads as lanes, shared objects as handlers.

Owns: the compiled half of submission (`HostLibrary`, used by the GPU device too), loaded handlers
and the executor's threads. Promises: a handler is refused before anything names it when a symbol or
the ABI is wrong; every call that can wait has a bound and releases the GIL, every other one keeps
it (giving it up costs more than the call). Called through driver.open_device. Does not know rings,
tasks or records: runtime/ does.
"""

from __future__ import annotations

import _ctypes
import ctypes
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from concordia import abi, config
from concordia.device.compiler import HandlerSource, HostCompiler
from concordia.device.driver import ExecutorPlan, Publication
from concordia.device.memory import Buffer
from concordia.device.policy import DEFAULT, Policy, policy_of
from concordia.errors import DeviceError, HandlerRefused, UsageError

HANDLER_SYMBOL: Final = "concordia_handler"
ABI_SYMBOL: Final = "concordia_handler_abi"

_WORD: Final = ctypes.c_uint64
_ADDRESS: Final = ctypes.c_void_p
_BYTES: Final = ctypes.c_char_p


class HostLibrary:
    """kernels/host.cpp, compiled; the names are those of its functions without the prefix."""

    def __init__(self, compiler: HostCompiler) -> None:
        path, _ = compiler.compile(HandlerSource.of("host.cpp"))
        quick, slow = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))

        def function(library: Any, name: str, result: Any, *arguments: Any) -> Any:
            found = getattr(library, f"concordia_{name}")
            found.restype, found.argtypes = result, arguments
            return found

        version = function(quick, "abi", _WORD)()
        if version != abi.ABI_VERSION:
            raise DeviceError(f"{path} has ABI {version}, not {abi.ABI_VERSION}")
        int32, flag = ctypes.c_int, ctypes.c_bool
        handed_in = (_ADDRESS, _ADDRESS, _BYTES, _BYTES, _WORD)  # ring, host, task, ids, a count
        self.submit = function(quick, "submit", int32, *handed_in, _BYTES, _WORD, _ADDRESS)
        self.submit_many = function(quick, "submit_many", int32, *handed_in, _ADDRESS, _ADDRESS)
        self.read = function(quick, "read", int32, _ADDRESS, _WORD, _ADDRESS)
        self.load = function(quick, "load", _WORD, _ADDRESS)
        self.store = function(quick, "store", None, _ADDRESS, _WORD)
        self.store_stop = function(quick, "store_stop", None, _ADDRESS, _WORD)
        self.driver_park = function(slow, "driver_park", None, _ADDRESS)
        self.driver_unpark = function(slow, "driver_unpark", None, _ADDRESS)
        self.needs_launch = function(quick, "needs_launch", flag, _ADDRESS)
        self.publish_operator = function(
            quick, "publish_operator", None, _ADDRESS, _WORD, _WORD, _WORD
        )
        swapped = (_ADDRESS, _WORD, _WORD, _WORD)  # ring, opcode, operator, generation
        self.swap_operator = function(slow, "swap_operator", int32, *swapped, _ADDRESS, flag, _WORD)
        self.executor_bytes = function(quick, "executor_bytes", _WORD)
        self.executor_image = function(quick, "executor_image", None, _ADDRESS, _BYTES, _WORD)
        self.announce_step = function(quick, "announce_step", None, _ADDRESS, _WORD, _WORD)
        self.step_done = function(quick, "step_done", None, _ADDRESS, _WORD)
        self.heartbeat = function(quick, "heartbeat", None, _ADDRESS, _WORD)
        self.count_unprotected = function(quick, "count_unprotected", None, _ADDRESS, _WORD)
        self.hash_payload = function(
            slow, "hash_payload", None, _ADDRESS, _WORD, _ADDRESS, _ADDRESS
        )
        self.verify_payloads = function(
            slow, "verify_payloads", _WORD, _BYTES, _WORD, _ADDRESS, _ADDRESS
        )
        self.wait = function(slow, "wait", int32, _ADDRESS, _WORD, _WORD, _ADDRESS)
        self.open = function(slow, "open", _ADDRESS, _BYTES)
        self.park = function(slow, "park", flag, _ADDRESS, _WORD)
        self.unpark = function(slow, "unpark", None, _ADDRESS)
        self.close = function(slow, "close", flag, _ADDRESS, _WORD)
        self.rescues = function(slow, "rescues", _WORD, _ADDRESS)


@dataclass(frozen=True, slots=True)
class HostImage:
    """A compiled handler, not loaded yet."""

    name: str
    path: Path
    digest: int


class HostCode:
    """A loaded handler; stays until `close`."""

    def __init__(self, image: HostImage) -> None:
        try:
            self._library = ctypes.CDLL(str(image.path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as error:
            raise HandlerRefused(f"{image.name}: does not load: {error}") from error
        self._is_open = True
        try:
            self.address = self._check(image.name)
        except HandlerRefused:
            self.close()
            raise

    def _check(self, name: str) -> int:
        try:
            version = _WORD.in_dll(self._library, ABI_SYMBOL).value
            address = ctypes.cast(getattr(self._library, HANDLER_SYMBOL), _ADDRESS).value
        except (AttributeError, ValueError) as error:
            raise HandlerRefused(f"{name}: not a handler: {error}") from error
        if version != abi.ABI_VERSION:
            raise HandlerRefused(f"{name}: has ABI {version}, this is ABI {abi.ABI_VERSION}")
        assert address is not None
        return address

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            _ctypes.dlclose(self._library._handle)


class HostExecutor:
    """Threads that run one ring; they sleep while there is nothing to do, and submission wakes
    them.
    """

    def __init__(self, library: HostLibrary, plan: ExecutorPlan) -> None:
        if not 1 <= plan.lanes <= config.LANES_MAX:
            raise UsageError(f"{plan.lanes} lanes: use 1 to {config.LANES_MAX}")
        self._library = library
        self.handle: int = library.open(plan.pack()) or 0
        if not self.handle:
            raise DeviceError(f"the system refused memory or {plan.lanes} threads for an executor")
        # what ends a thread of this process ends the process, so only its device can be gone
        self.lost: DeviceError | None = None

    residency = DEFAULT

    def settle(self, policy: Policy) -> None:
        _require_default(policy)

    def stream_launch(self, ring: int) -> NoReturn:
        raise UsageError("the CPU device has no streams: hand tasks in to the runtime itself")

    def launch(self) -> None:
        raise AssertionError("submission launches this executor by itself")

    def launch_after(self, stream: int, submit_gate: Callable[[int], object]) -> None:
        """Work of this processor is done when the call that did it returns: there is nothing to
        wait for.
        """

    def launch_burst(
        self, enqueue: Callable[[Any], None], submit_gate: Callable[[int], object]
    ) -> None:
        raise AssertionError("this device has no bursts")

    def park(self, timeout_s: float) -> bool:
        return not self.handle or bool(self._library.park(self.handle, int(timeout_s * 1e9)))

    def unpark(self) -> None:
        if self.handle:
            self._library.unpark(self.handle)

    def swap_operator(self, prepare: Callable[[], Publication]) -> bool:
        """Its table may change while it runs: there is no need."""
        return False

    def rescues(self) -> int:
        return int(self._library.rescues(self.handle)) if self.handle else 0

    def close(self, timeout_s: float) -> bool:
        if self.handle and self._library.close(self.handle, int(timeout_s * 1e9)):
            self.handle = 0
        return not self.handle


class HostDevice:
    """The processor and memory that the framework itself runs on."""

    name = "host"
    idle_ns = config.HOST_IDLE_NS
    stage_bytes = 1 << 32  # what is never touched takes no room: whole segments
    needs_parking = False
    residencies: tuple[str, ...] = (DEFAULT,)

    def __init__(self, compiler: HostCompiler | None = None) -> None:
        self._compiler = compiler or HostCompiler()
        self.library = HostLibrary(self._compiler)
        self._buffers: dict[int, Buffer] = {}
        self._executors: list[HostExecutor] = []

    def build_burst(self, source: HandlerSource) -> None:
        """Lanes are all there is: None."""

    def burst(self, image: Any, name: str) -> Any:
        raise AssertionError("this device builds no bursts")

    def neighbour(self) -> None:
        """Who computes beside its threads is the system's business: None."""

    def parked(self) -> AbstractContextManager[None]:
        """No call waits for all of a processor."""
        return nullcontext()

    def share(self, address: int, size: int) -> int:
        """A host address is the executor's own."""
        return address

    def unshare(self, address: int) -> None:
        """Nothing was done."""

    def check_range(self, address: int, size: int) -> None:
        """Every page mapped, readable and writable: an executor that faults would take the engine
        with it.
        """
        at, end = address, address + size
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            start, stop = (int(part, 16) for part in span.split("-"))
            if start <= at < stop and rights.startswith("rw"):
                at = stop
            if at >= end:
                return
        raise UsageError(
            f"{size} bytes at {address:#x}: not all of it is writable memory of this process"
        )

    def allocate(self, size: int) -> int:
        buffer = Buffer(size)
        self._buffers[buffer.address] = buffer
        return buffer.address

    def free(self, address: int) -> None:
        self._buffers.pop(address).close()

    def write(self, address: int, payload: bytes) -> None:
        ctypes.memmove(address, payload, len(payload))

    def read(self, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)

    def build(self, source: HandlerSource) -> HostImage:
        path, key = self._compiler.compile(source)
        return HostImage(source.file, path, int(key[:16], 16))

    def load(self, image: HostImage) -> HostCode:
        return HostCode(image)

    def executor(self, plan: ExecutorPlan, residency: str = DEFAULT) -> HostExecutor:
        _require_default(policy_of(residency))
        executor = HostExecutor(self.library, plan)
        self._executors.append(executor)
        return executor

    def close(self) -> None:
        """End what runs, then give everything back."""
        for executor in self._executors:
            if not executor.close(config.WAIT_PARK_S):
                raise DeviceError(f"{self.name}: an executor did not leave; nothing was released")
            executor.lost = DeviceError(f"{self.name} is closed")
        for address in list(self._buffers):
            self.free(address)


def _require_default(policy: Policy) -> None:
    if policy.name != DEFAULT:
        raise UsageError(
            f"residency {policy.name} wants a GPU: the CPU device's executor is threads, which "
            f"sleep while there is nothing to do ({DEFAULT})"
        )
