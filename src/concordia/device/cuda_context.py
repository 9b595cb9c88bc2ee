"""What we hold of a GPU, floor 2.

Owns: the primary context (shared with whatever framework lives in the process), one stream for
copies, registered host mappings and device allocations. Promises: everything taken is given back by
`close`, also after the context was lost; every call works in any thread, whatever context it has.
Whatever may wait for the GPU (free, unshare) is called while the executor is parked. Called by
cuda.py and residency.py. Does not compile, load or launch.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from concordia.device.cuda_call import CudaError, checked, released
from concordia.errors import DeviceError, EnvironmentRefused, UsageError


class Current:
    """This thread in our context, and out of the way of a graph that another thread captures:
    without the relaxed mode, a call of ours that may block would end a capture of the framework.
    """

    __slots__ = ("_driver", "_handle", "_mode")

    def __init__(self, driver: Any, handle: Any) -> None:
        self._driver = driver
        self._handle = handle
        self._mode: Any = None

    def __enter__(self) -> Any:
        driver = self._driver
        checked(driver.cuCtxPushCurrent(self._handle), "enter the context")
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._mode = driver.cuThreadExchangeStreamCaptureMode(relaxed)[1]
        return driver

    def __exit__(self, *_: object) -> None:
        self._driver.cuThreadExchangeStreamCaptureMode(self._mode)
        self._driver.cuCtxPopCurrent()


class CudaContext:
    """The primary context of one GPU, held until `close`."""

    def __init__(self, index: int) -> None:
        self.driver = _driver()
        try:
            checked(self.driver.cuInit(0), "initialise CUDA")
        except CudaError as error:
            if error.status != "CUDA_ERROR_NO_DEVICE":
                raise
            raise EnvironmentRefused("this process sees no NVIDIA GPU") from error
        count = checked(self.driver.cuDeviceGetCount(), "count GPUs")
        if index >= count:
            raise EnvironmentRefused(f"there is no GPU {index}: {count} found")
        self.device = checked(self.driver.cuDeviceGet(index), f"open GPU {index}")
        self.handle = checked(
            self.driver.cuDevicePrimaryCtxRetain(self.device), f"retain the context of GPU {index}"
        )

    def current(self) -> Current:
        """The context made current in this thread for a while; gives the driver's bindings."""
        return Current(self.driver, self.handle)

    def architecture(self) -> str:
        """E.g. "sm_90"."""
        names = self.driver.CUdevice_attribute
        parts = [
            checked(self.driver.cuDeviceGetAttribute(name, self.device), "ask for the architecture")
            for name in (
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        ]
        return f"sm_{parts[0]}{parts[1]}"

    @staticmethod
    def entry_point(name: str) -> int:
        """Address of a function of the driver, for compiled code; its caller is in the context."""
        function = getattr(ctypes.CDLL("libcuda.so.1"), name)
        return int(ctypes.cast(function, ctypes.c_void_p).value or 0)

    def close(self) -> None:
        """Give the primary context back; it lives on while the framework holds it."""
        self.driver.cuDevicePrimaryCtxRelease(self.device)


class CudaMemory:
    """Host mappings that the GPU reaches, device memory, and copies on a stream of their own."""

    def __init__(self, context: CudaContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        # how often each mapping was shared: two writers of a process have one pool
        self._shared: dict[int, int] = {}
        self._allocated: dict[int, int] = {}
        with context.current() as driver:
            self.stream = checked(
                driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING),
                "create a stream",
            )

    def share(self, address: int, size: int) -> int:
        """Register a host mapping; on the GPU it has the same address (else every pointer in it
        would be wrong).
        """
        with self._lock, self._context.current() as driver:
            if address in self._shared:
                self._shared[address] += 1
                return address
            flags = driver.CU_MEMHOSTREGISTER_PORTABLE | driver.CU_MEMHOSTREGISTER_DEVICEMAP
            doing = f"register {size} bytes of host memory at {address:#x}"
            checked(driver.cuMemHostRegister(address, size, flags), doing)
            self._shared[address] = 1
            found = int(checked(driver.cuMemHostGetDevicePointer(address, 0), doing))
            if found != address:
                raise DeviceError(
                    f"{doing}: the GPU has it at {found:#x}, which Concordia cannot use"
                )
            return found

    def unshare(self, address: int) -> None:
        """Undo `share`."""
        with self._lock, self._context.current() as driver:
            self._shared[address] -= 1
            if self._shared[address] == 0:
                del self._shared[address]
                doing = f"unregister host memory at {address:#x}"
                released(driver.cuMemHostUnregister(address), doing)

    def check_range(self, address: int, size: int) -> None:
        """Raise UsageError unless these bytes are device memory, of however many allocations."""
        at, end = address, address + size
        with self._context.current() as driver:
            while at < end:
                status, base, found = driver.cuMemGetAddressRange(at)
                if int(status):
                    raise UsageError(
                        f"{size} bytes at {address:#x}: not all of it is memory of the GPU: "
                        f"{status.name}"
                    )
                at = int(base) + int(found)

    def allocate(self, size: int) -> int:
        """Zeroed device memory."""
        with self._context.current() as driver:
            doing = f"allocate {size} bytes of device memory"
            address = int(checked(driver.cuMemAlloc(size), doing))
            with self._lock:
                self._allocated[address] = size
            checked(driver.cuMemsetD8Async(address, 0, size, self.stream), doing)
            checked(driver.cuStreamSynchronize(self.stream), doing)
            return address

    def free(self, address: int) -> None:
        """Undo `allocate`."""
        with self._lock:
            del self._allocated[address]
        with self._context.current() as driver:
            released(driver.cuMemFree(address), f"free device memory at {address:#x}")

    def write(self, address: int, payload: bytes) -> None:
        """Copy bytes to device memory and wait for the copy."""
        source = ctypes.create_string_buffer(payload, len(payload))
        with self._context.current() as driver:
            doing = f"write {len(payload)} bytes at {address:#x}"
            at = ctypes.addressof(source)
            checked(driver.cuMemcpyHtoDAsync(address, at, len(payload), self.stream), doing)
            checked(driver.cuStreamSynchronize(self.stream), doing)

    def read(self, address: int, size: int) -> bytes:
        """Copy bytes out of device memory and wait for the copy."""
        target = ctypes.create_string_buffer(size)
        with self._context.current() as driver:
            doing = f"read {size} bytes at {address:#x}"
            at = ctypes.addressof(target)
            checked(driver.cuMemcpyDtoHAsync(at, address, size, self.stream), doing)
            checked(driver.cuStreamSynchronize(self.stream), doing)
        return target.raw

    def close(self) -> None:
        """Give everything back."""
        with self._lock:
            shared, self._shared = self._shared, {}
            allocated, self._allocated = self._allocated, {}
        with self._context.current() as driver:
            for address in shared:
                released(driver.cuMemHostUnregister(address), f"unregister memory at {address:#x}")
            for address in allocated:
                released(driver.cuMemFree(address), f"free device memory at {address:#x}")
            released(driver.cuStreamDestroy(self.stream), "destroy a stream")


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EnvironmentRefused(
            f"no CUDA bindings ({error}): install Concordia with its extra 'cuda', or use the "
            "host device"
        ) from error
    try:
        driver.cuDriverGetVersion()
    except RuntimeError as error:
        raise EnvironmentRefused(f"no CUDA driver on this machine: {error}") from error
    return driver
