"""Invariants: whatever a crash, a kill, a flipped bit or a recycled segment leaves, a reader gets an exact prefix of what was committed or
reports damage, never a wrong record; the table of ends is exactly the documented one; every state that the writer's fences allow is read
as what was committed in it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from concordia import abi
from concordia.errors import ConcordiaError, JournalFull
from concordia.journal import record
from concordia.journal.control import Control, Lent
from concordia.journal.record import Record
from concordia.journal.stream import End, StreamReader, has_sound_payload
from concordia.journal.writer import Entry, StreamWriter

SEGMENT = 2048
STREAM = 0xABCDEF
LENT = [Lent(0, 1, 0x1111222233334444 | 1), Lent(1, 0, 0x5555666677778888 | 1)]
SIZES = (100, 0, 7, 130, 300)  # three records in the first segment, two in the second


@dataclass
class Memory:
    """A pool that is only bytes."""

    data: bytearray
    segment_bytes: int = SEGMENT
    view: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.view = memoryview(self.data)


@dataclass(frozen=True)
class Store:
    """One store of the writer, in program order."""

    offset: int
    data: bytes
    is_release: bool = False
    count: int | None = None  # the word committed_count instead of pool bytes


class RecordingWriter(StreamWriter):
    """Tells every store; commit words are released, as the compiled writer does it."""

    def __init__(self, pool: memoryview, control: Control) -> None:
        super().__init__(pool, control, segment_bytes=SEGMENT, stream=STREAM)
        self.stores: list[Store] = []

    def store(self, offset: int, data: bytes | memoryview) -> None:
        super().store(offset, data)
        if len(data):
            self.stores.append(Store(offset, bytes(data)))

    def publish(self, offset: int, word: int) -> None:
        super().publish(offset, word)
        self.stores.append(Store(offset, word.to_bytes(8, "little"), is_release=True))

    def count(self, name: str, value: int) -> None:
        super().count(name, value)
        if name == "committed_count":
            self.stores.append(Store(0, b"", count=value))


def control_with(lent: list[Lent]) -> Control:
    control = Control(memoryview(bytearray(4096)), 0, 0)
    for entry in lent:
        control.lend(entry)
    return control


def payload(index: int, seed: int = 0) -> bytes:
    return random.Random(f"{seed} {index}").randbytes(SIZES[index % len(SIZES)])


def write(data: bytearray, lent: list[Lent], sizes: int = len(SIZES), seed: int = 0) -> tuple[list[Record], list[Store]]:
    writer = RecordingWriter(memoryview(data), control_with(lent))
    made = [
        writer.append(Entry(abi.KIND_KV_TAIL, 99, 1, index, index + 1), payload(index, seed))
        for index in range(sizes)
    ]
    return made, writer.stores


def read(data: bytearray | bytes, lent: list[Lent], hint: int, *, is_final: bool = True) -> tuple[list[Record], End]:
    memory = Memory(data)  # type: ignore[arg-type]
    reader = StreamReader(memory, STREAM)
    for entry in lent:
        reader.lend(entry)
    found = reader.read(1000)
    return found, reader.classify(hint, is_final=is_final)


def old_lap() -> bytearray:
    """A pool full of records of an earlier life: same places, same stream and sequences, other salts."""
    data = bytearray(2 * SEGMENT)
    write(data, [entry._replace(salt=entry.salt ^ 0xFF00) for entry in LENT], seed=1)
    return data


BACKGROUNDS = {
    "zeros": lambda: bytearray(2 * SEGMENT),
    "old lap": old_lap,
    "noise": lambda: bytearray(random.Random(5).randbytes(2 * SEGMENT)),
}


def test_records_come_back_byte_for_byte_when_nothing_happened() -> None:
    data = bytearray(2 * SEGMENT)
    made, _ = write(data, LENT)
    found, end = read(data, LENT, len(made))
    assert found == made
    assert end is End.CLEAN
    assert [bytes(data[r.payload_offset : r.payload_offset + r.payload_bytes]) for r in found] == [
        payload(index) for index in range(len(SIZES))
    ]
    assert all(has_sound_payload(memoryview(data), r) for r in found)
    assert {r.offset // SEGMENT for r in made} == {0, 1}


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_reader_gets_exactly_what_was_committed_when_the_writer_stops_after_any_byte(background: str) -> None:
    made, stores = write(BACKGROUNDS[background](), LENT)
    data = BACKGROUNDS[background]()
    committed = hint = checked = 0

    def check() -> None:
        found, end = read(data, LENT, hint)
        assert found == made[:committed], f"byte {at} of {store}"
        assert end in (End.CLEAN, End.TORN)

    for store in stores:
        at = 0
        if store.count is not None:
            hint = store.count
            check()
            continue
        sizes = [8] if store.is_release else [1] * len(store.data)  # a commit word is one store
        for size in sizes:
            data[store.offset + at : store.offset + at + size] = store.data[at : at + size]
            at += size
            committed += store.is_release
            checked += 1
            check()
    assert committed == len(made)
    assert checked > 2000


def states(stores: list[Store], *, is_count_ordered: bool) -> Iterator[tuple[list[Store], int]]:
    """Every set of stores that may be visible, and how many records are committed in it.

    A release waits for everything before it in program order; nothing else is ordered. So a state
    is: the last visible release and all before it, with any subset of the plain stores behind it.
    """
    ordered = [s for s in stores if s.is_release or (is_count_ordered and s.count is not None)]
    for last in [None, *ordered]:
        at = stores.index(last) + 1 if last is not None else 0
        rest = [s for s in stores[at:] if s not in ordered]
        base = stores[:at]
        committed = sum(s.is_release for s in base)
        for bits in itertools.product((False, True), repeat=len(rest)):
            yield base + list(itertools.compress(rest, bits)), committed


@pytest.mark.parametrize("background", ["zeros", "old lap"])
@pytest.mark.parametrize("is_count_ordered", [True, False])
def test_reader_gets_exactly_what_was_committed_in_every_order_that_the_fences_allow(
    background: str, is_count_ordered: bool
) -> None:
    # Records 2 and 3 lie on both sides of the seam between segments; a header counts as two stores.
    made, stores = write(BACKGROUNDS[background](), LENT, sizes=4)
    split: list[Store] = []
    for store in stores:
        if len(store.data) == 256:
            split += [Store(store.offset, store.data[:72]), Store(store.offset + 72, store.data[72:])]
        else:
            split.append(store)
    releases = [index for index, store in enumerate(split) if store.is_release]
    base, tail = split[: releases[1] + 1], split[releases[1] + 1 :]
    count = 0
    empty = bytes(BACKGROUNDS[background]())
    for visible, committed in states(tail, is_count_ordered=is_count_ordered):
        data = bytearray(empty)
        hint = 0
        for store in base + visible:
            if store.count is not None:
                hint = max(hint, store.count)
            else:
                data[store.offset : store.offset + len(store.data)] = store.data
        found, end = read(data, LENT, hint)
        assert found == made[: 2 + committed]
        assert end in (End.CLEAN, End.TORN) or (not is_count_ordered and hint > 2 + committed)
        count += 1
    print(count, "states")
    assert count > 500


@pytest.mark.parametrize("has_hint", [True, False])
def test_reader_reports_damage_or_gives_all_when_any_single_bit_is_flipped(has_hint: bool) -> None:
    clean = bytearray(2 * SEGMENT)
    made, _ = write(clean, LENT)
    hint = len(made) if has_hint else 0
    last = made[-1]
    touching_last = range(last.offset, last.end_offset)
    outcomes = {"whole": 0, "payload": 0, "corrupt": 0, "torn": 0}
    for bit in range(len(clean) * 8):
        data = bytearray(clean)
        data[bit // 8] ^= 1 << bit % 8
        found, end = read(data, LENT, hint)
        assert found == made[: len(found)], f"bit {bit}"
        if len(found) == len(made):
            sound = [has_sound_payload(memoryview(data), r) for r in found]
            assert end is End.CLEAN
            outcomes["whole" if all(sound) else "payload"] += 1
            is_payload = any(
                r.payload_offset <= bit // 8 < r.payload_offset + r.payload_bytes for r in made
            )
            assert all(sound) is not is_payload
        elif end is End.CORRUPT:
            outcomes["corrupt"] += 1
        else:  # without the hint, damage of the very last record looks like a torn tail
            assert not has_hint
            assert bit // 8 in touching_last, f"bit {bit} was lost silently"
            outcomes["torn"] += 1
    print(outcomes)
    assert min(outcomes["whole"], outcomes["payload"], outcomes["corrupt"]) > 0


PLACES = ("untouched", "old lap", "begun", "header only")
LATER = ("nothing", "header", "committed")


@pytest.mark.parametrize("is_final", [True, False])
@pytest.mark.parametrize("hint", ["behind", "exact", "ahead"])
@pytest.mark.parametrize("elsewhere", LATER)
@pytest.mark.parametrize("behind", LATER)
@pytest.mark.parametrize("place", PLACES)
def test_end_is_the_documented_one_for_every_row_of_the_table(
    place: str, behind: str, elsewhere: str, hint: str, is_final: bool
) -> None:
    """`place` is where record 1 belongs, `behind` record 2 in the same segment, `elsewhere` record 3 in the next."""
    truth = bytearray(2 * SEGMENT)
    made, _ = write(truth, LENT)
    data = old_lap() if place == "old lap" else bytearray(2 * SEGMENT)

    def copy(start: int, end: int) -> None:
        data[start:end] = truth[start:end]

    def lay(index: int, how: str) -> None:
        r = made[index]
        if how in ("header", "header only", "committed"):
            copy(r.offset, r.offset + 256)
        if how == "begun":
            copy(r.offset, r.offset + 64)
        if how == "committed":
            copy(r.offset, r.end_offset)

    copy(SEGMENT, SEGMENT + 256)
    lay(0, "committed")
    lay(1, place)
    lay(2, behind)
    if elsewhere != "nothing":
        copy(0, 256)
        lay(3, elsewhere)
    found, end = read(data, LENT, {"behind": 0, "exact": 1, "ahead": 2}[hint], is_final=is_final)
    assert found == made[:1]
    if hint == "ahead":
        expected = End.CORRUPT
    elif not is_final:
        expected = End.OPEN
    elif "committed" in (behind, elsewhere):
        expected = End.CORRUPT
    elif place in ("begun", "header only"):
        expected = End.TORN
    else:
        expected = End.CLEAN
    assert end is expected


def test_old_lap_never_comes_back_when_a_segment_is_recycled() -> None:
    data = bytearray(2 * SEGMENT)
    write(data, LENT)
    again = [LENT[0]._replace(salt=0x9999), LENT[1]._replace(salt=0xAAAB)]
    made, _ = write(data, again, sizes=1, seed=2)
    found, end = read(data, again, 1)
    assert found == made
    assert end is End.CLEAN
    assert read(data, LENT, 0)[0] == []


def test_reader_goes_on_where_it_stopped_when_more_is_written() -> None:
    data = bytearray(8 * SEGMENT)
    control = control_with([])
    writer = RecordingWriter(memoryview(data), control)
    reader = StreamReader(Memory(data), STREAM)
    found: list[Record] = []
    made: list[Record] = []
    for index in range(12):
        entry = Entry(abi.KIND_KV_TAIL, 1, 1, index, index + 1)
        try:
            made.append(writer.append(entry, payload(index)))
        except JournalFull:
            lent = Lent(control.lent_count, control.lent_count, 77 + index)
            control.lend(lent)
            reader.lend(lent)
            made.append(writer.append(entry, payload(index)))
        found += reader.read(1)
        assert reader.classify(control.committed_count, is_final=False) is End.OPEN
    while batch := reader.read(2):
        found += batch
    assert found == made
    assert control.dropped_count == control.lent_count > 2


def test_record_size_is_refused_when_it_fits_no_segment() -> None:
    writer = RecordingWriter(memoryview(bytearray(2 * SEGMENT)), control_with(LENT))
    with pytest.raises(ConcordiaError, match="does not fit"):
        writer.append(Entry(abi.KIND_KV_TAIL, 1), bytes(SEGMENT))
    assert record.record_bytes(SEGMENT - 256 - 384) == SEGMENT - 256
    writer.append(Entry(abi.KIND_KV_TAIL, 1), bytes(SEGMENT - 256 - 384))
