"""The control words of one stream: what owner and writer tell each other, floor 3.

Owns: the words of a StreamControl. Promises: every store here is one aligned store in program
order, the word that publishes comes last, and on x86-64 (Board.create refuses other machines) no
reader sees that order broken; a damaged identity or seal is raised, never believed. Called by the
owner, which writes lines 0 and 1, and by readers. The lines of the executor are stored by compiled
code.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from concordia import abi
from concordia.errors import Corruption, JournalRefused
from concordia.journal import record

_PAGE: Final = abi.STREAM_CONTROL.size
_AT: Final = {name: at // 8 for name, at in abi.STREAM_CONTROL.offsets().items()}
_STATE: Final = abi.STREAM_CONTROL.offsets()["state"] // 4
_LABEL: Final = abi.STREAM_CONTROL.offsets()["label"]
_LINE0: Final = struct.Struct("<QIIQIIIIQQQQQQ")  # magic .. identity_crc
_IDENTITY_CRC: Final = abi.STREAM_CONTROL.offsets()["identity_crc"]


class Lent(NamedTuple):
    """One segment as it was lent to a stream."""

    ordinal: int
    segment: int
    salt: int


class Identity(NamedTuple):
    """Who writes a stream; constant from open to free."""

    stream: int
    writer_kind: int
    rank: int
    world: int
    writer_pid: int
    writer_start: int
    replica: int
    layout_hash: int


class Control:
    """One StreamControl. The owner writes lines 0, 1 and the entries; others only read."""

    def __init__(self, view: memoryview, slot: int, address: int) -> None:
        self.slot = slot
        self.address = address
        self._bytes = view
        self._words = view.cast("Q")
        self._halves = view.cast("I")

    @property
    def state(self) -> int:
        return self._halves[_STATE]

    @property
    def taken_count(self) -> int:
        return self._words[_AT["taken_count"]]

    @property
    def committed_count(self) -> int:
        return self._words[_AT["committed_count"]]

    @property
    def dropped_count(self) -> int:
        return self._words[_AT["dropped_count"]]

    @property
    def lent_count(self) -> int:
        return self._words[_AT["lent_count"]]

    @property
    def label(self) -> str:
        raw = bytes(self._bytes[_LABEL : _LABEL + abi.LINE_BYTES])
        return raw.rstrip(b"\0").decode("utf-8", "replace")

    def word(self, name: str) -> int:
        """Any other u64 of the structure."""
        return self._words[_AT[name]]

    def store(self, name: str, value: int) -> None:
        """One word, for whoever is its writer (the Python writer stores the executor's line)."""
        self._words[_AT[name]] = value

    def identity(self) -> Identity:
        """Who writes here; raises Corruption when the words are not what the owner wrote."""
        raw = bytes(self._bytes[: _LINE0.size])
        found = _LINE0.unpack(raw)
        if found[0] != abi.BOARD_MAGIC or found[13] != _identity_crc(raw):
            raise Corruption(f"the identity of stream slot {self.slot} is damaged: {found}")
        if found[1] != abi.ABI_VERSION:
            raise JournalRefused(
                f"stream slot {self.slot} has ABI {found[1]}, not {abi.ABI_VERSION}"
            )
        _, _, _, stream, kind, rank, world, pid, replica, layout, _, start, _, _ = found
        return Identity(stream, kind, rank, world, pid, start, replica, layout)

    def sealed_count(self) -> int:
        """Records that may be read; NOT_SEALED while open; raises Corruption for a damaged seal."""
        count = self._words[_AT["sealed_count"]]
        if count != abi.NOT_SEALED:
            wanted = abi.commit_word(self._words[_AT["stream"]], count)
            if self._words[_AT["seal_check"]] != wanted:
                raise Corruption(f"the seal of stream slot {self.slot} is damaged: {count}")
        return count

    def open(self, identity: Identity, label: str) -> None:
        """Owner: give the slot to a writer. State comes last: before it nobody reads the rest."""
        self._bytes[:] = bytes(_PAGE)
        name = label.encode("utf-8")[: abi.LINE_BYTES]
        self._bytes[_LABEL : _LABEL + len(name)] = name
        i = identity
        line = bytearray(
            _LINE0.pack(
                abi.BOARD_MAGIC, abi.ABI_VERSION, abi.STREAM_FREE, i.stream, i.writer_kind, i.rank,
                i.world, i.writer_pid, i.replica, i.layout_hash, abi.NOT_SEALED, i.writer_start, 0,
                0,
            )
        )  # fmt: skip
        struct.pack_into("<Q", line, _IDENTITY_CRC, _identity_crc(bytes(line)))
        self._bytes[: _LINE0.size] = line
        self._halves[_STATE] = abi.STREAM_OPEN

    def lend(self, lent: Lent) -> None:
        """Owner: the entry first, then the count that publishes it (the executor acquires the
        count).
        """
        at = _AT["lent"] + 2 * (lent.ordinal % abi.LENT_CAPACITY)
        self._words[at] = lent.segment | lent.ordinal << 32
        self._words[at + 1] = lent.salt
        self._words[_AT["lent_count"]] = lent.ordinal + 1

    def lent(self) -> list[Lent]:
        """The entries that are still on the board, oldest first."""
        count = self.lent_count
        found = []
        for ordinal in range(max(0, count - abi.LENT_CAPACITY), count):
            at = _AT["lent"] + 2 * (ordinal % abi.LENT_CAPACITY)
            entry = self._words[at]
            if entry >> 32 == ordinal & 0xFFFFFFFF:
                found.append(Lent(ordinal, entry & 0xFFFFFFFF, self._words[at + 1]))
        return found

    def retract(self) -> None:
        """Owner: take back what was lent and not taken; only once the writer is known to be
        dead.
        """
        self._words[_AT["lent_count"]] = min(self.lent_count, self.taken_count)

    def seal(self, count: int) -> None:
        """Owner: nothing from `count` on will ever be read. State comes last."""
        self._words[_AT["seal_check"]] = abi.commit_word(self._words[_AT["stream"]], count)
        self._words[_AT["sealed_count"]] = count
        self._halves[_STATE] = abi.STREAM_SEALED

    def free(self) -> None:
        """Owner: the stream has no segment left; its slot may serve another."""
        self._words[_AT["magic"]] = 0
        self._halves[_STATE] = abi.STREAM_FREE


def _identity_crc(line: bytes) -> int:
    """Over magic, version, stream .. layout_hash and writer_start; state and seal change later."""
    return record.crc32c(line[:12] + line[16:56] + line[64:72])
