"""Which records are still wanted, and in which segment they lie, floor 3.

Owns: `Held`, a record that somebody wants, and the count of wanted bytes per segment. Promises: a
record is live exactly while its use count is above zero; a segment without live records may be
given back without losing anything. Called by the replay index (which knows who wants what) and the
cleaner (which empties segments). It does not know streams, requests or why a record is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

from concordia.journal.record import Record


@dataclass(slots=True)
class Source:
    """The stream that a record came from, as the board names it."""

    stream: int
    writer_kind: int
    rank: int
    world: int
    replica: int
    layout_hash: int
    is_final: bool = False  # sealed or closed: nothing will be added


class Held:
    """One wanted record."""

    __slots__ = ("record", "source", "uses")

    def __init__(self, record: Record, source: Source) -> None:
        self.record = record
        self.source = source
        self.uses = 0

    @property
    def replica(self) -> int:
        """Whose bytes these are."""
        return self.record.origin or self.source.replica

    @property
    def group(self) -> tuple[int, int]:
        """Layout and world: pieces of one cut share both. The stream's layout rules when it names
        one.
        """
        return self.source.layout_hash or self.record.layout_hash, self.source.world


class Ledger:
    """Live records by segment and offset."""

    def __init__(self, segment_bytes: int) -> None:
        self._segment_bytes = segment_bytes
        self._segments: dict[int, dict[int, Held]] = {}
        self._bytes: dict[int, int] = {}

    def use(self, held: Held) -> None:
        """One more reason to keep the record."""
        held.uses += 1
        if held.uses == 1:
            segment = held.record.offset // self._segment_bytes
            self._segments.setdefault(segment, {})[held.record.offset] = held
            self._bytes[segment] = self._bytes.get(segment, 0) + _size(held)

    def release(self, held: Held) -> None:
        """One reason less; at zero the record is dead."""
        held.uses -= 1
        assert held.uses >= 0, f"record {held.record.sequence} released more often than used"
        if held.uses == 0:
            self._remove(held)

    def move(self, held: Held, record: Record, source: Source) -> None:
        """The cleaner has written the same record elsewhere: all its users follow."""
        self._remove(held)
        held.record, held.source = record, source
        segment = record.offset // self._segment_bytes
        self._segments.setdefault(segment, {})[record.offset] = held
        self._bytes[segment] = self._bytes.get(segment, 0) + _size(held)

    def live(self, segment: int) -> list[Held]:
        """Live records of a segment in the order of their places."""
        found = self._segments.get(segment, {})
        return [found[offset] for offset in sorted(found)]

    def first(self, segment: int) -> Held:
        """Some live record of a segment that has one."""
        return next(iter(self._segments[segment].values()))

    def live_bytes(self, segment: int | None = None) -> int:
        """Bytes of live records in one segment, or in all."""
        return sum(self._bytes.values()) if segment is None else self._bytes.get(segment, 0)

    def _remove(self, held: Held) -> None:
        segment = held.record.offset // self._segment_bytes
        records = self._segments[segment]
        del records[held.record.offset]
        self._bytes[segment] -= _size(held)
        if not records:
            del self._segments[segment], self._bytes[segment]


def _size(held: Held) -> int:
    return held.record.end_offset - held.record.offset
