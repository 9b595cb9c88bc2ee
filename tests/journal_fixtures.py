"""What the tests of an owner begin with: a journal's path, at which nothing is left behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from concordia.errors import JournalError, JournalRefused
from concordia.journal.client import JournalClient
from journal_ground import await_true


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Path]:
    path = Path("/dev/shm") / f"concordia-test-{os.getpid()}-{tmp_path.name}"
    yield path
    with contextlib.suppress(JournalRefused, JournalError):
        with JournalClient.connect(path, timeout_s=0.5) as client:
            client.shutdown()
        await_true(lambda: not path.exists(), "the journal is removed")
    for file in path.glob("*") if path.exists() else ():
        file.unlink()
    if path.exists():
        path.rmdir()
