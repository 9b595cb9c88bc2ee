"""Invariant: several ranks that write one journal at once, each from a process and a device of its own, each have every record of theirs,
whole and in order, and the cut is what all of them have; here on CPU devices, in tests/gpu on two GPUs."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

from writing_ranks import check_ranks


@pytest.fixture
def journal() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder) / "journal"


def test_ranks_write_one_journal_when_each_has_a_process_of_its_own(journal: Path) -> None:
    check_ranks(journal, ["host"] * 4, count=400)
