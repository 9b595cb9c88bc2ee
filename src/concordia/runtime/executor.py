"""One executor and everything it runs on, floor 3.

Owns: a ring, an operator table, an executor and its scratch memory, for one writer of one stream.
Promises: `install` compiles beside the running executor and swaps an installed name without losing
or repeating a task; a candidate that does not compile, pass the lint or its self-test changes
nothing; every wait has a bound; `close` runs what was handed in, then stops. Called by checkpoint/.
Does not know regions or records: handlers do. How a name gets other code says swap.py.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from typing import Any

from concordia import abi, config
from concordia.device.compiler import HandlerSource
from concordia.device.driver import Device, Executor, Image
from concordia.device.memory import JournalTarget
from concordia.device.policy import AUTO, DEFAULT
from concordia.errors import AnswerForgotten, DeviceError, RingFull, UsageError, WaitTimeout
from concordia.runtime.counters import RuntimeStats
from concordia.runtime.executor_plan import plan_executor
from concordia.runtime.op_table import Operator, OperatorTable
from concordia.runtime.residency_choice import choose
from concordia.runtime.ring import Completion, Ring, Task, Ticket, when_room
from concordia.runtime.stream_tasks import StreamTasks
from concordia.runtime.swap import Swap
from concordia.runtime.trial import TRIAL_SLOTS, Trial

logger = logging.getLogger(__name__)


class Runtime:
    """A ring, its executor and its operators. `residency` says how long the executor stays:
    "leased", "resident", "stream", or "auto" to measure them now (docs/residency.md); raises
    UsageError for one that this device has not got.
    """

    def __init__(
        self,
        device: Device,
        *,
        target: JournalTarget | None = None,
        lanes: int = 1,
        slots: int = config.RING_SLOTS,
        residency: str = DEFAULT,
    ) -> None:
        if target is not None:
            target.check()
        self.device = device
        self._lanes = lanes
        # one installs, parks or closes at a time; submission takes no lock
        self._lock = threading.RLock()
        self._is_open = True
        self._park_count = 0
        self._stream_tasks: list[StreamTasks] = []
        with ExitStack() as undo:
            self.ring = undo.enter_context(closing(Ring(device, slots=slots)))
            self.operators = undo.enter_context(closing(OperatorTable(device, self.ring)))
            plan = plan_executor(device, self.ring, target, lanes, undo)
            first = DEFAULT if residency == AUTO else residency
            self.executor: Executor = device.executor(plan, first)
            # what the executor uses: given back once it is gone
            self._memory = undo.pop_all()
        self._finalizer = weakref.finalize(self, _abandon, self.executor)
        if residency == AUTO:
            try:
                choose(device, self.ring, self.executor)
            except BaseException:
                self.close()
                raise

    def install(
        self,
        name: str,
        source: HandlerSource,
        *,
        region_address: int = 0,
        self_test: Callable[[Image], None] | None = None,
    ) -> Operator:
        """Compile (or take from the cache), lint, prove and publish a handler; also the hot swap of
        an installed name.
        """
        image = self.device.build(source)
        if self_test is not None:
            self_test(image)
        return self.adopt(name, image, region_address=region_address)

    def register_operator(
        self,
        name: str,
        source: str,
        *,
        constants: Mapping[str, int] | None = None,
        self_test: Callable[[Trial], None] | None = None,
    ) -> Operator:
        """Make CUDA C++ of the caller's what compute tasks run (docs/operators.md); an operator of
        this name is replaced. Raises CompileError, HandlerRefused with the reasons, or what
        `self_test` raises, and then nothing has changed.
        """
        if not name.isidentifier():
            raise UsageError(f"{name!r} names no operator: use letters, digits and _")
        image = self.device.build(HandlerSource.of(name, constants, text=source))
        if self_test is not None:
            with closing(
                Trial(Runtime(self.device, lanes=self._lanes, slots=TRIAL_SLOTS))
            ) as trial:
                trial.prove(name, image, self_test)
        # beside the names of our own handlers, which nobody replaces by accident
        return self.adopt(f"own.{name}", image)

    def adopt(self, name: str, image: Image, *, region_address: int = 0) -> Operator:
        """Publish a handler that was built before."""
        with self._lock:
            self._require_open()
            return Swap(self).run(name, image, region_address=region_address)

    def submit(self, task: Task) -> Ticket:
        """Hand a task in; raises RingFull. Any thread."""
        self._require_working()
        ticket, needs_launch = self.ring.submit(task, self.executor.handle)
        if needs_launch:
            self.executor.launch()
        return ticket

    def submit_many(self, tasks: Sequence[Task]) -> list[Ticket]:
        """Hand in tasks without payloads, in this order, as many as there is room for; raises
        RingFull when there is none. Any thread.
        """
        self._require_working()
        tickets, needs_launch = self.ring.submit_many(tasks, self.executor.handle)
        if needs_launch:
            self.executor.launch()
        return tickets

    def order_after(self, stream: int) -> None:
        """Tasks handed in from now on run only after the work that is in this stream of the
        framework now. Waits for nothing; raises RingFull.
        """
        self._require_open()
        self.executor.launch_after(stream, self._submit_gate)

    def run_burst(self, enqueue: Callable[[Any], None]) -> Ticket:
        """What `enqueue` puts into the executor's stream runs before all tasks that are handed in
        from now on; the ticket is done once it has run. Waits for nothing; raises RingFull, and
        then `enqueue` was not called.
        """
        self._require_open()
        gates: list[Ticket] = []
        self.executor.launch_burst(enqueue, lambda at: gates.append(self._submit_gate(at)))
        return gates[0]

    def stream_tasks(self, stream: int, *, slots: int = config.STREAM_TASK_SLOTS) -> StreamTasks:
        """Tasks that run as work of this stream of the framework (a handle, 0 for the default one)
        and of the graphs that are replayed in it; less than `slots` of them wait. Residency
        `stream` only, else UsageError.
        """
        with self._lock:
            self._require_open()
            where = (self.device, self.executor, self.operators)
            made = StreamTasks(*where, stream=stream, slots=slots)
            self._stream_tasks.append(made)
            return made

    def _submit_gate(self, launch: int) -> Ticket:
        return self.ring.submit(Task(kind=abi.TASK_GATE, arg=launch), self.executor.handle)[0]

    def result(self, ticket: Ticket) -> Completion | None:
        """None while pending. Answers are kept for several laps of the ring."""
        self._require_open()
        return self.ring.result(ticket)

    def wait(self, ticket: Ticket, timeout_s: float = config.WAIT_TASK_S) -> Completion:
        """Wait for a task's answer; raises WaitTimeout, or why the executor was lost meanwhile."""
        self._require_open()
        until = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, until - time.monotonic())
            try:
                return self.ring.wait(ticket, min(left_s, config.WAIT_LOOK_S), said_s=timeout_s)
            except WaitTimeout:
                if self.executor.lost is not None:
                    raise self.executor.lost from None
                if left_s <= config.WAIT_LOOK_S:
                    raise

    def finish(self, ticket: Ticket, timeout_s: float = config.WAIT_TASK_S) -> None:
        """Wait until a task is done, however long ago that was; raises as `wait` does."""
        with suppress(AnswerForgotten):
            self.wait(ticket, timeout_s)

    def drain(self, timeout_s: float = config.WAIT_TASK_S) -> None:
        """Wait until everything handed in so far is done."""
        until = time.monotonic() + timeout_s
        try:
            ticket = when_room(partial(self.submit, Task()), until)
        except RingFull as error:
            raise WaitTimeout(f"the ring is still full after {timeout_s} s") from error
        self.wait(ticket, max(0.0, until - time.monotonic()))

    @contextmanager
    def parked(self) -> Iterator[None]:
        """The executor is out; what is handed in waits in the ring. A place of stream tasks that a
        framework's stream comes to meanwhile runs all the same: that is the framework's own work.
        Around calls of a framework or the driver that wait for the whole GPU (docs/residency.md
        lists them): beside a leased executor they are at most a lease late, beside a resident one
        RESIDENT_LEASE_NS. Raises WaitTimeout when a task does not end within WAIT_PARK_S. Nests.
        """
        with self._lock:
            self._require_open()
            if not self.executor.park(config.WAIT_PARK_S):
                raise WaitTimeout(
                    f"the executor did not leave within {config.WAIT_PARK_S} s: task "
                    f"{self.ring.load('head')} is still running"
                )
            self._park_count += 1
            try:
                with self.device.parked():
                    yield
            finally:
                self._park_count -= 1
                self.executor.unpark()

    @property
    def is_parked(self) -> bool:
        """Whether somebody keeps the executor out now."""
        return self._park_count > 0

    def stats(self) -> RuntimeStats:
        """Counters for metrics; cheap."""
        self._require_open()
        return RuntimeStats.read(self.ring, self.executor)

    def busy_ns(self) -> int:
        """Time spent in handlers so far; one load."""
        self._require_open()
        return self.ring.load("busy_ns")

    def close(self) -> None:
        """Run what was handed in, stop, give everything back. Raises WaitTimeout, with the memory
        kept, if a handler hangs.
        """
        with self._lock:
            if not self._is_open:
                return
            try:
                self.drain(config.WAIT_TASK_S)
            except (WaitTimeout, DeviceError) as error:
                logger.error("closing with tasks undone: %s", error)
            self._is_open = False
            self._finalizer.detach()
            with self.device.parked():
                self._release()

    def abandon(self) -> None:
        """Stop the executor if it can be stopped, and keep all memory: a task does not end."""
        self._is_open = False
        self._finalizer()

    def retire(self) -> None:
        """Stop for good and keep all memory and code: nodes of it lie in graphs that the framework
        goes on replaying. What they were handed in and is not running yet is never run; a node
        looks once and ends.
        """
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            self._finalizer.detach()
            for tasks in self._stream_tasks:
                tasks.retire()
            if not self.executor.park(config.WAIT_PARK_S):
                logger.error("the executor did not leave within %s s", config.WAIT_PARK_S)

    def _release(self) -> None:
        if not self.executor.close(config.WAIT_PARK_S):
            raise WaitTimeout(
                f"the executor did not leave within {config.WAIT_PARK_S} s: its memory is "
                "kept until the process ends"
            )
        for tasks in self._stream_tasks:
            tasks.close()
        self._memory.close()

    def _require_open(self) -> None:
        if not self._is_open:
            raise DeviceError("this runtime is closed")

    def _require_working(self) -> None:
        self._require_open()
        if self.executor.lost is not None:
            raise self.executor.lost


def _abandon(executor: Executor) -> None:
    """A runtime that nobody closed: stop its threads, keep its memory."""
    executor.close(config.WAIT_PARK_S)


__all__ = ["Completion", "Operator", "Runtime", "Task", "Ticket"]
