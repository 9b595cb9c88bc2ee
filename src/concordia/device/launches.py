"""The launches of one executor's kernel, floor 2.

Owns: the executor's own stream, the marks in it, the kernel's arguments and the count of launches
in the ring. Promises: launches are in stream order and numbered, so the kernel of launch n never
meets that of n + 1; the count is there before the kernel is. Made by residency.py, which has the
lock that `send` wants, and decides when. Does not ask a kernel to leave.
"""

from __future__ import annotations

import ctypes
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from concordia import abi
from concordia.device.cuda_call import checked, released
from concordia.device.cuda_context import CudaContext
from concordia.device.quick_swap import QuickSwap

if TYPE_CHECKING:
    from concordia.device.host import HostLibrary

# a kernel that was told to leave is out within microseconds: poll this long, then sleep between
# looks
SPIN_S: Final = 0.001
SLEEP_S: Final = 0.0005

_OFFSETS: Final = abi.RING_HEADER.offsets()


class Launches:
    """Of one ring; call `serve` before the first `send`."""

    def __init__(
        self,
        *,
        context: CudaContext,
        library: HostLibrary,
        ring: int,
        function: Any,
        ctas: int,
        threads: int,
    ) -> None:
        self._context, self._library = context, library
        self._function, self._grid, self._block = function, (ctas, 1, 1), (threads, 1, 1)
        self._launched_at = ring + _OFFSETS["launched"]
        self._left_at = ring + _OFFSETS["left"]
        self._values = (ctypes.c_uint64 * 3)()  # the executor's state, number of launch, turn
        at = ctypes.addressof(self._values)
        self._arguments = (ctypes.c_void_p * 3)(*(at + 8 * i for i in range(3)))
        with ExitStack() as undo:
            self._make_marks(undo)
            self.quick_swap = QuickSwap(
                context=context, library=library, ring=ring, function=function,
                stream=self.stream, arguments=ctypes.addressof(self._arguments),
                launch_number=at + 8, ctas=ctas, threads=threads,
            )  # fmt: skip
            self._held = undo.pop_all()

    def _make_marks(self, undo: ExitStack) -> None:
        with self._context.current() as driver:
            flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            self.stream = checked(driver.cuStreamCreate(flags), "create the executor's stream")
            undo.callback(self._release, "cuStreamDestroy", self.stream)
            events, made = driver.CUevent_flags, []
            quiet = int(events.CU_EVENT_DISABLE_TIMING)
            for kind in (quiet | int(events.CU_EVENT_BLOCKING_SYNC), quiet):
                made.append(checked(driver.cuEventCreate(kind), "create an event"))
                undo.callback(self._release, "cuEventDestroy", made[-1])
            self._out, self._before = made

    def _release(self, call: str, handle: Any) -> None:
        with self._context.current() as driver:
            released(getattr(driver, call)(handle), "release the executor")

    def serve(self, *, state: int, turn: int) -> None:
        """What launches from now on run on; `turn` is 0 where they take no turns."""
        self._values[0], self._values[2] = state, turn

    @property
    def number(self) -> int:
        """Of the last one."""
        return int(self._library.load(self._launched_at))

    def are_over(self) -> bool:
        """Whether all kernels that were sent in have said that they leave."""
        launched, left = (self._library.load(at) for at in (self._launched_at, self._left_at))
        return bool(left == launched)

    def send(self) -> None:
        """The count first: the kernel may be over before the call that launched it is. Raises
        CudaError, after which the executor is lost.
        """
        launch = self._library.load(self._launched_at) + 1
        self._library.store(self._launched_at, launch)
        self._values[1] = launch
        with self._context.current() as driver:
            arguments = ctypes.addressof(self._arguments)
            checked(
                driver.cuLaunchKernel(
                    self._function, *self._grid, *self._block, 0, self.stream, arguments, 0
                ),
                "launch the executor",
            )

    def wait_for_stream(self, stream: int) -> None:
        """What is put into our stream from now on runs after what is in that one now."""
        with self._context.current() as driver:
            checked(driver.cuEventRecord(self._before, stream), "mark the framework's stream")
            checked(driver.cuStreamWaitEvent(self.stream, self._before, 0), "wait for a stream")

    def wait_over(self) -> None:
        """Sleep until the last one is over: a lease, and what its last task takes."""
        with self._context.current() as driver:
            checked(driver.cuEventRecord(self._out, self.stream), "mark the executor's end")
            checked(driver.cuEventSynchronize(self._out), "wait for the executor's end")

    def wait_empty(self, timeout_s: float) -> bool:
        """Whether our stream became empty within this time."""
        started = time.monotonic()
        with self._context.current() as driver:
            not_ready = driver.CUresult.CUDA_ERROR_NOT_READY
            while True:
                (status,) = driver.cuStreamQuery(self.stream)
                if status != not_ready:
                    checked((status,), "wait for the executor to leave")
                    return True
                waited = time.monotonic() - started
                if waited > timeout_s:
                    return False
                if waited > SPIN_S:
                    time.sleep(SLEEP_S)

    def close(self) -> None:
        """Give stream and marks back; nothing is in the stream."""
        self._held.close()
