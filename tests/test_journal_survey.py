"""journal/segment.py, survey.py: a journal that nobody answers for.

Invariants: a pool that is cut short anywhere, and a board whose shape any flipped bit changes, are refused; of any other bit a survey reports the
damage or gives all.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from concordia import abi
from concordia.errors import ConcordiaError, Corruption, JournalRefused
from concordia.journal import segment
from concordia.journal.segment import Pool
from concordia.journal.survey import survey
from concordia.journal.writer import Entry
from concordia.testing.journal import SmallJournal

SEGMENT = 2048


def test_pool_is_refused_when_it_is_cut_short_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    path.write_bytes(bytes(2 * SEGMENT))
    path.chmod(0o600)
    for size in reversed(range(2 * SEGMENT)):
        os.truncate(path, size)
        with pytest.raises(Corruption):
            Pool.attach(path, size=2 * SEGMENT, segment_bytes=SEGMENT)


def test_survey_reports_damage_or_gives_all_when_any_single_bit_of_the_board_is_flipped(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=8, segment_bytes=1 << 12) as journal:
        stream, writer = journal.open(rank=1, world=2)
        other, other_writer = journal.open(rank=0, world=2)
        made = {stream.identity: [], other.identity: []}
        for index in range(5):
            for one, hand in ((stream, writer), (other, other_writer)):
                made[one.identity].append(hand.append(Entry(abi.KIND_KV_TAIL, 1, 1, index, index + 1), bytes(700)))
                journal.streams.lend(one)
        journal.streams.seal(stream)
        view = journal.board.mapping.view
        lost = 0
        for slot in (stream, other):
            page = 4096 * (1 + slot.control.slot)
            for bit in [*range(page * 8, (page + 128) * 8), *range((page + 128) * 8, (page + 1664) * 8, 5)]:
                view[bit // 8] ^= 1 << bit % 8
                found = survey(journal.pool, journal.board)
                view[bit // 8] ^= 1 << bit % 8
                damage = found.damage + [text for one in found.streams for text in one.damage]
                records = {one.identity: one.records for one in found.streams}
                for identity, truth in made.items():
                    got = records.get(identity, [])
                    assert got == truth[: len(got)], f"bit {bit - page * 8}"
                    assert len(got) == len(truth) or damage, f"bit {bit - page * 8} was lost silently"
                assert set(records) <= set(made), f"bit {bit - page * 8} made a stream of its own"
                lost += bool(damage)
        assert lost > 500
        assert not survey(journal.pool, journal.board).damage


def test_journal_is_refused_when_any_bit_of_the_board_header_is_flipped_that_says_its_shape(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=8, segment_bytes=1 << 12) as journal:
        view = journal.board.mapping.view
        for bit in range(32 * 8):
            view[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ConcordiaError) as caught:
                segment.attach(journal.home)
            view[bit // 8] ^= 1 << bit % 8
            assert isinstance(caught.value, Corruption | JournalRefused), bit
        pool, board = segment.attach(journal.home)
        pool.close()
        board.close()
