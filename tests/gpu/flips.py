"""Every byte of a stream by what it is, and what a reader must say when a bit of it is flipped.

Owns: the table below. Promises: the journal is as before when `judge_flips` returns. Called by tests that read what a device wrote.

    segment header, record header, commit word   all before it, and damage
    payload                                      all records; its own payload, and no other, is unsound
    padding, rest of the commit word's line      all records, all sound
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from stage import JournalFile

from concordia import abi
from concordia.journal.record import Record
from concordia.journal.stream import End, has_sound_payload

Place = tuple[str, int]  # what a byte is, and of which record; a segment header names the first record behind it


def places(journal: JournalFile) -> dict[int, Place]:
    """What each byte that was written is, by its offset in the pool."""
    records, _ = journal.records()
    found: dict[int, Place] = {}
    for segment in sorted({record.offset // journal.segment_bytes for record in records}):
        first = min(r.sequence for r in records if r.offset // journal.segment_bytes == segment)
        start = segment * journal.segment_bytes
        found |= dict.fromkeys(range(start, start + 256), ("segment", first))
    for record in records:
        word = record.end_offset - abi.LINE_BYTES
        found |= dict.fromkeys(range(record.offset, record.end_offset), ("padding", record.sequence))
        found |= dict.fromkeys(range(record.offset, record.payload_offset), ("header", record.sequence))
        found |= dict.fromkeys(range(record.payload_offset, record.payload_offset + record.payload_bytes), ("payload", record.sequence))
        found |= dict.fromkeys(range(word, word + 8), ("commit", record.sequence))
    return found


def judge_flips(journal: JournalFile, bits: Iterable[int]) -> tuple[Counter[str], list[str]]:
    """Flip each of these bits of the pool alone; how many of each place, and where the reader said something else."""
    truth, _ = journal.records()
    known = places(journal)
    counts: Counter[str] = Counter()
    wrong = []
    for bit in bits:
        what, sequence = known[bit // 8]
        journal.pool.view[bit // 8] ^= 1 << bit % 8
        found, end = journal.records()
        unsound = [r.sequence for r in found if not has_sound_payload(journal.pool.view, r)]
        journal.pool.view[bit // 8] ^= 1 << bit % 8
        if (found, end, unsound) != _expected(truth, what, sequence):
            wrong.append(f"bit {bit} ({what} of {sequence}): {len(found)} records, {end.value}, unsound {unsound}")
        counts[what] += 1
    return counts, wrong


def _expected(truth: list[Record], what: str, sequence: int) -> tuple[list[Record], End, list[int]]:
    if what in ("segment", "header", "commit"):
        return truth[:sequence], End.CORRUPT, []
    return truth, End.CLEAN, [sequence] if what == "payload" else []
