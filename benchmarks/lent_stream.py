"""A stream of the journal without an owner: a pool in /dev/shm and one control page.

Owns: the file, and lending its segments. Promises: it is gone after `close`; until the pool was
lapped, `records` reads back what the device committed. Called by the GPU benchmarks.
"""

from __future__ import annotations

import os
import pathlib
from typing import Final

import numpy as np

from concordia import abi
from concordia.device.memory import JournalTarget, SharedFile
from concordia.journal.control import Control, Lent
from concordia.journal.record import Record
from concordia.journal.stream import StreamReader

SEGMENT_BYTES: Final = 64 << 20
SEGMENTS: Final = 48
STREAM: Final = 1
SALT: Final = 0x5EED_0000_0000_0001


class Stream:
    """Segments are lent again between measurements."""

    segment_bytes = SEGMENT_BYTES

    def __init__(self, *, segments: int = SEGMENTS) -> None:
        self.segments = segments
        self._path = pathlib.Path("/dev/shm") / f"concordia-bench-{os.getpid()}-{segments}"
        page = abi.STREAM_CONTROL.size
        self._file = SharedFile.create(self._path, page + segments * SEGMENT_BYTES)
        self._control = Control(self._file.view[:page], 0, self._file.address)
        self.pool_address = self._file.address + page
        self.restart()

    @property
    def view(self) -> memoryview:
        """The pool's bytes."""
        return self._file.view[abi.STREAM_CONTROL.size :]

    def restart(self) -> None:
        """As for a new writer."""
        words = np.zeros(1, dtype=abi.STREAM_CONTROL.dtype)
        words["stream"], words["state"] = STREAM, abi.STREAM_OPEN
        self._file.view[: words.nbytes] = words.tobytes()
        self._lent: list[Lent] = []
        self.refill()

    def target(self) -> JournalTarget:
        return JournalTarget(
            self.pool_address, self.segments * SEGMENT_BYTES, SEGMENT_BYTES, self._file.address
        )

    def refill(self) -> None:
        """Lend until all but the segment in use are lent, or as many as a stream may have."""
        ahead = min(self.segments, abi.LENT_CAPACITY) - 1
        while len(self._lent) < self._control.taken_count + ahead:
            ordinal = len(self._lent)
            lent = Lent(ordinal, ordinal % self.segments, SALT + ordinal)
            self._control.lend(lent)
            self._lent.append(lent)

    def records(self, count: int) -> list[Record]:
        """The first `count` records since `restart`; fewer where the device committed fewer."""
        reader = StreamReader(self, STREAM)
        for lent in self._lent:
            reader.lend(lent)
        return reader.read(count)

    def close(self) -> None:
        self._path.unlink()
        self._file.close()
