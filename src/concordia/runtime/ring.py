"""The ring as host threads see it, floor 3.

Owns: the ring's memory (header, slots, completions, arena) and turning a Task into a slot and a
completion into a value. Promises: all ordered stores are in compiled code (kernels/ring.h), never
here; `submit` takes microseconds, never waits and may be called by any thread; a full ring raises.
Called by executor.py. Does not know what operators do, and does not send the executor in.
"""

from __future__ import annotations

import ctypes
import struct
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, NewType, TypeVar

from concordia import abi, config
from concordia.device.driver import Device
from concordia.device.memory import Buffer
from concordia.errors import AnswerForgotten, DeviceError, RingFull, UsageError, WaitTimeout

T = TypeVar("T")
Ticket = NewType("Ticket", int)  # position of a task in its ring

WORD_MASK: Final = (1 << 64) - 1

# abi.TASK from its second word on is what a caller fills; publish, span and stamp are the compiled
# code's.
_TASK: Final = struct.Struct("<QIIIIQQQIIQIIQQQQQI4xQ")
_COMPLETION: Final = struct.Struct("<QIIQQQQ16x")

ROOM_LOOK_S: Final = 0.001

_SUBMITTED, _NEEDS_LAUNCH, _FULL, _TOO_LARGE = range(4)
_PENDING, _DONE, _FORGOTTEN = range(3)


class Task(NamedTuple):
    """What one slot says (a tuple: a frozen dataclass takes a microsecond longer to make). `blocks`
    and `payload` are copied into the ring's arena; `source` names bytes that lie elsewhere.
    """

    opcode: int = 0
    kind: int = abi.TASK_NOOP
    region: int = 0
    record_kind: int = 0
    key: int = 0
    incarnation: int = 0
    token_start: int = 0
    token_end: int = 0
    blocks: Sequence[int] = ()
    payload: bytes | None = None
    source: int = 0
    source_bytes: int = 0
    flags: int = 0
    step: int = 0
    arg: int = 0
    model_hash: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """What a task answered; `sequence` is that of the record it committed, None when it committed
    none.
    """

    status: int
    generation: int
    sequence: int | None
    payload_hash: int
    result: int

    @property
    def is_ok(self) -> bool:
        return self.status == abi.STATUS_OK


def pack_task(task: Task) -> tuple[bytes, bytes]:
    """A task as a producer hands it in, and its block ids; raises UsageError when a number does not
    fit.
    """
    try:
        ids = array("I", task.blocks).tobytes()
        filled = _TASK.pack(
            *(0, task.opcode, task.kind, task.region, task.record_kind),
            *(task.key & WORD_MASK, task.key >> 64, task.incarnation),
            *(task.token_start, task.token_end, 0, len(task.blocks), task.flags),
            *(task.source, task.source_bytes, task.step, 0, task.arg, 0, task.model_hash),
        )
    except (struct.error, OverflowError, TypeError) as error:
        raise UsageError(f"a number does not fit its place in a task: {error}: {task}") from error
    return filled, ids


