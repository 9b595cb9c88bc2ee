"""serving/owner_keeper.py: the journal always has an owner, and everybody hears when it did not.

Invariants: a dead owner is noticed and told as a fault, another answers for the same journal; after the end nothing of it is left.
"""

from __future__ import annotations

import os
import pathlib
import signal
import time

import pytest

from concordia import config
from concordia.errors import JournalRefused
from concordia.journal.client import JournalClient
from concordia.journal.spawn import spawn_owner
from concordia.recovery.fault import Fault, FaultKind
from concordia.serving.owner_keeper import OwnerKeeper
from concordia.serving.process import read_process
from concordia.serving.process_tree import become_subreaper
from concordia.serving.protection import Protection


def test_journal_has_another_owner_when_the_first_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    become_subreaper()
    journal = pathlib.Path(f"/dev/shm/concordia-keeper-{os.getpid()}")
    keeper = OwnerKeeper(journal, size_bytes=config.JOURNAL_BYTES_MIN)
    faults: list[Fault] = []
    keeper.subscribe(faults.append)
    client = JournalClient.connect(journal)
    first = keeper.pid
    hit_ns = time.monotonic_ns()
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while keeper.pid == first and time.monotonic() < deadline:
        os.sched_yield()
    assert client.stats() is not None
    assert keeper.pid != first
    assert [f.kind for f in faults] == [FaultKind.OWNER_DEATH]
    assert faults[0].detected_ns - hit_ns < 2_000_000_000
    keeper.stop()
    client.shutdown()
    client.close()
    assert keeper.collect(timeout_s=10)
    assert not journal.exists()
    found = [read_process(pid) for pid in (first, keeper.pid)]
    assert all(p is None or not p.is_alive for p in found)


def test_owner_ends_when_nobody_can_connect_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    become_subreaper()
    journal = pathlib.Path(f"/dev/shm/concordia-keeper-{os.getpid()}")
    found: list[int] = []

    def refuse(journal: pathlib.Path) -> JournalClient:
        owner = spawn_owner(journal, size_bytes=None)  # the one that lives
        found.append(owner)
        raise JournalRefused("not yours")

    monkeypatch.setattr(JournalClient, "connect", refuse)
    with (
        pytest.raises(JournalRefused, match="not yours"),
        Protection.open(journal, size_bytes=config.JOURNAL_BYTES_MIN),
    ):
        pass
    owner = read_process(found[0])
    assert owner is None or not owner.is_alive
    assert not journal.exists()
