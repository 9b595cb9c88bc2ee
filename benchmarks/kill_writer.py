"""A writer that appends without pause until it is killed, and what it must have written.

Owns: the workloads (a record is derived from a seed and its number, by the writer's handlers and by
plain numpy alike), the ledger in which the writer notes what was acknowledged before it goes on,
and the loop that appends. Promises: the loop ends by itself after WRITER_S, whoever is left. Called
by kill_rounds.py: `write` in a forked child, everything else in the process that judges, which
never uses CUDA.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import traceback
from collections import deque
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import KvGeometry, Plane
from concordia.device.memory import JournalTarget
from concordia.journal import segment
from concordia.journal.folder import Folder
from concordia.runtime.ring import Ticket

WRITER_S: Final = 120  # a round takes seconds; a writer that nobody kills goes after this
NOTES_MAX: Final = 1 << 15  # acknowledgements of one round; then the writer stops appending
STARTING, APPENDING, STOPPED, FAILED = range(4)

_NOTE: Final = struct.Struct("<QQQQ")  # sequence, number, payload hash low and high
_HEAD_BYTES: Final = 4096  # three words, then what went wrong as text
_PHASE, _SUBMITTED, _ACKNOWLEDGED = range(3)
_TEXT_AT: Final = 64


class Note(NamedTuple):
    """One acknowledged record."""

    sequence: int
    number: int
    payload_hash: int


class Ledger:
    """Memory that writer and judge share. Every word has one writer, the child."""

    def __init__(self) -> None:
        self._bytes = mmap.mmap(-1, _HEAD_BYTES + NOTES_MAX * _NOTE.size)
        self._words = memoryview(self._bytes)[:_TEXT_AT].cast("Q")

    @property
    def phase(self) -> int:
        return self._words[_PHASE]

    @property
    def submitted(self) -> int:
        return self._words[_SUBMITTED]

    @property
    def acknowledged(self) -> int:
        return self._words[_ACKNOWLEDGED]

    @property
    def reason(self) -> str:
        """What the child said when it failed."""
        return self._bytes[_TEXT_AT:_HEAD_BYTES].rstrip(b"\0").decode("utf-8", "replace")

    def notes(self, count: int) -> list[Note]:
        """The first `count` acknowledgements."""
        raw = self._bytes[_HEAD_BYTES : _HEAD_BYTES + count * _NOTE.size]
        return [Note(s, n, high << 64 | low) for s, n, low, high in _NOTE.iter_unpack(raw)]

    def enter(self, phase: int) -> None:
        self._words[_PHASE] = phase

    def submit(self, count: int) -> None:
        self._words[_SUBMITTED] = count

    def acknowledge(self, note: Note) -> None:
        """The entry first, then the count: one aligned store each, in program order on x86-64."""
        count = self.acknowledged
        low = note.payload_hash & (1 << 64) - 1
        at = _HEAD_BYTES + count * _NOTE.size
        _NOTE.pack_into(self._bytes, at, note.sequence, note.number, low, note.payload_hash >> 64)
        self._words[_ACKNOWLEDGED] = count + 1

    def fail(self, reason: str) -> None:
        text = reason.encode()[-(_HEAD_BYTES - _TEXT_AT) :]
        self._bytes[_TEXT_AT : _TEXT_AT + len(text)] = text
        self.enter(FAILED)

    def close(self) -> None:
        self._words.release()
        self._bytes.close()


class Workload(Protocol):
    """Records by number; `names` are the kind and token range that a record's header carries."""

    def open(self, checkpointer: Checkpointer) -> None: ...
    def append(self, checkpointer: Checkpointer, number: int) -> Ticket: ...
    def names(self, number: int) -> tuple[int, int, int]: ...
    def payload(self, number: int) -> bytes: ...


