"""Invariants: a pace is what was added within its window, however rarely one looks; a peak is remembered for PEAK_S and no longer; a rank
is lent what another took at once from its engine's first step on; a place told to a restore stays until its request has gone on, or its time is up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from concordia import abi, config
from concordia.journal.pace import Pace, Peak
from concordia.journal.pins import Told
from concordia.journal.record import payload_hash
from concordia.journal.stream_state import Stream
from concordia.journal.writer import Entry, StreamWriter
from concordia.testing.journal import SmallJournal

BLOCK = bytes(20_000)  # one to a segment


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def append(writer: StreamWriter, key: int, index: int, *, incarnation: int) -> None:
    entry = Entry(abi.KIND_KV_BLOCK, key, incarnation, 4 * index, 4 * index + 4, flags=4, layout_hash=1, model_hash=1)
    writer.append(entry, BLOCK, payload_hash=payload_hash(BLOCK))


def announce(stream: Stream, tokens: int) -> None:
    stream.control.store("step_tokens", tokens)
    stream.control.store("step_started", stream.control.word("step_started") + 1)


def test_pace_is_what_came_within_the_window_when_looks_are_frequent_and_when_they_are_rare() -> None:
    pace = Pace(1.0)
    assert [pace.note(count, 10 + at / 10) for at, count in enumerate([0, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6])][-1] == 1
    assert pace.note(9, 30.0) == 3, "a late look counts from the one before"
    assert pace.note(9, 31.5) == 0


def test_peak_is_forgotten_when_its_time_is_over() -> None:
    peak = Peak()
    assert [peak.note(value, when) for when, value in ((0.0, 7), (1.0, 9), (2.0, 3), (50.0, 1))] == [7, 9, 9, 9]
    assert peak.note(0, 1.5 + config.PEAK_S) == 3
    assert peak.note(0, 60.0 + config.PEAK_S) == 0


def test_every_rank_that_works_is_lent_what_one_took_at_once_lately(tmp_path: Path, clock: list[float]) -> None:
    with SmallJournal(tmp_path / "journal", segments=120, segment_bytes=1 << 15) as journal:
        stream, writer = journal.open()
        announce(stream, 8192)
        journal.round(clean=False)
        for index in range(25):
            append(writer, 1, index, incarnation=1)
        journal.round(clean=False)
        clock[0] += 1.0
        while len(journal.streams.free) > 64:
            journal.streams.free.pop()
        other, _ = journal.open(replica=2)
        for _ in range(3):
            clock[0] += 10.0
            journal.streams.calm()
            journal.round(clean=False)
        assert stream.control.lent_count - stream.control.taken_count >= 25
        assert other.control.lent_count <= config.SEGMENTS_LENT, "a standby holds what others need"
        announce(other, 8)
        journal.round(clean=False)
        assert other.control.lent_count <= config.SEGMENTS_LENT, "it only tries itself out"
        announce(other, 8192)
        journal.round(clean=False)
        assert other.control.lent_count >= 25
        clock[0] += config.PEAK_S
        journal.round(clean=False)
        third, _ = journal.open(replica=3)
        assert third.control.lent_count <= config.SEGMENTS_LENT, "what was taken at once a minute ago is not expected any more"


@pytest.mark.parametrize("goes_on", [True, False])
def test_told_places_stay_until_every_rank_has_gone_on_or_their_time_is_up(tmp_path: Path, clock: list[float], goes_on: bool) -> None:
    with SmallJournal(tmp_path / "journal", segments=40, segment_bytes=1 << 15) as journal:
        streams = journal.streams
        ranks = [journal.open(rank=rank, world=2) for rank in range(2)]
        for stream, writer in ranks:
            append(writer, 7, 0, incarnation=1000)
            journal.round(clean=False)
            streams.seal(stream)
        cut = streams.index.cuts.longest(7, tokens_known=100, layout_hash=1, world=2)
        assert cut.tokens == 4
        streams.pins.add(cut.pieces, Told(7, streams.index.cuts.newest(7), (1, 2)))
        pinned = {piece.pool_offset >> 15 for pieces in cut.pieces.values() for piece in pieces}
        for rank, (_, writer) in enumerate([journal.open(rank=rank, world=2, replica=2) for rank in range(2)]):
            assert streams.pins.segments() == pinned, f"{rank} of 2 ranks have gone on"
            if goes_on:
                append(writer, 7, 1, incarnation=2000)
            journal.round(clean=False)
        clock[0] += 0.0 if goes_on else config.CUT_PIN_S + 1
        assert not streams.pins.segments()
