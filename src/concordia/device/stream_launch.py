"""Tasks as work of the framework's own streams and graphs, floor 2.

Owns: the state of one ring whose tasks run there, its bell, and the kernel node that serves it.
Promises: `enqueue` is an ordinary launch, captured where the stream is being captured; a run of it
serves what its stream was told of by `ring_bell` before, and nothing later; it has its turn beside
the executor's own launches, so one kernel at a time appends. Nothing here waits. Made by
residency.py, used by runtime/stream_tasks.py. Does not know tasks.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from concordia.device.cuda_call import checked
from concordia.device.cuda_context import CudaContext, CudaMemory
from concordia.errors import UsageError

BELL_BYTES: Final = 128


class StreamLaunch:
    """`close` once no stream and no graph that will be replayed has the node any more."""

    def __init__(
        self,
        *,
        context: CudaContext,
        memory: CudaMemory,
        function: Any,
        threads: int,
        state: int,
        executor: int,
        turn: int,
    ) -> None:
        self._context, self._memory, self._function = context, memory, function
        self._threads, self._state = threads, state
        self._bell = memory.allocate(BELL_BYTES)
        self._values = (ctypes.c_uint64 * 4)(state, executor, self._bell, turn)
        at = ctypes.addressof(self._values)
        self._arguments = (ctypes.c_void_p * 4)(*(at + 8 * i for i in range(4)))

    def enqueue(self, stream: int) -> None:
        """Put the node into a stream, or into the graph that it is being captured into; the
        arguments are copied.
        """
        with self._context.current() as driver:
            grid, block = (1, 1, 1), (self._threads, 1, 1)
            arguments = ctypes.addressof(self._arguments)
            checked(
                driver.cuLaunchKernel(self._function, *grid, *block, 0, stream, arguments, 0),
                "launch tasks in a framework's stream",
            )

    def check(self, stream: int) -> None:
        """Raise UsageError while the stream is being captured: a bell would ring at each replay."""
        with self._context.current() as driver:
            none = driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
            if checked(driver.cuStreamIsCapturing(stream), "look at a framework's stream") != none:
                raise UsageError(
                    "tasks were handed in to a stream that is being captured: capture "
                    "`enqueue`, hand in before each replay"
                )

    def capture_of(self, stream: int) -> int | None:
        """Which capture this stream is part of, by a number that no other ever has; None for
        none.
        """
        with self._context.current() as driver:
            active = driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
            found = checked(
                driver.cuStreamGetCaptureInfo(stream), "look at what a stream is captured into"
            )
            return int(found[1]) if found[0] == active else None

    def ring_bell(self, stream: int, number: int) -> None:
        """What runs in this stream from now on may serve all up to `number`."""
        with self._context.current() as driver:
            doing = "tell a framework's stream of its tasks"
            checked(driver.cuStreamWriteValue64(stream, self._bell, number, 0), doing)

    def close(self) -> None:
        """Give its memory back; no run of it is under way."""
        self._memory.free(self._bell)
        self._memory.free(self._state)
