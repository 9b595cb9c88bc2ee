"""The words that a writer's host threads keep on its stream's control page, floor 4.

Owns: line 3 of a StreamControl (steps, heartbeat, lost requests) and reading the executor's
counters beside it. Promises: details are stored before the word that a detector polls, by compiled
ordered stores; without a control page everything here is a no-op, so that an unprotected engine
runs the same code. Base of Checkpointer. Reads no record.
"""

from __future__ import annotations

from dataclasses import dataclass

from concordia import abi
from concordia.device.host import HostLibrary


@dataclass(frozen=True, slots=True)
class StreamStats:
    """What a writer's control page says."""

    committed_count: int
    committed_bytes: int
    dropped_count: int
    unprotected_count: int


class StreamWords:
    """One writer's host words; one thread at a time announces steps."""

    def __init__(self, library: HostLibrary, control_address: int) -> None:
        self._library = library
        self._control = control_address  # 0: no stream

    def announce_step(self, step: int, tokens: int) -> None:
        """For the detector: step number `step`, from 1, starts now with so many tokens."""
        if self._control:
            self._library.announce_step(self._control, step, tokens)

    def step_done(self, step: int) -> None:
        """For the detector: the step ended."""
        if self._control:
            self._library.step_done(self._control, step)

    def heartbeat(self, waiting_count: int = 0) -> None:
        """For the detector: this process lives, and so many requests wait to be scheduled."""
        if self._control:
            self._library.heartbeat(self._control, waiting_count)

    def count_unprotected(self, count: int = 1) -> None:
        """So many more requests of this writer lost protection."""
        if self._control:
            self._library.count_unprotected(self._control, count)

    def stream_stats(self) -> StreamStats:
        """Counters of the stream, all zero without one."""
        if not self._control:
            return StreamStats(0, 0, 0, 0)
        offsets = abi.STREAM_CONTROL.offsets()

        def word(name: str) -> int:
            return int(self._library.load(self._control + offsets[name]))

        return StreamStats(
            committed_count=word("committed_count"),
            committed_bytes=word("committed_bytes"),
            dropped_count=word("dropped_count"),
            unprotected_count=word("unprotected_count"),
        )
