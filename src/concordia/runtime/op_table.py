"""The operator table, floor 3: which code an opcode means now.

Owns: the table's memory, the entries and the code that they name. Promises: an entry is never
changed while an executor may read it: a swap writes the opcode's other entry and flips one word;
code is unloaded only after the executor acknowledged a newer generation. Called by executor.py, one
thread at a time. Does not compile, and does not decide when to swap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from concordia import abi
from concordia.device.driver import Code, Device, Image, Publication
from concordia.device.memory import Buffer
from concordia.errors import DeviceError
from concordia.runtime.ring import Ring, Task

FIRST_OPCODE: Final = 1  # 0 means no operator, so that a zeroed task does nothing


@dataclass(frozen=True, slots=True)
class Operator:
    """A handler as installed: what tasks call it by, and which code that is."""

    name: str
    opcode: int
    generation: int
    digest: int

    def task(self, *, arg: int = 0, payload: bytes | None = None) -> Task:
        """A compute task of this operator with a word and some bytes. It runs what the operator is
        when it starts, whichever swap this value comes from.
        """
        return Task(opcode=self.opcode, kind=abi.TASK_COMPUTE, arg=arg, payload=payload)


@dataclass(slots=True)
class _Entry:
    operator: Operator
    code: Code
    place: int  # 0 or 1: which of the opcode's two entries


@dataclass(frozen=True, slots=True)
class Change:
    """An entry that is filled in and not published."""

    publication: Publication
    entry: _Entry


class OperatorTable:
    """One word per opcode, then two entries per opcode, in memory that the executor reads."""

    def __init__(self, device: Device, ring: Ring) -> None:
        self._device = device
        self._ring = ring
        self._buffer = Buffer(abi.OPERATOR_CAPACITY * (8 + 2 * abi.OPERATOR.size))
        self.address = device.share(self._buffer.address, self._buffer.size)
        self._entries: dict[str, _Entry] = {}
        self._retired: list[tuple[int, Code]] = []  # generation that replaced it, code
        self._generation = 0
        ring.store("operators", self._buffer.address)

    def find(self, name: str) -> Operator | None:
        entry = self._entries.get(name)
        return entry.operator if entry else None

    def prepare(self, name: str, image: Image, code: Code, *, region_address: int) -> Change:
        """Fill in an entry that no executor reads, to make `name` mean this code. What the last
        swap of it replaced must have been unloaded, or every executor been out since.
        """
        before = self._entries.get(name)
        if before is None and len(self._entries) + FIRST_OPCODE >= abi.OPERATOR_CAPACITY:
            raise DeviceError(f"{len(self._entries)} operators are installed: no room for {name}")
        opcode = before.operator.opcode if before else len(self._entries) + FIRST_OPCODE
        place = 1 - before.place if before else 0
        generation = self._generation + 1
        offset = abi.OPERATOR_CAPACITY * 8 + (2 * opcode + place) * abi.OPERATOR.size
        fields = abi.OPERATOR.offsets()
        for field, value in (
            ("function", code.address),
            ("region", region_address),
            ("handler_hash", image.digest),
        ):
            at = offset + fields[field]
            self._buffer.view[at : at + 8] = value.to_bytes(8, "little")
        at = offset + fields["generation"]
        self._buffer.view[at : at + 4] = (generation & 0xFFFFFFFF).to_bytes(4, "little")
        operator = Operator(name, opcode, generation, image.digest)
        return Change(
            Publication(opcode, self._buffer.address + offset, generation),
            _Entry(operator, code, place),
        )

    def publish(self, change: Change) -> None:
        """One word: from here on tasks run what the entry says. `note` comes next."""
        self._device.library.publish_operator(self._ring.address, *change.publication)

    def note(self, change: Change) -> Operator:
        """A change was published."""
        operator = change.entry.operator
        before = self._entries.get(operator.name)
        self._generation = operator.generation
        self._entries[operator.name] = change.entry
        if before is not None:
            self._retired.append((self._generation, before.code))
        return operator

    @property
    def has_retired(self) -> bool:
        """Whether code waits to be unloaded."""
        return bool(self._retired)

    @property
    def retired_count(self) -> int:
        """Pieces of code that wait to be unloaded."""
        return len(self._retired)

    def is_acknowledged(self) -> bool:
        """Whether every task that starts from now on runs the newest generation, and none older
        still runs.
        """
        return self._ring.load("generation_seen") >= self._generation

    def unload_retired(self) -> None:
        """Close replaced code; call only when acknowledged, or parked."""
        while self._retired:
            self._retired.pop()[1].close()

    def close(self) -> None:
        """Unload everything; the executor is gone."""
        for _, code in self._retired:
            code.close()
        for entry in self._entries.values():
            entry.code.close()
        self._retired.clear()
        self._entries.clear()
        self._device.unshare(self._buffer.address)
        self._buffer.close()
