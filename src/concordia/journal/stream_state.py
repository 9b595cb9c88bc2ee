"""One writer's stream as its owner keeps it, floor 3.

Owns: `Stream`: who writes, which segments it has, how far it was read, and whether more may come.
Promises: a value with one writer per word: lending adds segments, intake reads on and finds damage,
streams seals and takes segments back. It does nothing by itself.
"""

from __future__ import annotations

from concordia import config
from concordia.journal.control import Control, Identity
from concordia.journal.ledger import Source
from concordia.journal.pace import Pace, Peak
from concordia.journal.stream import End, StreamReader
from concordia.journal.writer import StreamWriter


class Stream:
    """One writer's stream."""

    def __init__(
        self, control: Control, identity: Identity, reader: StreamReader, source: Source
    ) -> None:
        self.control = control
        self.identity = identity
        self.reader = reader
        self.source = source
        self.segments: dict[int, int] = {
            entry.ordinal: entry.segment for entry in reader.lent.values()
        }
        self.node: int | None = None  # memory that its writer's device is near to, if it said so
        self.is_sealed = False
        self.is_released = False  # its writer is known to be dead, or is this process
        self.end = End.OPEN
        self.ahead = 1  # segments to keep lent beyond what was taken
        self.taken_seen = min(control.taken_count, control.lent_count)
        self.pace = Pace(config.PACE_S)  # of taking segments
        self.bursts = Peak()  # of that pace
        self.is_hasty = False  # it took several at once within PEAK_S
        self.short = 0  # segments that another such burst would not find
        self.dropped_seen = 0
        self.dropped_told = 0.0  # when
        self.hint_seen = -1
        self.late_since = 0.0  # since when the count is ahead of what can be read
        self.writer: StreamWriter | None = None  # the cleaner's own streams

    @property
    def is_read(self) -> bool:
        """Whether records may still come."""
        return not self.is_sealed and self.end is not End.CORRUPT and self.writer is None
