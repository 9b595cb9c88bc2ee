"""What lies in a journal that nobody answers for: its streams, read from board and segments alone,
floor 3.

Owns: finding the segments of every stream after its owner died, and reading a journal from outside.
Promises: believes no word without its check (identity, seal, segment header, lending); what is
damaged is reported in `Survey.damage`, never guessed. Called by an owner that adopts, and by
inspect, verify and export. It changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from concordia import abi, config
from concordia.errors import Corruption
from concordia.journal.control import Control, Identity, Lent
from concordia.journal.ledger import Source
from concordia.journal.record import Record
from concordia.journal.segment import Board, Pool
from concordia.journal.stream import End, StreamReader

_ROUNDS: Final = 3


@dataclass(slots=True, eq=False)
class Found:
    """One stream, and what can be read of it."""

    control: Control
    identity: Identity
    reader: StreamReader
    source: Source
    taken_count: int  # segments that the writer has begun to use
    sealed_count: int  # NOT_SEALED while open
    records: list[Record] = field(default_factory=list)
    end: End = End.OPEN
    damage: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Survey:
    """Every stream, the segments that nobody has, and what is damaged beyond a stream."""

    streams: list[Found] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    blocked_slots: set[int] = field(default_factory=set)  # damaged: a writer may still use them


def survey(pool: Pool, board: Board) -> Survey:
    """Read everything. Streams of dead writers count as open until somebody seals them."""
    seen = Survey()
    blocked: set[int] = set()  # segments of damaged streams: neither read nor used again
    for control in board.in_use():
        try:
            found = _look_at(pool, control)
        except Corruption as error:
            seen.damage.append(str(error))
            seen.blocked_slots.add(control.slot)
            blocked |= {entry.segment for entry in control.lent()}
            continue
        if found is not None:
            seen.streams.append(found)
    by_stream = {found.identity.stream: found for found in seen.streams}
    lent: dict[int, list[tuple[Found, Lent]]] = {}
    for found in seen.streams:
        for entry in found.control.lent():
            lent.setdefault(entry.segment, []).append((found, entry))
    for segment in range(pool.segment_count):
        if segment not in blocked:
            _place(pool, segment, lent.get(segment, []), by_stream, seen)
    for found in seen.streams:
        _read(found)
    return seen


def source_of(identity: Identity) -> Source:
    """What the index wants to know of a stream."""
    return Source(
        identity.stream,
        identity.writer_kind,
        identity.rank,
        identity.world,
        identity.replica,
        identity.layout_hash,
    )


def _look_at(pool: Pool, control: Control) -> Found | None:
    identity = control.identity()
    state = control.state
    if state == abi.STREAM_FREE:
        if control.lent_count:
            raise Corruption(f"stream slot {control.slot} says free and has segments")
        return None  # its owner died while it opened the slot: nobody writes there
    if state not in (abi.STREAM_OPEN, abi.STREAM_SEALED):
        raise Corruption(f"stream slot {control.slot} has state {state}")
    sealed = control.sealed_count()
    if state == abi.STREAM_SEALED and sealed == abi.NOT_SEALED:
        raise Corruption(f"stream slot {control.slot} is sealed at no record")
    reader = StreamReader(pool, identity.stream)
    found = Found(control, identity, reader, source_of(identity), control.taken_count, sealed)
    lent = {entry.ordinal: entry for entry in control.lent()}
    last = lent.get(found.taken_count - 1)
    start = pool.start(last.segment) if last and last.segment < pool.segment_count else None
    is_last_there = start is not None and start.stream == identity.stream
    if state == abi.STREAM_OPEN and found.taken_count and not is_last_there:
        # The segment that is being written is never taken back, so the count is not to be believed.
        found.damage.append(
            f"stream slot {control.slot}: no segment is its {found.taken_count - 1}th"
        )
        found.taken_count = 0
    return found


def _place(
    pool: Pool,
    segment: int,
    lent: list[tuple[Found, Lent]],
    by_stream: dict[int, Found],
    seen: Survey,
) -> None:
    """Find out whose a segment is.

    A segment is marked free before it is lent, so one that was lent and not taken is marked free.
    One that was taken has the header of its borrower, until the owner takes it back: then it is
    marked free again, or lent to the next. Anything else is damage.
    """
    waiting = [(found, entry) for found, entry in lent if entry.ordinal >= found.taken_count]
    start = pool.start(segment)
    if start is not None:
        writer = by_stream.get(start.stream)
        for found, entry in waiting:
            if (found, entry.ordinal, entry.salt) != (writer, start.ordinal, start.salt):
                found.damage.append(f"segment {segment} is not what was lent as {entry.ordinal}")
        if writer is not None and start.ordinal < writer.control.lent_count:
            writer.reader.lend(Lent(start.ordinal, segment, start.salt))
        elif not waiting and not seen.blocked_slots:
            seen.free.append(segment)  # its stream is gone
        return
    for found, entry in waiting:
        found.reader.lent.setdefault(entry.ordinal, entry)
    if waiting:
        return
    if pool.is_marked_free(segment):
        seen.free.append(segment)
    else:
        seen.damage.append(f"the header of segment {segment} is damaged")


def _read(found: Found) -> None:
    """All records below the seal, over gaps of segments that were given back."""
    sealed, reader = found.sealed_count, found.reader
    name = f"stream {found.identity.stream:#x} ({found.control.label})"
    for _ in range(_ROUNDS):
        hint = found.control.committed_count
        _read_all(found)
        if sealed != abi.NOT_SEALED:
            break
        found.end = reader.classify(hint, is_final=True)
        if found.end is not End.CORRUPT:
            break  # otherwise look again: a writer that lives may have appended while we searched
    if sealed == abi.NOT_SEALED:
        if found.end is End.CORRUPT:
            found.damage.append(f"{name}: record {reader.sequence} cannot be read, later ones can")
        return
    found.records = [record for record in found.records if record.sequence < sealed]
    found.end = End.CLEAN
    # Of a sealed stream the last segments may have been taken back before the ones in between.
    is_whole = reader.ordinal + 1 >= found.taken_count
    if reader.sequence < sealed and (is_whole or reader.later_here() is not None):
        found.damage.append(f"{name} is sealed at {sealed} and ends at {reader.sequence}")
        found.end = End.CORRUPT


def _read_all(found: Found) -> None:
    reader = found.reader
    if reader.ordinal < 0 and reader.lent and min(reader.lent) > 0:
        reader.skip_gap()
    while True:
        batch = reader.read(config.SCAN_RECORDS_MAX)
        found.records += batch
        if not batch and not reader.skip_gap():
            return
