"""A stream that is sealed: journal/streams.py and stream_state.py, whoever still writes.

Invariants: a seal reads all that was committed, however much lies before it; it ends, without an alarm, beside a zombie that appends after every
read; what was counted and never becomes readable is reported as damage.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from concordia import abi, config
from concordia.journal.record import Record
from concordia.journal.stream import End
from concordia.journal.writer import Entry
from concordia.testing.journal import SmallJournal


def test_seal_reads_the_whole_backlog_when_it_takes_longer_than_a_bad_place_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "HINT_SETTLE_S", 0.0)
    with SmallJournal(tmp_path / "journal", segments=64) as journal:
        stream, writer = journal.open()
        stream.control.store("step_tokens", 600)
        stream.control.store("step_started", 1)
        journal.streams.lend_all()
        made = 0
        for _ in range(8):
            for _ in range(600):
                writer.append(Entry(abi.KIND_KV_TAIL, 1, 1, made, made + 1), b"x")
                made += 1
            journal.streams.lend_all()
        assert made > 2 * config.SCAN_RECORDS_MAX, "no backlog"
        assert journal.streams.seal(stream) == made
        assert (stream.end, journal.streams.intake.corrupt_count) == (End.CLEAN, 0)


def test_seal_ends_without_an_alarm_when_a_zombie_appends_after_every_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "HINT_SETTLE_S", 0.0)
    with SmallJournal(tmp_path / "journal", segments=64) as journal:
        stream, writer = journal.open()
        made = itertools.count()
        read = stream.reader.read

        def append() -> None:
            writer.append(Entry(abi.KIND_KV_TAIL, 1, 1, index := next(made), index + 1), b"x")

        def read_and_append(limit: int) -> list[Record]:
            found = read(limit)
            append()
            return found

        for _ in range(5):
            append()
        monkeypatch.setattr(stream.reader, "read", read_and_append)
        sealed = journal.streams.seal(stream)
        assert 5 <= sealed < next(made)
        assert (stream.end, journal.streams.intake.corrupt_count) == (End.CLEAN, 0)


def test_seal_reports_damage_when_what_was_counted_never_becomes_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "HINT_SETTLE_S", 0.0)
    with SmallJournal(tmp_path / "journal") as journal:
        stream, writer = journal.open()
        made = [writer.append(Entry(abi.KIND_KV_TAIL, 1, 1, i, i + 1), b"x") for i in range(6)]
        journal.pool.view[made[3].offset + 200] ^= 1
        assert journal.streams.seal(stream) == 3
        assert (stream.end, journal.streams.intake.corrupt_count) == (End.CORRUPT, 1)


def test_seal_searches_what_was_taken_only_when_much_was_lent_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SmallJournal(tmp_path / "journal", segments=64) as journal:
        stream, writer = journal.open()
        while stream.control.taken_count < 2:
            writer.append(Entry(abi.KIND_KV_TAIL, 1, 1, 0, 1), bytes(9000))
            journal.streams.lend_all()
        stream.ahead = 20
        journal.streams.lend_all()
        assert stream.control.lent_count >= 20
        searched = []
        search = stream.reader._search

        def note(start: int, end: int, salt: int) -> Record | None:
            searched.append(start // journal.pool.segment_bytes)
            return search(start, end, salt)

        monkeypatch.setattr(stream.reader, "_search", note)
        assert journal.streams.seal(stream) == stream.control.committed_count
        assert stream.end is End.CLEAN
        assert searched == [stream.segments[1]]


def test_seal_reports_damage_when_the_next_segment_that_was_taken_has_records(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal") as journal:
        stream, writer = journal.open()
        made = []
        while stream.control.taken_count < 3:
            made.append(writer.append(Entry(abi.KIND_KV_TAIL, 1, 1, len(made), len(made) + 1), bytes(20000)))
            journal.streams.lend_all()
        first = [one for one in made if one.offset // journal.pool.segment_bytes == stream.segments[0]]
        last = first[-1]
        journal.pool.view[last.offset + 200] ^= 1
        stream.control.store("committed_count", 0)  # nothing but the records says so
        assert journal.streams.seal(stream) == len(first) - 1
        assert (stream.end, journal.streams.intake.corrupt_count) == (End.CORRUPT, 1)
