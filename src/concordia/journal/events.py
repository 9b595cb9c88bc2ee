"""What happened, as the owner of a journal keeps it for whoever asks, floor 3.

Owns: the events of all streams and of the owner itself, numbered in the order in which they were
taken in. Promises: at most JOURNAL_EVENTS_MAX are kept, the oldest go; an event record that is not
an object becomes an event that says so. Called by replay, which finds the records, by the rooms of
the owner, which have something to say, and by office. It does not judge what an event means.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from typing import Any

from concordia import config
from concordia.journal.ledger import Source
from concordia.journal.record import Record


class Events:
    """Events and their numbers, from 1."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, dict[str, Any]]] = deque(maxlen=config.JOURNAL_EVENTS_MAX)
        self.count = 0  # of all there ever were

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return iter(self._kept)

    def note(self, event: dict[str, Any]) -> None:
        """Something that the owner itself has to say."""
        self.count += 1
        self._kept.append((self.count, event))

    def take(self, record: Record, source: Source, view: memoryview) -> dict[str, Any]:
        """An event that a stream has; returns it as it is kept."""
        raw = bytes(view[record.payload_offset : record.payload_offset + record.payload_bytes])
        try:
            event = json.loads(raw)
            if not isinstance(event, dict):
                raise ValueError("not an object")
        except ValueError as error:
            event = {"event": "malformed", "reason": str(error)}
        event["record"] = f"{source.stream:x}:{record.sequence}"
        self.note(event)
        return event
