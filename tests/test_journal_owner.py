"""Invariants: one owner per journal; a seal beats a writer that goes on; a writer's death leaves every record that it was told is committed;
a router's death ends its replicas and keeps the KV; an owner's death loses nothing while somebody writes; leftovers are reported and
removed; nothing is left behind. A fault test breaks with one child and proves life after."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from concordia import abi, config
from concordia.errors import JournalError
from concordia.journal import fence
from concordia.journal.client import JournalClient
from concordia.journal.desk import Peer
from concordia.journal.folder import Folder
from concordia.journal.inspection import export, inspect, table, verify
from concordia.journal.owner import Owner
from concordia.journal.replicas import Replicas
from concordia.journal.writer import Entry
from concordia.testing.journal import SmallJournal
from journal_ground import (
    PRELUDE,
    REPLICA,
    ROUTER,
    SEGMENT,
    SIZE,
    WAIT_S,
    WRITER,
    Child,
    await_true,
    open_rank,
    payload,
    start,
    writer_of,
)

pytest_plugins = ["journal_fixtures"]


def test_second_owner_is_the_first_when_one_lives(journal: Path) -> None:
    first = start(journal)
    assert start(journal) == first
    assert os.getsid(first) == first != os.getsid(0)
    assert journal.stat().st_mode & 0o777 == 0o700
    assert {p.name: p.stat().st_mode & 0o777 for p in journal.iterdir()} == dict.fromkeys(("pool", "board", "owner.sock", "owner.lock", "owner.log"), 384)
    with JournalClient.connect(journal) as client:
        assert client.stats()["size_bytes"] == SIZE


def test_one_owner_answers_when_many_start_one_at_the_same_time(journal: Path) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(start(journal))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(found) == 4
    assert len(set(found)) == 1


def test_files_are_gone_when_nobody_was_attached_for_the_time_of_linger(journal: Path) -> None:
    owner = start(journal, linger_s=0.0)
    await_true(lambda: not journal.exists() and not fence.is_alive(owner), "the owner ends by itself")


def test_owner_stays_while_a_writer_lives_and_goes_after_it(journal: Path) -> None:
    owner = start(journal, linger_s=0.5)
    with JournalClient.connect(journal), Child(WRITER, journal, 0) as child:
        assert child.line()[0] == "open"
        while int(child.line()[0]) < 200:
            pass
        assert fence.is_alive(owner)
    await_true(lambda: not journal.exists(), "the owner ends after its last writer")


def test_owner_removes_everything_when_told_to_end(journal: Path) -> None:
    owner = start(journal)
    os.kill(owner, signal.SIGTERM)
    await_true(lambda: not journal.exists() and not fence.is_alive(owner), "SIGTERM ends the owner")


@pytest.mark.parametrize("seed", range(4))
def test_every_record_that_was_acknowledged_is_there_when_the_writer_is_killed(journal: Path, seed: int) -> None:
    print("seed", seed)
    start(journal)
    with JournalClient.connect(journal) as client, Child(WRITER, journal, 7) as child:
        stream = int(child.line()[1])
        stop = random.Random(seed).randint(1, 900)
        acknowledged = 0
        while acknowledged < stop:
            acknowledged = int(child.line()[0])
        lines = child.kill().splitlines(keepends=True)
        acknowledged = max([acknowledged] + [int(line) for line in lines if line.endswith("\n")])
        sealed = client.seal_replica(7)
        assert sealed[stream] >= acknowledged
        cut = client.cut(1, tokens_known=1 << 20, layout_hash=5, world=1)
        assert cut.tokens == sealed[stream]
        pool, _ = client.map()
        for piece in cut.pieces[0]:
            got = bytes(pool.view[piece.pool_offset : piece.pool_offset + piece.payload_bytes])
            assert got == payload(piece.token_start)
    assert verify(journal).damage == []


def test_nothing_after_the_seal_is_read_when_a_zombie_goes_on_writing(journal: Path) -> None:
    start(journal)
    with JournalClient.connect(journal) as client, Child(WRITER, journal, 7) as child:
        stream = int(child.line()[1])
        while int(child.line()[0]) < 50:
            pass
        sealed = client.seal_replica(7)[stream]
        cut = client.cut(1, tokens_known=1 << 20, layout_hash=5, world=1)
        assert cut.tokens == sealed >= 50
        while int(child.line()[0]) < sealed + 100:
            pass
        assert client.cut(1, tokens_known=1 << 20, layout_hash=5, world=1).tokens == sealed
        assert client.committed(1) == sealed
        assert client.committed_all([2, 1]) == [0, sealed]
        assert client.seal_replica(7)[stream] == sealed
        with pytest.raises(JournalError, match="sealed"):
            open_rank(client, replica=7)
        with pytest.raises(JournalError, match="lives"):
            client.release_replica(7)
    assert len([r for r in export(journal, payloads=False) if r["stream"] == stream]) == sealed


def test_seal_waits_for_no_rescan_when_many_records_were_read_before(journal: Path) -> None:
    start(journal)
    with JournalClient.connect(journal) as client:
        _, writer = open_rank(client, replica=7)
        for sequence in range(5000):
            writer.append(Entry(abi.KIND_KV_TAIL, 1, 1, sequence, sequence + 1), b"x")
            if sequence % 500 == 0:
                client.committed(1)
        client.committed(1)
        began = time.monotonic()
        client.seal_replica(7)
        assert client.cut(1, tokens_known=5001, layout_hash=5, world=1).tokens == 5000
        assert time.monotonic() - began < 1.0


def test_replicas_are_killed_and_their_kv_stays_when_their_router_dies(journal: Path, tmp_path: Path) -> None:
    start(journal)
    source = tmp_path / "replica.py"
    source.write_text(PRELUDE + REPLICA)
    with JournalClient.connect(journal) as client, Child(ROUTER, journal, 7, source) as router:
        words = router.line()
        assert words[0] == "ready"
        head, worker = int(words[1]), int(words[2])
        assert fence.is_alive(head)
        assert fence.is_alive(worker)
        assert [r["replica"] for r in inspect(journal)["replicas"]] == [7]
        router.kill()
        await_true(lambda: not fence.is_alive(head) and not fence.is_alive(worker), "head and worker end")
        await_true(lambda: not inspect(journal)["replicas"], "the replica is released")
        cut = client.match_prefix([100, 101, 102, 103], layout_hash=5, world=1)
        assert cut.tokens == 16
        pool, _ = client.map()
        for block, piece in enumerate(cut.pieces[0]):
            got = bytes(pool.view[piece.pool_offset : piece.pool_offset + piece.payload_bytes])
            assert got == payload(block)
    assert fence.is_alive(inspect(journal)["owner_pid"])


def test_released_replica_gives_its_segments_back_when_its_session_is_gone(journal: Path) -> None:
    start(journal)
    with JournalClient.connect(journal) as client, Child(REPLICA, journal, 7, session=True) as child:
        words = child.line()
        client.register_replica(7, session_id=child.process.pid)
        free = client.stats()["segments_free"]
        client.seal_replica(7)
        client.finish(1)
        assert client.stats()["segments_free"] <= free
        client.release_replica(7)  # it lives: the owner sees to it
        await_true(lambda: not fence.is_alive(int(words[1])) and not fence.is_alive(int(words[2])), "the session ends")
        await_true(lambda: client.stats()["segments_free"] > free, "its segments come back")
        assert client.release_replica(7)


def test_streams_go_on_when_the_owner_is_killed_and_another_adopts(journal: Path) -> None:
    first = start(journal)
    with JournalClient.connect(journal) as client, Child(WRITER, journal, 7) as child:
        opened, _ = open_rank(client, replica=9, label="sealed before")
        writer_of(opened).append(Entry(abi.KIND_EVENT, 2, 1), b'{"event":"before"}')
        sealed_before = client.seal_replica(9)
        stream = int(child.line()[1])
        while int(child.line()[0]) < 100:
            pass
        os.kill(first, signal.SIGKILL)
        await_true(lambda: not fence.is_alive(first), "the owner is dead")
        second = start(journal)
        assert second != first
        count = 0
        while count < 2000:  # more than was lent before: the new owner lends
            count = int(child.line()[0])
        assert client.committed(1) >= 1999
        assert client.seal_replica(9) == sealed_before
        with pytest.raises(JournalError, match="sealed"):
            open_rank(client, replica=9)
        _, events = client.events(1 << 32 | 5)  # a cursor of the owner before
        assert [e["event"] for e in events if e["event"] != "full"] == ["before"]
        child.kill()
        assert client.seal_replica(7)[stream] >= count
        assert client.stats()["epoch"] == 2
        assert client.stats()["corruptions"] == 0
    assert verify(journal).exit_code == 0


def test_replicas_are_killed_when_router_and_owner_died_and_another_owner_adopts(journal: Path, tmp_path: Path) -> None:
    first = start(journal)
    source = tmp_path / "replica.py"
    source.write_text(PRELUDE + REPLICA)
    with Child(ROUTER, journal, 7, source) as router:
        words = router.line()
        os.kill(first, signal.SIGKILL)
        router.kill()
        assert fence.is_alive(int(words[1]))
        start(journal)
        await_true(lambda: not fence.is_alive(int(words[1])) and not fence.is_alive(int(words[2])), "both end")
        with JournalClient.connect(journal) as client:
            assert client.match_prefix([100, 101, 102, 103], layout_hash=5, world=1).tokens == 16


def test_sealed_replica_is_ended_and_released_when_the_owner_died_before_it_did_so(journal: Path) -> None:
    first = start(journal)
    with JournalClient.connect(journal) as client, Child(REPLICA, journal, 7, session=True) as child:
        words = child.line()
        client.register_replica(7, session_id=child.process.pid)
        client.seal_replica(7)
        client.finish(1)
        os.kill(first, signal.SIGKILL)
        await_true(lambda: not fence.is_alive(first), "the owner is dead")
        start(journal)
        try:
            await_true(lambda: not fence.is_alive(int(words[1])) and not fence.is_alive(int(words[2])), "the session ends")
        finally:  # a worker that lives would keep our pipe open
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(words[2]), signal.SIGKILL)
        await_true(lambda: not inspect(journal)["replicas"], "the replica is released")
        assert client.release_replica(7)


def test_fence_is_repeated_and_told_once_when_a_session_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def step(_: fence.Fence) -> bool:
        nonlocal looks
        looks += 1
        return looks > 3

    monkeypatch.setattr(fence.Fence, "step", step)
    monkeypatch.setattr(config, "FENCE_WAIT_S", 0.0)
    with SmallJournal(tmp_path / "journal") as small:
        replicas = Replicas(small.streams)
        replicas.register(7, session=4711, router_pid=os.getpid())
        assert not replicas.release(7)
        for _ in range(2):
            assert not replicas.release(7)
        assert replicas.is_fencing
        replicas.step()
        assert not replicas.is_fencing
        assert [e["event"] for _, e in small.streams.index.events] == ["unfenced"]
        assert replicas.release(7)


def test_leftovers_are_reported_and_removed_when_nobody_writes_any_more(journal: Path) -> None:
    first = start(journal)
    with Child(WRITER, journal, 7) as child:
        while int(child.line()[-1]) < 10 or not child.process:
            pass
        os.kill(first, signal.SIGKILL)
        child.kill()
    await_true(lambda: not fence.is_alive(first), "the owner is dead")
    left = journal / "pool"
    inode = left.stat().st_ino
    second = start(journal)
    assert second != first
    assert left.stat().st_ino != inode
    assert f"owner {first} of {journal} died" in (journal / "owner.log").read_text()
    with JournalClient.connect(journal) as client:
        assert [e["files"] for e in client.events()[1]] == [["pool", "board", "owner.sock"]]
        assert client.stats()["streams"] == []
        assert client.stats()["segments_free"] == 32


def test_garbage_is_removed_when_it_lies_where_a_journal_should(journal: Path) -> None:
    Folder(journal).make()
    for name in ("pool", "board", "owner.sock"):
        (journal / name).write_bytes(b"garbage")
        (journal / name).chmod(0o600)
    start(journal)
    with JournalClient.connect(journal) as client:
        assert client.stats()["segments_free"] == 32


def test_writers_lose_records_loudly_and_go_on_when_the_journal_is_full(journal: Path) -> None:
    start(journal, size=8 * SEGMENT)
    with JournalClient.connect(journal) as client, Child(WRITER, journal, 7) as child:
        child.line()
        count = 0
        while count < 6000:  # some 9 MB into 8 MiB, for one request that never ends
            count = int(child.line()[0])
        stats = client.stats()
        _, events = client.events()
        assert stats["unprotected_requests"] > 0
        assert any(e["event"] == "unprotected" and e["reason"] == "the journal is full" for e in events)
        assert stats["corruptions"] == 0
    assert verify(journal).damage == []


def test_tools_show_what_is_there_when_the_owner_lives_and_when_it_is_dead(journal: Path) -> None:
    owner = start(journal)
    with JournalClient.connect(journal) as client:
        opened, writer = open_rank(client, replica=7)
        for sequence in range(20):
            writer.append(Entry(abi.KIND_KV_TAIL, 1, 1, sequence, sequence + 1), payload(sequence))
        for is_alive in (True, False):
            if not is_alive:
                os.kill(owner, signal.SIGKILL)
                await_true(lambda: not fence.is_alive(owner), "the owner is dead")
            facts = inspect(journal)
            assert facts["owner_alive"] is is_alive
            assert [(s["label"], s["records"], s["state"]) for s in facts["streams"]] == [("rank 0", 20, "open")]
            assert "rank 0" in table(facts)
            assert json.loads(json.dumps(facts)) == facts
            assert (verify(journal).records, verify(journal).exit_code) == (20, 0)
            lines = list(export(journal, payloads=True))
            assert [line["sequence"] for line in lines] == list(range(20))
            assert "payload" not in next(export(journal, payloads=False))
        at = lines[3]["pool_offset"]
        opened.pool.view[at] ^= 0x10
        assert verify(journal).exit_code == 3
        assert "payload of record 3" in verify(journal).damage[0]
        opened.pool.view[at] ^= 0x10
        opened.pool.view[lines[19]["pool_offset"] - 256 + 200] ^= 1  # the last record's header
        assert verify(journal).exit_code == 3
        opened.board.control(opened.slot).store("committed_count", 19)
        report = verify(journal)
        assert (report.exit_code, len(report.torn), report.records) == (0, 1, 19)


def test_owner_does_not_wait_for_a_process_when_it_has_closed_its_streams(journal: Path) -> None:
    owner = start(journal, linger_s=0.2)
    with JournalClient.connect(journal) as client:
        opened, _ = open_rank(client)
        opened.close()
    await_true(lambda: not fence.is_alive(owner), "the owner ends although this process lives")


def test_owner_goes_on_and_says_so_when_its_cleaner_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SmallJournal(tmp_path / "journal") as small:
        owner = Owner(small.home, small.pool, small.board, linger_s=60.0)
        owner.listen()

        def refuse() -> None:
            raise JournalError("no slot")

        monkeypatch.setattr(owner.cleaner, "step", refuse)
        for _ in range(3):
            owner.round()
        assert [e["reason"] for _, e in owner.streams.index.events] == ["no slot"]
        owner.desk.close()


def test_owner_forgets_whom_it_answered_when_the_streams_are_gone(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal") as small:
        owner = Owner(small.home, small.pool, small.board, linger_s=60.0)
        owner.streams.free.extend(range(4))
        peer = Peer(socket.socket(), os.getpid())
        asked = {"writer_kind": abi.WRITER_RANK, "rank": 0, "world": 1, "replica": 0, "layout_hash": 5, "label": "x"}
        for turn in range(20):
            answer = owner.office.answer(peer, "open_stream", {**asked, "nonce": str(turn)})
            assert owner.office.answer(peer, "open_stream", {**asked, "nonce": str(turn)}) == answer
            owner.office.answer(peer, "close_stream", answer)
            owner.streams.give_back_empty()
        assert len(owner.office._opened) == 1
        peer.connection.close()