class Ring:
    """One ring, for the host threads of one process."""

    def __init__(
        self,
        device: Device,
        *,
        slots: int = config.RING_SLOTS,
    ) -> None:
        arena_bytes = config.RING_ARENA_BYTES // config.RING_SLOTS * slots
        if slots < 4 or slots & (slots - 1) or arena_bytes % (slots * abi.LINE_BYTES):
            raise UsageError(
                f"{slots} slots, {arena_bytes} bytes: want a power of two, and whole lines of "
                "arena per slot"
            )
        self._library = device.library
        self._device = device
        self.slot_count = slots
        completions = slots * config.COMPLETION_LAPS
        at_slots = abi.RING_HEADER.size
        at_completions = at_slots + slots * abi.TASK.size
        at_arena = -(-(at_completions + completions * abi.COMPLETION.size) // 4096) * 4096
        self._buffer = Buffer(at_arena + arena_bytes)
        self.address = self._buffer.address  # of the header, for this process
        self.device_address = device.share(self.address, self._buffer.size)
        if self.device_address != self.address:
            # Slots name arena bytes and the table by one address for both sides.
            raise DeviceError("this device sees host memory at other addresses than the host does")
        self._words = abi.RING_HEADER.offsets()
        for name, value in (
            ("slot_count", slots),
            ("slots", self.address + at_slots),
            ("completions", self.address + at_completions),
            ("completion_count", completions),
            ("arena", self.address + at_arena),
            ("arena_bytes", arena_bytes),
            ("lease_ns", config.LEASE_NS),
            ("idle_ns", device.idle_ns),
        ):
            self.store(name, value)

    def load(self, name: str) -> int:
        """One word of the header."""
        return int(self._library.load(self.address + self._words[name]))

    def store(self, name: str, value: int) -> None:
        """One word of the header that is the host's to write."""
        self._library.store(self.address + self._words[name], value)

    def submit(self, task: Task, handle: int) -> tuple[Ticket, bool]:
        """Hand a task in; True when the executor has to be launched (never with a handle that does
        so itself).
        """
        filled, ids = pack_task(task)
        payload = task.payload
        position = ctypes.c_uint64()
        said = self._library.submit(
            self.address,
            handle,
            filled,
            ids,
            len(task.blocks),
            payload,
            0 if payload is None else len(payload),
            ctypes.byref(position),
        )
        self._refuse(said, task)
        return Ticket(position.value), said == _NEEDS_LAUNCH

    def _refuse(self, said: int, task: Task) -> None:
        if said == _FULL:
            raise RingFull(
                f"{self.slot_count} slots of the ring are taken: task {task.opcode} was not "
                "handed in"
            )
        if said == _TOO_LARGE:
            size = 0 if task.payload is None else len(task.payload)
            raise UsageError(
                f"{len(task.blocks)} blocks and {size} bytes do not fit half the ring's arena"
            )

    def submit_many(self, tasks: Sequence[Task], handle: int) -> tuple[list[Ticket], bool]:
        """Hand in tasks without payloads, as many as there is room for; raises RingFull when not
        even the first has.

        One call for all of them, so that the executor finds them together.
        """
        assert all(task.payload is None for task in tasks), "payloads go one by one"
        packed = [pack_task(task) for task in tasks]
        filled = b"".join(part for part, _ in packed)
        ids = b"".join(part for _, part in packed)
        positions, count = (ctypes.c_uint64 * len(tasks))(), ctypes.c_uint64()
        said = self._library.submit_many(
            *(self.address, handle, filled, ids, len(tasks), positions, ctypes.byref(count))
        )
        if count.value == 0 and tasks:
            self._refuse(said, tasks[0])
        return [Ticket(position) for position in positions[: count.value]], said == _NEEDS_LAUNCH

    def result(self, ticket: Ticket) -> Completion | None:
        """What a task answered, None while it is pending."""
        found = ctypes.create_string_buffer(abi.COMPLETION.size)
        return self._completion(self._library.read(self.address, ticket, found), ticket, found)

    def wait(self, ticket: Ticket, timeout_s: float, *, said_s: float | None = None) -> Completion:
        """The same after waiting for it, outside the interpreter's lock; `said_s` is what the whole
        wait was given.
        """
        found = ctypes.create_string_buffer(abi.COMPLETION.size)
        said = self._library.wait(self.address, ticket, max(0, int(timeout_s * 1e9)), found)
        done = self._completion(said, ticket, found)
        if done is None:
            raise WaitTimeout(
                f"task {ticket} is not done after {timeout_s if said_s is None else said_s} s: "
                f"{self.load('head')} of {self.load('tail')} are, "
                f"heartbeat {self.load('heartbeat')}, launch {self.load('launched')}, left "
                f"{self.load('left')}"
            )
        return done

    def _completion(
        self, said: int, ticket: Ticket, found: ctypes.Array[ctypes.c_char]
    ) -> Completion | None:
        if said == _PENDING:
            return None
        if said == _FORGOTTEN:
            raise AnswerForgotten(
                f"task {ticket} was done long ago: its answer is kept for "
                f"{config.COMPLETION_LAPS - 1} laps of {self.slot_count} tasks"
            )
        _, status, generation, sequence, low, high, result = _COMPLETION.unpack(found.raw)
        return Completion(
            status,
            generation,
            None if sequence == abi.NOT_SEALED else sequence,
            high << 64 | low,
            result,
        )

    def close(self) -> None:
        """Give the memory back; the executor is gone."""
        self._device.unshare(self.address)
        self._buffer.close()


def when_room(hand_in: Callable[[], T], until: float) -> T:
    """Its answer once the ring has room, which appends may take for a while; raises RingFull when
    they still do at `until`.
    """
    while True:
        try:
            return hand_in()
        except RingFull:
            if time.monotonic() > until:
                raise
            time.sleep(ROOM_LOOK_S)