class KvRecords:
    """Tails of 1 to 24 tokens of a paged cache in device memory: 4 to 96 KiB each, any blocks."""

    shape = KvGeometry(
        layers=4, block_count=12, block_tokens=16, block_bytes=16384, heads=4, head_dim_key=64,
        head_dim_value=64, element_bytes=2, key=Plane(0, 128, 512, 2),
        value=Plane(8192, 128, 512, 2), dtype="bytes", instruction_set="any",
    )  # fmt: skip

    def __init__(self, seed: int) -> None:
        self._seed = seed
        shape = self.shape
        generator = np.random.default_rng(seed)
        size = (shape.layers, shape.block_count, 2, shape.block_tokens, shape.heads, 128)
        self._cache = generator.integers(0, 256, size, dtype=np.uint8)
        # a record's order: layer, K then V, head, token
        self._rows = np.ascontiguousarray(self._cache.transpose(0, 2, 4, 1, 3, 5))

    def open(self, checkpointer: Checkpointer) -> None:
        addresses = []
        for layer in self._cache:
            addresses.append(checkpointer.device.allocate(layer.nbytes))
            checkpointer.device.write(addresses[-1], layer.tobytes())
        self._region = checkpointer.register_kv(self.shape, addresses)

    def append(self, checkpointer: Checkpointer, number: int) -> Ticket:
        kind, start, end = self.names(number)
        return checkpointer.append_kv(
            self._region, kind=kind, key=number, incarnation=1, token_start=start, token_end=end,
            blocks=self._blocks(number, start, end), step=number,
        )  # fmt: skip

    def names(self, number: int) -> tuple[int, int, int]:
        chosen = random.Random(f"{self._seed} {number}")
        start = chosen.randrange(100)
        return abi.KIND_KV_TAIL, start, start + chosen.randint(1, 24)

    def payload(self, number: int) -> bytes:
        _, start, end = self.names(number)
        tokens = np.arange(start, end)
        size = self.shape.block_tokens
        blocks = np.array(self._blocks(number, start, end))[tokens // size - start // size]
        return self._rows[:, :, :, blocks, tokens % size].tobytes()

    def _blocks(self, number: int, start: int, end: int) -> list[int]:
        size = self.shape.block_tokens
        count = (end - 1) // size - start // size + 1
        return random.Random(f"blocks {self._seed} {number}").sample(range(12), count)


class ByteRecords:
    """The caller's bytes, 0 to 40,000 of them."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def open(self, checkpointer: Checkpointer) -> None:
        """Nothing to register."""

    def append(self, checkpointer: Checkpointer, number: int) -> Ticket:
        kind, start, end = self.names(number)
        return checkpointer.append_bytes(
            self.payload(number), kind=kind, key=number, incarnation=1, token_start=start,
            token_end=end, step=number,
        )  # fmt: skip

    def names(self, number: int) -> tuple[int, int, int]:
        return abi.KIND_KV_TAIL, number, number + 1

    def payload(self, number: int) -> bytes:
        chosen = random.Random(f"{self._seed} {number}")
        return chosen.randbytes(chosen.choice((0, 1, 127, 4096, chosen.randrange(40_000))))


class PageRecords:
    """1 to 12 named pages of 4 KiB of opaque device memory."""

    pages = 64

    def __init__(self, seed: int) -> None:
        self._seed = seed
        shape = (self.pages, abi.LEAF_BYTES)
        self._memory = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    def open(self, checkpointer: Checkpointer) -> None:
        size = self._memory.nbytes
        address = checkpointer.device.allocate(size)
        checkpointer.device.write(address, self._memory.tobytes())
        self._region = checkpointer.register_pages(address, size=size, page_bytes=abi.LEAF_BYTES)

    def append(self, checkpointer: Checkpointer, number: int) -> Ticket:
        return checkpointer.append_pages(
            self._region, self._chosen(number), key=number, incarnation=1, step=number
        )

    def names(self, number: int) -> tuple[int, int, int]:
        return abi.KIND_PAGE, 0, len(self._chosen(number))

    def payload(self, number: int) -> bytes:
        chosen = self._chosen(number)
        numbers = np.zeros(abi.LEAF_BYTES // 4, "<u4")
        numbers[: len(chosen)] = chosen
        return numbers.tobytes() + self._memory[chosen].tobytes()

    def _chosen(self, number: int) -> list[int]:
        chosen = random.Random(f"{self._seed} {number}")
        return chosen.sample(range(self.pages), chosen.randint(1, 12))


WORKLOADS: Final[dict[str, type[KvRecords | ByteRecords | PageRecords]]] = {
    "kv": KvRecords,
    "bytes": ByteRecords,
    "pages": PageRecords,
}


def write(
    journal: Path, slot: int, *, workload: Workload, device: str, lanes: int, depth: int,
    ledger: Ledger,
) -> None:  # fmt: skip
    """The child's whole life: append to the stream of this slot, `depth` records under way at any
    time; never returns.
    """
    signal.alarm(WRITER_S)
    try:
        pool, board = segment.attach(Folder(journal), writable=True)
        target = JournalTarget(
            pool.mapping.address, pool.mapping.size, pool.segment_bytes, board.control(slot).address
        )
        checkpointer = Checkpointer.open(device, target, lanes=lanes)
        workload.open(checkpointer)
        _append(checkpointer, workload, depth=depth, ledger=ledger)
        ledger.enter(STOPPED)
        signal.pause()
    except BaseException:  # whatever it was, the judge reads it
        ledger.fail(traceback.format_exc())
    finally:
        os._exit(1)


def _append(checkpointer: Checkpointer, workload: Workload, *, depth: int, ledger: Ledger) -> None:
    """Until the journal or the ledger is full."""
    pending: deque[tuple[int, Ticket]] = deque()
    number = 0
    is_full = False
    while pending or not is_full:
        while not is_full and len(pending) < depth:
            ledger.submit(number + 1)
            pending.append((number, workload.append(checkpointer, number)))
            number += 1
        at, ticket = pending.popleft()
        done = checkpointer.wait(ticket)
        if done.sequence is not None and done.is_ok:
            ledger.acknowledge(Note(done.sequence, at, done.payload_hash))
            if ledger.phase == STARTING:
                ledger.enter(APPENDING)
        elif done.status != abi.STATUS_JOURNAL_FULL:
            raise AssertionError(f"record {at} was answered with {done}")
        is_full = is_full or not done.is_ok or ledger.acknowledged + depth >= NOTES_MAX
