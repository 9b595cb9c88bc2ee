"""journal/privacy.py, and what the doctor says of it.

Invariants: an owner locks its pool where it may and says which; a machine that can swap and may not lock limits protection, with the cure.
"""

from __future__ import annotations

import os
import pathlib
import resource
import shutil

import pytest

from concordia import config
from concordia.journal import privacy
from concordia.journal.client import JournalClient
from concordia.journal.owner import spawn_owner
from concordia.serving import doctor


def locked_bytes(pid: int) -> int:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) << 10
    return 0


def test_owner_locks_its_pool_when_it_may() -> None:
    size = 8 << 20
    path = pathlib.Path("/dev/shm") / f"concordia-privacy-{os.getpid()}"
    shutil.rmtree(path, ignore_errors=True)
    pid = spawn_owner(path, size_bytes=size, segment_bytes=1 << 20)
    client = JournalClient.connect(path)
    most = privacy.lockable_bytes()
    assert client.stats()["is_locked"] == (locked_bytes(pid) >= size)
    assert client.stats()["is_locked"] or (most is not None and most < size + (1 << 20)), "it may, and did not"
    client.shutdown()
    client.close()


@pytest.mark.parametrize(
    ("has_swap", "most", "grade", "words"),
    [
        (False, 0, doctor.Grade.GOOD, "no swap"),
        (True, None, doctor.Grade.GOOD, "locked"),
        (True, config.JOURNAL_BYTES_DEFAULT, doctor.Grade.GOOD, "locked"),
        (True, 8 << 20, doctor.Grade.LIMITED, "swapped to disk"),
    ],
)
def test_doctor_says_whether_prompts_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch, has_swap: bool, most: int | None, grade: doctor.Grade, words: str
) -> None:
    monkeypatch.setattr(privacy, "has_swap", lambda: has_swap)
    monkeypatch.setattr(privacy, "lockable_bytes", lambda: most)
    found = next(f for f in doctor.examine().findings if f.name == "privacy")
    assert found.grade is grade
    assert words in found.found
    assert bool(found.advice) == (grade is doctor.Grade.LIMITED)


def test_limit_is_what_the_system_says_when_nobody_is_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 16, 1 << 20))
    monkeypatch.setattr(privacy, "_capabilities", lambda: 0)
    assert privacy.lockable_bytes() == 1 << 20
    monkeypatch.setattr(privacy, "_capabilities", lambda: 1 << 14)
    assert privacy.lockable_bytes() is None
