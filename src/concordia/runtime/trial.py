"""A candidate run before anybody relies on it, floor 3.

Owns: a throw-away executor with a ring and memory of its own, on the device that the candidate is
for. Promises: nothing that a region, a journal or another runtime owns is within the reach of a
candidate that keeps to its arguments; every wait has a bound, and one that does not answer within
it is refused like one that answers wrongly; what such a one may still use is kept, not freed.
Called by executor.py for own operators and by checkpoint/ for handlers. Does not contain a
candidate that touches what it was not given: on a CPU that ends the process, on a GPU its context.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Final, Protocol

from concordia import abi, config
from concordia.device.driver import Device, Image
from concordia.errors import HandlerRefused, UsageError, WaitTimeout
from concordia.runtime.op_table import Operator, OperatorTable
from concordia.runtime.ring import Completion, Task, Ticket

logger = logging.getLogger(__name__)

TRIAL_SLOTS: Final = 64  # a self-test hands in one task at a time


class Closable(Protocol):
    """What a trial gives back at its end."""

    def close(self) -> None: ...


class Triable(Protocol):
    """What a trial needs: an executor of its own, with a ring and memory."""

    device: Device
    operators: OperatorTable

    def adopt(self, name: str, image: Image, *, region_address: int = 0) -> Operator:
        """Publish a handler that was built before."""
        ...

    def submit(self, task: Task) -> Ticket:
        """Hand a task in; raises RingFull."""
        ...

    def wait(self, ticket: Ticket, timeout_s: float) -> Completion:
        """Wait for a task's answer; raises WaitTimeout."""
        ...

    def abandon(self) -> None:
        """Stop the executor if it can be stopped, and keep all memory."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Trial:
    """One throw-away runtime, which it takes over; `close` it."""

    def __init__(self, runtime: Triable) -> None:
        self._runtime = runtime
        self._device = runtime.device
        self._memory: list[int] = []
        self._held: list[Closable] = []
        self._candidate: Operator | None = None
        self._is_hung = False

    def allocate(self, size: int, contents: bytes = b"") -> int:
        """Scratch memory of the device, zeroed or with these bytes first; gone with the trial."""
        address = self._device.allocate(size)
        self._memory.append(address)
        self.write(address, contents)
        return address

    def write(self, address: int, payload: bytes) -> None:
        """Copy bytes to scratch memory."""
        if payload:
            self._device.write(address, payload)

    def read(self, address: int, size: int) -> bytes:
        """Copy bytes out of scratch memory."""
        return self._device.read(address, size)

    def hold(self, thing: Closable) -> None:
        """Close this once the executor is gone, the last one first."""
        self._held.append(thing)

    def adopt(self, name: str, image: Image, *, region_address: int = 0) -> None:
        """Make this code the candidate that `run` runs."""
        known = self._runtime.operators.find(name)
        if known is None or known.digest != image.digest:
            known = self._runtime.adopt(name, image, region_address=region_address)
        self._candidate = known

    def run(self, task: Task) -> Completion:
        """The candidate's answer to a task; HandlerRefused when there is none within
        WAIT_TASK_S.
        """
        candidate = self._candidate
        if candidate is None:
            raise UsageError("this trial has no candidate yet")
        ticket = self._runtime.submit(task._replace(opcode=candidate.opcode))
        try:
            return self._runtime.wait(ticket, config.WAIT_TASK_S)
        except WaitTimeout as error:
            self._is_hung = True
            raise HandlerRefused(
                f"{candidate.name}: no answer within {config.WAIT_TASK_S} s in its self-test"
            ) from error

    def compute(self, *, arg: int = 0, payload: bytes | None = None) -> Completion:
        """The candidate's answer to a compute task with this word and these bytes."""
        return self.run(Task(kind=abi.TASK_COMPUTE, arg=arg, payload=payload))

    def prove(self, name: str, image: Image, self_test: Callable[[Trial], None]) -> None:
        """Let a caller's test judge this code; an assertion that fails there is a refusal."""
        self.adopt(name, image)
        try:
            self_test(self)
        except AssertionError as error:
            line = traceback.extract_tb(error.__traceback__)[-1].line
            raise HandlerRefused(f"{name}: its self-test failed: {str(error) or line}") from error

    def close(self) -> None:
        """Give everything back, or keep it all where the candidate still runs."""
        if self._is_hung:
            # Unmapped memory under a thread or a kernel that still runs would end the process: the
            # runtime is left alone, and its device knows that it is.
            logger.warning("a refused handler does not end: its scratch memory is kept")
            self._runtime.abandon()
            return
        self._runtime.close()
        for address in self._memory:
            self._device.free(address)
        for thing in reversed(self._held):
            thing.close()
