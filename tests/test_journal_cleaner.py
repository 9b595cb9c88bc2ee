"""Invariants: nothing live is lost while there is room, however records, segments and owners come and go; copies have the bytes of their
originals and survive an adoption; when room ends, unreferenced blocks go first, longest unused first, then the coldest requests by name;
a damaged payload is reported and never copied; a full journal refuses records and goes on."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from concordia import abi, config
from concordia.errors import JournalError, JournalFull
from concordia.journal.coverage import Cut
from concordia.journal.record import payload_hash
from concordia.journal.streams import Streams
from concordia.journal.survey import survey
from concordia.journal.writer import Entry, StreamWriter
from concordia.testing.journal import SmallJournal, key_payload

BLOCK = 4
BYTES = 3000  # of a block


def content(key: int, start: int) -> bytes:
    return random.Random(f"{key} {start}").randbytes(BYTES)


def append_block(writer: StreamWriter, key: int, index: int, *, incarnation: int = 1) -> None:
    start = index * BLOCK
    entry = Entry(abi.KIND_KV_BLOCK, key, incarnation, start, start + BLOCK, flags=BLOCK, layout_hash=1, model_hash=key)
    writer.append(entry, content(key, start))


def cut_of(streams: Streams, key: int) -> Cut:
    for stream in streams.by_slot.values():
        stream.source.is_final = True
    return streams.index.cuts.longest(key, tokens_known=1 << 20, layout_hash=1, world=1)


def check_bytes(journal: SmallJournal, cut: Cut, key: int) -> None:
    for piece in cut.pieces.get(0, []):
        got = bytes(journal.pool.view[piece.pool_offset : piece.pool_offset + piece.payload_bytes])
        assert got == content(key, piece.token_start)
        assert payload_hash(got) == piece.payload_hash
        assert piece.model_hash == key, "a copy says who computed it, too"


@pytest.mark.parametrize("seed", range(6))
def test_nothing_live_is_lost_when_records_come_and_go_at_random(tmp_path: Path, seed: int) -> None:
    print("seed", seed)
    chance = random.Random(seed)
    with SmallJournal(tmp_path / "journal", segments=18, segment_bytes=1 << 15) as journal:
        _, writer = journal.open()
        _, keys = journal.open(writer_kind=abi.WRITER_SCHEDULER)
        live: dict[int, int] = {}
        fresh = 0
        streams = journal.streams
        for _ in range(400):
            if len(live) < 6 and chance.random() < 0.4:
                fresh += 1
                live[fresh] = 0
            for key in list(live):
                if chance.random() < 0.3 and live[key] < 12:
                    append_block(writer, key, live[key])
                    if chance.random() < 0.5:
                        keys.append(Entry(abi.KIND_BLOCK_KEY, key, 1), key_payload({live[key]: key * 1000 + live[key]}))
                    live[key] += 1
                elif chance.random() < 0.06:
                    keys.append(Entry(abi.KIND_FINISH, key, 1), b"")
                    del live[key]
            journal.round()
            streams.index.settle(1e18)
        assert journal.cleaner.copied_count > 0, "the test did not make the cleaner work"
        assert not any(e["event"] == "unprotected" for _, e in streams.index.events)
        adopted = journal.adopted()
        adopted.index.settle(1e18)
        for index in (streams, adopted):
            for key, blocks in live.items():
                cut = cut_of(index, key)
                assert cut.tokens == blocks * BLOCK, f"request {key}"
                check_bytes(journal, cut, key)
        # What was named to go may come back with a new owner; what was not must.
        assert set(adopted.index.keys.known((1, 1))) >= set(streams.index.keys.known((1, 1)))
        assert not survey(journal.pool, journal.board).damage


def fill(journal: SmallJournal, writer: StreamWriter, key: int, *, until: int) -> int:
    """Blocks of one request until few segments are free; how many."""
    count = 0
    while len(journal.streams.free) > until:
        append_block(writer, key, count)
        count += 1
        journal.round(clean=False)
    return count


def test_oldest_unused_block_goes_first_when_room_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CONDEMN_GRACE_S", 0.0)
    with SmallJournal(tmp_path / "journal", segments=15, segment_bytes=1 << 15) as journal:
        _, writer = journal.open()
        _, keys = journal.open(writer_kind=abi.WRITER_SCHEDULER)
        index = journal.streams.index
        names = []
        for key in range(1, 8):
            for block in range(12):
                append_block(writer, key, block)
                journal.round(clean=False)
                names.append(key * 1000 + block)
                keys.append(Entry(abi.KIND_BLOCK_KEY, key, 1), key_payload({block: names[-1]}))
            keys.append(Entry(abi.KIND_FINISH, key, 1), b"")
            journal.round(clean=False)
            index.settle(1e18)
        before = index.keys.known((1, 1))
        assert before == names
        used = [1000 + block for block in range(12)]
        assert index.cuts.match_prefix(used, layout_hash=1, world=1).tokens == 12 * BLOCK
        while len(journal.streams.free) < journal.cleaner.low:
            journal.round()
        left = index.keys.known((1, 1))
        assert journal.cleaner.evicted_blocks == len(before) - len(left) > 0
        assert journal.cleaner.unprotected_requests == 0
        gone = [name for name in names if name not in left]
        first = names.index(gone[0])
        assert gone == names[first : first + len(gone)], "not the longest unused"
        assert 12 <= first < 12 + 10, "only what shares a segment with used blocks may stay"
        assert set(used) <= set(left)


def test_writer_finds_room_when_it_fills_many_segments_between_two_rounds(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=60, segment_bytes=1 << 15) as journal:
        stream, writer = journal.open()
        _, keys = journal.open(writer_kind=abi.WRITER_SCHEDULER)
        blocks = 3 * 9  # of three segments
        for key in range(1, 80):
            for block in range(blocks):
                append_block(writer, key, block)
            keys.append(Entry(abi.KIND_BLOCK_KEY, key, 1), key_payload({block: key * 1000 + block for block in range(blocks)}))
            keys.append(Entry(abi.KIND_FINISH, key, 1), b"")
            journal.streams.scan_all()
            journal.streams.index.settle(1e18)
            journal.round()
        assert stream.control.dropped_count == 0
        assert journal.cleaner.evicted_blocks > 60 * 9
        assert journal.cleaner.unprotected_requests == 0


def test_segments_are_emptied_when_each_holds_a_block_that_is_still_wanted(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=40, segment_bytes=1 << 15) as journal:
        stream, writer = journal.open()
        _, keys = journal.open(writer_kind=abi.WRITER_SCHEDULER)
        for key in range(2, 80):
            append_block(writer, 1, key - 2)  # of one request that runs all the while
            for block in range(8):
                append_block(writer, key, block)
            keys.append(Entry(abi.KIND_BLOCK_KEY, key, 1), key_payload({block: key * 1000 + block for block in range(8)}))
            keys.append(Entry(abi.KIND_FINISH, key, 1), b"")
            journal.streams.scan_all()
            journal.streams.index.settle(1e18)
            for _ in range(3):
                journal.round()
        assert stream.control.dropped_count == 0
        assert journal.cleaner.unprotected_requests == 0
        assert cut_of(journal.streams, 1).tokens == 78 * BLOCK


def test_coldest_request_loses_protection_by_name_when_nothing_else_can_go(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=12, segment_bytes=1 << 15) as journal:
        stream, writer = journal.open()
        counts: dict[int, int] = {}
        index = journal.streams.index
        for turn in range(120):
            key = 1 + turn // 10
            try:
                append_block(writer, key, counts.get(key, 0))
            except JournalFull:
                pytest.fail("the cleaner did not keep up with one writer")
            counts[key] = counts.get(key, 0) + 1
            journal.round()
            journal.round()
        named = [int(e["key"], 16) for _, e in index.events if e["event"] == "unprotected"]
        assert named == sorted(named), "not the coldest first"
        assert len(named) == journal.cleaner.unprotected_requests > 0
        for key, count in counts.items():
            if key not in named:
                cut = cut_of(journal.streams, key)
                assert cut.tokens == count * BLOCK
                check_bytes(journal, cut, key)
        assert stream.control.dropped_count == 0


def test_writer_is_refused_and_event_tells_when_no_segment_can_be_lent(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=8, segment_bytes=1 << 15) as journal:
        stream, writer = journal.open()
        made = 0
        with contextlib.suppress(JournalFull):
            while made < 1000:
                append_block(writer, 1, made)
                made += 1
                journal.round(clean=False)
        journal.round(clean=False)
        events = [e for _, e in journal.streams.index.events if e["event"] == "full"]
        assert [e["dropped_records"] for e in events] == [1]
        assert stream.control.dropped_count == 1
        assert len(journal.streams.free) == config.CLEANER_SEGMENTS
        assert cut_of(journal.streams, 1).tokens == made * BLOCK


def test_damaged_payload_is_reported_and_not_copied_when_the_cleaner_meets_it(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=10, segment_bytes=1 << 15) as journal:
        _, writer = journal.open()
        append_block(writer, 1, 0)
        journal.round()
        at = cut_of(journal.streams, 1).pieces[0][0].pool_offset
        journal.streams.by_slot[0].source.is_final = False
        journal.pool.view[at] ^= 1
        for key in range(3, 200):
            append_block(writer, key, 0)
            journal.round()
            if key % 5:
                assert journal.streams.index.finish(key, now=0.0)
            journal.round()
            journal.streams.index.settle(1e18)
            if journal.cleaner.copied_count > 10:
                break
        assert any("payload" in e["reason"] for _, e in journal.streams.index.events if e["event"] == "corruption")
        cut = cut_of(journal.streams, 1)
        assert cut.pieces[0][0].pool_offset == at, "it was copied"
        assert len(journal.streams.free) > journal.cleaner.low - 2
        segment = at // journal.pool.segment_bytes
        assert journal.cleaner.is_unsound(segment)
        assert journal.streams.index.finish(1, now=0.0)
        journal.streams.index.settle(1e18)
        assert not journal.cleaner.is_unsound(segment), "its next use would never be emptied"


def test_places_told_to_a_restore_stay_when_room_is_needed(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=10, segment_bytes=1 << 15) as journal:
        _, writer = journal.open()
        fill(journal, writer, 1, until=4)
        cut = cut_of(journal.streams, 1)
        journal.streams.by_slot[0].source.is_final = False
        journal.streams.pins.add(cut.pieces, None)
        journal.streams.index.finish(1, now=0.0)
        journal.streams.index.settle(1e18)
        assert journal.streams.give_back_empty() == 0
        check_bytes(journal, cut, 1)


def test_segments_of_a_sealed_stream_stay_until_its_writer_is_known_to_be_gone(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=10, segment_bytes=1 << 15) as journal:
        stream, writer = journal.open()
        count = fill(journal, writer, 1, until=4)
        free = len(journal.streams.free)
        assert journal.streams.seal(stream) == count
        journal.streams.index.finish(1, now=0.0)
        journal.streams.index.settle(1e18)
        assert journal.streams.give_back_empty() == 0
        append_block(writer, 1, count)  # a zombie goes on
        assert journal.streams.scan_all() == 0
        assert journal.streams.seal(stream) == count
        journal.streams.release(stream)
        assert journal.streams.give_back_empty() > 0
        assert len(journal.streams.free) == 10 > free
        assert stream.control.state == abi.STREAM_FREE
        assert not journal.streams.by_slot


def test_finished_request_stays_finished_when_another_owner_adopts(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=10, segment_bytes=1 << 15) as journal:
        _, writer = journal.open()
        append_block(writer, 1, 0)
        append_block(writer, 2, 0)
        journal.round()
        assert journal.streams.index.finish(1, now=0.0)
        assert journal.cleaner.write_finish(1)
        assert not journal.streams.index.finish(1, now=0.0)
        adopted = journal.adopted()
        adopted.index.settle(1e18)
        assert cut_of(adopted, 1) == Cut()
        assert cut_of(adopted, 2).tokens == BLOCK


def test_adopter_finds_no_damage_and_lends_nothing_twice_when_segments_of_dead_writers_went_round(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=12, segment_bytes=1 << 15) as journal:
        for life in range(1, 12):
            stream, writer = journal.open(replica=life)
            for index in range(20):
                append_block(writer, life, index)
                journal.round()
            journal.streams.release(stream)
            journal.streams.index.finish(life - 1, now=0.0)
            journal.cleaner.write_finish(life - 1)
            journal.streams.index.settle(1e18)
            journal.streams.give_back_empty()
            found = survey(journal.pool, journal.board)
            assert found.damage == []
            assert [text for one in found.streams for text in one.damage] == []
            adopted = journal.adopted()
            for old in list(adopted.by_slot.values()):
                adopted.release(old)  # as its owner does, who sees that the writer is dead
            taken = [s for one in adopted.by_slot.values() for s in one.segments.values()]
            assert sorted([*taken, *adopted.free]) == list(range(12))
            assert cut_of(adopted, life).tokens == 20 * BLOCK


def test_slots_never_run_out_when_every_replica_leaves_a_block_that_is_kept(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=600, segment_bytes=1 << 14) as journal:
        count = 150
        for life in range(1, count + 1):
            stream, writer = journal.open(replica=life)
            scheduler, keys = journal.open(writer_kind=abi.WRITER_SCHEDULER, replica=life)
            append_block(writer, life, 0)
            keys.append(Entry(abi.KIND_BLOCK_KEY, life, 1), key_payload({0: life}))
            journal.round()
            journal.streams.release(stream)
            journal.streams.release(scheduler)
            journal.streams.index.finish(life, now=0.0)
            journal.streams.index.settle(1e18)
            journal.streams.give_back_empty()
            for _ in range(3):
                journal.round()
        assert journal.streams.index.keys.known((1, 1)) == list(range(1, count + 1)), "a block was lost"
        assert len(journal.streams.by_slot) <= abi.STREAM_CAPACITY * 3 // 4
        for life in (1, count):
            check_bytes(journal, journal.streams.index.cuts.match_prefix([life], layout_hash=1, world=1), life)
        assert not survey(journal.pool, journal.board).damage


def test_slot_is_free_at_once_when_a_released_stream_has_no_segment(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=4, segment_bytes=1 << 14) as journal:
        journal.streams.free.clear()
        stream, _ = journal.open()
        assert not stream.segments
        journal.streams.release(stream)
        journal.streams.release(stream)
        assert not journal.streams.by_slot
        assert stream.control.state == abi.STREAM_FREE


def test_cleaner_still_gets_a_slot_when_writers_have_taken_all_of_theirs(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=16, segment_bytes=1 << 14) as journal:
        with contextlib.suppress(JournalError):
            while True:
                journal.open()
        assert len(journal.streams.by_slot) == abi.STREAM_CAPACITY - config.CLEANER_SLOTS
        assert journal.cleaner.write_finish(1)
        adopted = journal.adopted()  # its cleaner has slots too
        assert journal.cleaner.write_finish(2)
        assert len(adopted.by_slot) == abi.STREAM_CAPACITY - config.CLEANER_SLOTS + 2


def test_cleaner_goes_on_and_says_so_when_no_slot_at_all_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CLEANER_SLOTS", 0)
    with SmallJournal(tmp_path / "journal", segments=16, segment_bytes=1 << 14) as journal:
        _, writer = journal.open()
        fill(journal, writer, 1, until=7)
        with contextlib.suppress(JournalError):
            while True:
                journal.open()
        for _ in range(5):
            journal.cleaner.step()
        assert not journal.cleaner.write_finish(1)
        told = [e["reason"] for _, e in journal.streams.index.events if e["event"] == "full" and e["stream"] == "cleaner"]
        assert len(told) == 1
        assert "slots" in told[0]
        append_block(writer, 2, 0)
        journal.round()
        assert journal.streams.index.cuts.committed(2) == BLOCK, "the owner does not read any more"
