"""Tasks that run in the framework's own streams and graphs, floor 3.

Owns: a ring for one stream, and how often tasks were handed in to it. Promises: what is handed in
runs at the next `enqueue`d place that this stream comes to, or replays, afterwards, in this order,
and never before; no host takes part then; a task names an opcode, and what that means is read when
it runs. Made by Runtime.stream_tasks. Does not launch (device/stream_launch.py), and does not know
graphs: a place is captured because the stream that it is put into is.

  host      hand_in(A)             hand_in(B)
  stream s        | bell 1 | replay: work, place |   | bell 2 | replay: work, place |
  ring      gate 1, A ...          gate 2, B ...     a place passes gates up to its bell
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from concordia import abi, config
from concordia.device.driver import Device, Executor
from concordia.errors import DeviceError, WaitTimeout
from concordia.runtime.op_table import OperatorTable
from concordia.runtime.ring import Completion, Ring, Task, Ticket


class StreamTasks:
    """`enqueue` once, eagerly or while capturing; then `hand_in` before each run or replay."""

    def __init__(
        self,
        device: Device,
        executor: Executor,
        operators: OperatorTable,
        *,
        stream: int,
        slots: int,
    ) -> None:
        self._device, self._executor, self._stream = device, executor, stream
        self._lock = threading.Lock()  # a bell follows its gate
        self._ring = Ring(device, slots=slots)
        # Its runs end with what was handed in; only a lease of such tasks leaves some for later.
        self._ring.store("idle_ns", 0)
        self._ring.store("lease_ns", config.PLACE_LEASE_NS)
        self._ring.store("operators", operators.address)
        self._count = 0
        self._is_open = True
        try:
            self._launch = executor.stream_launch(self._ring.device_address)
        except BaseException:
            self._ring.close()
            raise

    def enqueue(self, captured: int | None = None) -> None:
        """Make this point of the stream a place where tasks run: one CTA, and later work of the
        stream waits for it. While the stream, or another one named `captured`, is being captured,
        the graph gets the place; it must be replayed in the stream of these tasks.
        """
        self._require_open()
        self._launch.enqueue(self._stream if captured is None else captured)

    def hand_in(self, tasks: Sequence[Task]) -> list[Ticket]:
        """Hand in tasks without payloads for the next place that the stream comes to, as many as
        there is room for; raises RingFull when there is none, UsageError while it is captured.
        """
        with self._lock:
            self._require_open()
            self._launch.check(self._stream)
            number = self._count + 1
            self._ring.submit(Task(kind=abi.TASK_GATE, arg=number), 0)
            self._count = number
            self._ring.store("launched", number)
            try:
                tickets, _ = self._ring.submit_many(tasks, 0)
            finally:
                self._launch.ring_bell(self._stream, number)  # the gate is in the ring in any case
            return tickets

    def capture_of(self, stream: int) -> int | None:
        """Which capture that stream is part of, by a number of its own; None for none."""
        self._require_open()
        return self._launch.capture_of(stream)

    @property
    def room(self) -> int:
        """How many tasks `hand_in` takes now."""
        self._require_open()
        used = self._ring.load("tail") - self._ring.load("head")
        return max(0, self._ring.slot_count - used - 1)  # the gate before them

    @property
    def busy_ns(self) -> int:
        """Time spent in handlers so far."""
        self._require_open()
        return self._ring.load("busy_ns")

    @property
    def pending_count(self) -> int:
        """How many of the calls of `hand_in` have not been served yet."""
        self._require_open()
        return self._count - self._ring.load("left")

    def result(self, ticket: Ticket) -> Completion | None:
        """What a task answered, None while its place has not run."""
        self._require_open()
        return self._ring.result(ticket)

    def wait(self, ticket: Ticket, timeout_s: float = config.WAIT_TASK_S) -> Completion:
        """Wait for the answer; raises WaitTimeout (was the graph replayed?), or why the executor
        was lost meanwhile.
        """
        self._require_open()
        try:
            return self._ring.wait(ticket, timeout_s)
        except WaitTimeout:
            if self._executor.lost is not None:
                raise self._executor.lost from None
            raise

    def close(self) -> None:
        """Give everything back. Graphs with a place of these tasks must not be replayed any more;
        what they were handed and did not run is dropped.
        """
        with self._lock, self._device.parked():
            if self._is_open:
                self._is_open = False
                self._launch.close()
                self._ring.close()

    def retire(self) -> None:
        """Take no more, run no more, and keep everything: graphs with a place of these tasks go on
        being replayed, and by then the memory that tasks name may be somebody else's.
        """
        with self._lock:
            self._is_open = False
            self._ring.store("stop", 1)

    def _require_open(self) -> None:
        if not self._is_open:
            raise DeviceError("these stream tasks are closed")
