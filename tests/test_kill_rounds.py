"""The rounds of SIGKILL during append, as the benchmark runs them, and the judge that they rely on.

Invariants: rounds on the CPU device find nothing wrong; whatever is taken from, added to or changed in what was acknowledged is found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import concordia
from concordia import abi
from concordia.journal.record import Record
from concordia.journal.stream_state import Stream
from concordia.journal.writer import Entry
from concordia.testing.journal import SmallJournal

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SEGMENT = 1 << 16
RECORDS = 20


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Judges a stream of RECORDS sound records after something was done to it; `claimed` of them were acknowledged."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kill_rounds
    import kill_writer

    path = Path("/dev/shm") / f"concordia-test-judge-{os.getpid()}"

    def judged(harm: Callable[[memoryview, list[Record], Stream], None], claimed: int) -> Any:
        workload, ledger = kill_writer.ByteRecords(7), kill_writer.Ledger()
        outcome = kill_rounds.Outcome("7/0")
        with SmallJournal(path, segments=32, segment_bytes=SEGMENT) as journal:
            stream, writer = journal.open()
            made = []
            for number in range(RECORDS):
                journal.streams.lend(stream)
                kind, start, end = workload.names(number)
                made.append(writer.append(Entry(kind, number, 1, start, end, number), workload.payload(number)))
                ledger.submit(number + 1)
            for record in made[:claimed]:
                ledger.acknowledge(kill_writer.Note(record.sequence, record.step, record.payload_hash))
            for extra in range(RECORDS, claimed):
                ledger.acknowledge(kill_writer.Note(extra, extra, 0))
            harm(journal.pool.view, made, stream)
            journal.streams.seal(stream)
            kill_rounds.judge(outcome, path, stream, workload=workload, ledger=ledger, known=claimed)
        return outcome

    return judged


def nothing(view: memoryview, made: list[Record], stream: Stream) -> None:
    pass


def flip_payload(view: memoryview, made: list[Record], stream: Stream) -> None:
    record = max(made, key=lambda r: r.payload_bytes)
    view[record.payload_offset + record.payload_bytes // 2] ^= 1


def lose_commit(view: memoryview, made: list[Record], stream: Stream) -> None:
    view[made[9].end_offset - abi.LINE_BYTES] ^= 1


def lose_last(view: memoryview, made: list[Record], stream: Stream) -> None:
    view[made[-1].end_offset - abi.LINE_BYTES] ^= 1
    stream.control.store("committed_count", RECORDS - 1)


def seal_early(view: memoryview, made: list[Record], stream: Stream) -> None:
    stream.control.seal(RECORDS - 3)
    stream.is_sealed = True


def test_nothing_is_wrong_when_everything_acknowledged_is_there(rounds: Callable[..., Any]) -> None:
    outcome = rounds(nothing, RECORDS)
    assert (outcome.wrong, outcome.acknowledged, outcome.records) == ([], RECORDS, RECORDS)
    assert not outcome.is_torn
    assert not outcome.is_unfinished


def test_torn_tail_is_known_for_one_when_the_last_record_lacks_its_commit_word(rounds: Callable[..., Any]) -> None:
    outcome = rounds(lose_last, RECORDS - 1)
    assert (outcome.wrong, outcome.records) == ([], RECORDS - 1)
    assert outcome.is_torn
    assert outcome.is_unfinished


@pytest.mark.parametrize(
    ("harm", "claimed", "said"),
    [
        (flip_payload, RECORDS, "has other bytes"),
        (lose_commit, RECORDS, "cannot be read|corrupt"),
        (lose_last, RECORDS, "acknowledged and is not there"),
        (seal_early, RECORDS, f"the seal is {RECORDS - 3}"),
        (nothing, RECORDS + 1, "acknowledged and is not there"),
    ],
)
def test_judge_says_so_when_anything_acknowledged_is_missing_or_changed(
    rounds: Callable[..., Any], harm: Callable[..., None], claimed: int, said: str
) -> None:
    wrong = rounds(harm, claimed).wrong
    assert any(part in text for text in wrong for part in said.split("|")), wrong


def test_nothing_acknowledged_is_lost_when_writers_are_killed_at_random(tmp_path: Path) -> None:
    output = tmp_path / "rounds.json"
    environment = os.environ | {"PYTHONPATH": str(Path(concordia.__file__).parents[1])}
    command = [sys.executable, str(BENCHMARKS / "kill_rounds.py"), "--rounds", "6", "--device", "host", "--children", "2", "--output", str(output)]
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text(encoding="utf-8"))
    assert [run["rounds"] for run in result["runs"]] == [6, 6]
    assert result["total"]["rounds"] == 12
    assert result["total"]["violations"] == 0
    assert result["total"]["killed_during_append"] > 0
    assert result["total"]["records"] >= result["total"]["acknowledged"] > 0
