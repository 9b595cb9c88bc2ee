"""A journal that a handler under test may write to, floor 4.

Owns: one lent segment with a control page of its own, in memory of this process. Promises: it is
the journal of nobody, and what it says of a record was read from the bytes that were written.
Called by handler.py and record_proof.py. Does not judge a record.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from concordia import abi
from concordia.device.memory import Buffer, JournalTarget
from concordia.errors import HandlerRefused
from concordia.journal.record import record_bytes


class ScratchJournal:
    """Room for records with payloads of just these sizes, in this order."""

    def __init__(self, sizes: Sequence[int]) -> None:
        starts = [abi.SEGMENT_HEADER.size]
        for size in sizes:
            starts.append(starts[-1] + record_bytes(size))
        self._sizes, self._starts = tuple(sizes), starts
        self._salt = secrets.randbits(63)
        self.pool = Buffer(-(-starts[-1] // abi.LEAF_BYTES) * abi.LEAF_BYTES)
        self._control = Buffer(abi.STREAM_CONTROL.size)
        words = np.zeros(1, dtype=abi.STREAM_CONTROL.dtype)
        words["state"] = abi.STREAM_OPEN
        words["lent"][0, 1] = self._salt
        words["lent_count"] = 1
        self._control.view[:] = words.tobytes()

    @property
    def target(self) -> JournalTarget:
        """What an executor is opened with."""
        return JournalTarget(
            self.pool.address, self.pool.size, self.pool.size, self._control.address
        )

    @property
    def committed_count(self) -> int:
        """Records that the writer says it has committed."""
        at = abi.STREAM_CONTROL.offsets()["committed_count"]
        return int.from_bytes(self._control.view[at : at + 8], "little")

    def header(self, index: int) -> np.void:
        """Header of a record, as numpy's structure."""
        start = self._starts[index]
        raw = bytes(self.pool.view[start : start + abi.RECORD_HEADER.size])
        found: np.void = np.frombuffer(raw, abi.RECORD_HEADER.dtype)[0]
        return found

    def payload(self, index: int) -> bytes:
        """Payload of a record; HandlerRefused when its commit word is not there."""
        size, end = self._sizes[index], self._starts[index + 1] - abi.LINE_BYTES
        word = int.from_bytes(self.pool.view[end : end + 8], "little")
        if word != abi.commit_word(self._salt, index):
            raise HandlerRefused(f"record {index} of {size} bytes has no commit word behind it")
        start = self._starts[index] + abi.RECORD_HEADER.size
        return bytes(self.pool.view[start : start + size])

    def close(self) -> None:
        """No executor writes here any more."""
        self.pool.close()
        self._control.close()
