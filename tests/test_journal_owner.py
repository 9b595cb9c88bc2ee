"""Invariants: one owner per journal; a seal beats a writer that goes on; a writer's death leaves every record that it was told is committed;
a router's death ends its replicas and keeps the KV; an owner's death loses nothing while somebody writes; leftovers are reported and
removed; nothing is left behind; wrong permissions, sizes and peers are refused. A fault test breaks with one child and proves life after."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import concordia
from concordia import abi, config
from concordia.errors import JournalError, JournalRefused
from concordia.journal import fence, folder, segment
from concordia.journal.client import JournalClient, StreamAttachment
from concordia.journal.desk import Peer
from concordia.journal.folder import Folder, fit_size, free_bytes
from concordia.journal.inspection import export, inspect, table, verify
from concordia.journal.owner import Owner, spawn_owner
from concordia.journal.place import Place
from concordia.journal.replicas import Replicas
from concordia.journal.writer import Entry, StreamWriter
from concordia.testing.journal import SmallJournal, key_payload

SEGMENT = 1 << 20
SIZE = 32 * SEGMENT
WAIT_S = 20.0


def await_true(condition: Callable[[], bool], what: str) -> None:
    """Poll with a bound; the condition is outside this process, so there is nothing to wait on."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        threading.Event().wait(0.01)


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


def start(journal: Path, *, size: int = SIZE, linger_s: float = 60.0) -> int:
    return spawn_owner(journal, size_bytes=size, segment_bytes=SEGMENT, linger_s=linger_s)


def open_rank(client: JournalClient, *, replica: int = 0, label: str = "rank 0") -> tuple[StreamAttachment, StreamWriter]:
    opened = client.open_stream(
        writer_kind=abi.WRITER_RANK, rank=0, world=1, replica=replica, layout_hash=5, label=label
    )
    return opened, writer_of(opened)


def writer_of(opened: StreamAttachment) -> StreamWriter:
    control = opened.board.control(opened.slot)
    return StreamWriter(opened.pool.view, control, segment_bytes=opened.pool.segment_bytes, stream=opened.stream)


def payload(sequence: int) -> bytes:
    return random.Random(sequence).randbytes(1 + sequence * 97 % 3000)


PRELUDE = """
import os, random, signal, struct, sys, threading
from pathlib import Path
from concordia import abi
from concordia.errors import JournalFull
from concordia.journal.client import JournalClient
from concordia.journal.writer import Entry, StreamWriter
from concordia.testing.journal import key_payload

journal, replica = Path(sys.argv[1]), int(sys.argv[2])
client = JournalClient.connect(journal)

def payload(sequence):
    return random.Random(sequence).randbytes(1 + sequence * 97 % 3000)

def tell(*words):
    print(*words, flush=True)

def open_rank(kind=abi.WRITER_RANK):
    s = client.open_stream(writer_kind=kind, rank=0, world=1, replica=replica, layout_hash=5, label="child")
    control = s.board.control(s.slot)
    return s, StreamWriter(s.pool.view, control, segment_bytes=s.pool.segment_bytes, stream=s.stream)
"""

# Appends for ever, and says so after each record: what it said must be found.
WRITER = """
s, w = open_rank()
tell("open", s.stream)
sequence = 0
while True:
    try:
        w.append(Entry(abi.KIND_KV_TAIL, 1, 1, sequence, sequence + 1), payload(sequence))
    except JournalFull:
        threading.Event().wait(0.001)
        continue
    sequence += 1
    tell(sequence)
"""

# A replica whose head has a child in a session of its own, as engines have workers.
REPLICA = """
import subprocess
s, w = open_rank()
for block in range(4):
    w.append(Entry(abi.KIND_KV_BLOCK, 1, 1, 4 * block, 4 * block + 4, flags=4), payload(block))
k, kw = open_rank(abi.WRITER_SCHEDULER)
kw.append(Entry(abi.KIND_BLOCK_KEY, 1, 1), key_payload({b: 100 + b for b in range(4)}))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
tell("ready", os.getpid(), child.pid)
while True:
    signal.pause()
"""

# A router that starts a replica in a session of its own and registers it.
ROUTER = """
import subprocess
source = Path(sys.argv[3]).read_text()
child = subprocess.Popen([sys.executable, "-c", source, str(journal), str(replica)], start_new_session=True, stdout=subprocess.PIPE, text=True)
words = child.stdout.readline().split()
client.register_replica(replica, session_id=child.pid)
tell(*words)
while True:
    signal.pause()
"""


class Child:
    """A Python process that talks line by line."""

    def __init__(self, source: str, *arguments: object, session: bool = False) -> None:
        environment = os.environ | {"PYTHONPATH": str(Path(concordia.__file__).parents[1])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(source), *map(str, arguments)],
            stdout=subprocess.PIPE,
            start_new_session=session,
            env=environment,
        )
        assert self.process.stdout is not None
        self.out = self.process.stdout.fileno()
        self.said = b""

    def line(self) -> list[str]:
        while b"\n" not in self.said:
            assert select.select([self.out], [], [], WAIT_S)[0], "the child says nothing"
            data = os.read(self.out, 1 << 16)
            assert data, "the child has ended"
            self.said += data
        line, self.said = self.said.split(b"\n", 1)
        return line.decode().split()

    def kill(self) -> str:
        """SIGKILL, and what it had said until then."""
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(WAIT_S)
        while data := os.read(self.out, 1 << 16):
            self.said += data
        self.process.stdout.close()
        return self.said.decode()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


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


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o707])
def test_journal_is_refused_when_others_may_touch_it(journal: Path, mode: int) -> None:
    journal.mkdir(mode=0o700)
    journal.chmod(mode)
    with pytest.raises(JournalRefused, match="mode"):
        start(journal)
    with pytest.raises(JournalRefused, match="mode"):
        JournalClient.connect(journal)
    with pytest.raises(JournalRefused, match="mode"):
        inspect(journal)
    assert list(journal.iterdir()) == []


def test_journal_is_refused_when_a_file_in_it_became_readable_to_others(journal: Path) -> None:
    start(journal)
    for name in ("pool", "board"):
        (journal / name).chmod(0o640)
        with pytest.raises(JournalRefused, match="0640"):
            segment.attach(Folder(journal))
        (journal / name).chmod(0o600)


def test_journal_is_refused_when_it_is_a_link_or_belongs_to_another(
    journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(JournalRefused, match="symbolic"):
        start(link)
    Folder(journal).make()
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(JournalRefused, match="belongs"):
        Folder(journal).check()


def test_journal_is_refused_with_the_cure_when_it_does_not_fit(journal: Path) -> None:
    with pytest.raises(JournalRefused, match="--journal-size"):
        start(journal, size=SEGMENT)
    assert not (journal / "pool").exists()
    with pytest.raises(JournalRefused, match="multiple of 4096"):
        spawn_owner(journal, size_bytes=SIZE, segment_bytes=SEGMENT + 1)
    assert fit_size(journal, 1 << 60, SEGMENT) <= free_bytes(journal) // 2 + SEGMENT
    assert fit_size(journal, None, SEGMENT) <= config.JOURNAL_BYTES_DEFAULT


def test_size_is_whole_segments_of_its_own_choice_when_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(2000):
        free, wanted = int(2 ** rng.uniform(24, 42)), int(2 ** rng.uniform(23, 40))
        monkeypatch.setattr(folder, "free_bytes", lambda _, free=free: free)
        room = min(wanted, free // 2)
        size = fit_size(tmp_path, wanted, None)
        segment_bytes = folder.choose_segment_bytes(size)
        assert segment_bytes == folder.choose_segment_bytes(room), (free, wanted)
        assert size % segment_bytes == 0, (free, wanted)
        assert room - segment_bytes < size <= room, (free, wanted)


def test_client_is_refused_in_time_when_there_is_no_owner(journal: Path) -> None:
    with pytest.raises(JournalRefused, match="there is no journal"):
        JournalClient.connect(journal)
    Folder(journal).make()
    began = time.monotonic()
    with pytest.raises(JournalRefused, match="no owner answers"):
        JournalClient.connect(journal, timeout_s=0.2)
    assert time.monotonic() - began < 5.0


def test_owner_answers_others_when_one_peer_sends_rubbish(journal: Path) -> None:
    start(journal)
    rubbish = [
        b"\n", b"{}\n", b"[]\n", b"nonsense\n", b'{"id":1,"op":"cut","args":{"key":-1}}\n', b"\xff\xfe\n",
        b'{"id":1,"op":"open_stream","args":{"nonce":"x"}}\n', b'{"id":1,"op":"__init__","args":{}}\n',
        b'{"id":1,"op":"cut","args":{"key":"1","tokens_known":1,"layout_hash":1,"world":1}}\n',
        b'{"id":1,"op":"match_prefix","args":{"keys":["a"],"layout_hash":1,"world":1}}\n',
        b"[" * 100_000 + b"\n",
    ]  # fmt: skip
    for line in rubbish:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(WAIT_S)
            peer.connect(str(journal / "owner.sock"))
            peer.sendall(line)
            assert "error" in json.loads(peer.makefile().readline()), line[:80]
    with JournalClient.connect(journal) as client:
        assert client.stats()["peers"] >= 1


def test_peer_is_cut_off_when_its_line_has_no_end(journal: Path) -> None:
    start(journal)
    with socket.socket(socket.AF_UNIX) as peer, JournalClient.connect(journal) as client:
        peer.settimeout(WAIT_S)
        peer.connect(str(journal / "owner.sock"))
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 2 * config.SOCKET_MESSAGE_BYTES_MAX:
                sent += peer.send(b"x" * (1 << 20))
        assert sent <= config.SOCKET_MESSAGE_BYTES_MAX + (8 << 20)
        assert client.stats()["peers"] == 1


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


def test_pool_lies_elsewhere_and_is_removed_when_another_place_is_named(journal: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    spawn_owner(journal, size_bytes=SIZE, segment_bytes=SEGMENT, linger_s=60.0, place=Place(place))
    assert place.stat().st_size == SIZE
    assert place.stat().st_mode & 0o777 == 0o600
    with JournalClient.connect(journal) as client:
        _, writer = open_rank(client)
        writer.append(Entry(abi.KIND_KV_TAIL, 1, 1, 0, 1), b"token")
        assert client.committed(1) == 1
        assert verify(journal).records == 1
        client.shutdown()
    await_true(lambda: not journal.exists() and not place.exists(), "both are removed")


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_file_that_is_there_is_left_as_it_is_when_a_pool_shall_lie_there(journal: Path, tmp_path: Path, mode: int) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"precious" * (SIZE // 8))
    theirs.chmod(mode)
    with pytest.raises(JournalRefused, match="theirs is there already, and is left as it is"):
        spawn_owner(journal, size_bytes=SIZE, segment_bytes=SEGMENT, linger_s=60.0, place=Place(theirs))
    assert theirs.read_bytes() == b"precious" * (SIZE // 8)
    with pytest.raises(JournalRefused, match="cannot allocate"):  # put there a moment after it was looked for
        segment.Pool.create(tmp_path / "pool", size=SIZE, segment_bytes=SEGMENT, at=theirs)
    Folder(tmp_path).clear()
    (tmp_path / "pool").symlink_to(theirs)  # in the place of one that an owner made
    Folder(tmp_path).clear()
    assert theirs.exists() == (mode == 0o644)


def test_pool_is_refused_in_one_line_when_it_cannot_lie_there(journal: Path, tmp_path: Path) -> None:
    for wrong, words in (
        (Path("/dev/null"), "no devdax device"),
        (tmp_path, "is there already"),
        (tmp_path / "none" / "pool", "there is no folder"),
    ):
        with pytest.raises(JournalRefused, match=words):
            spawn_owner(journal, size_bytes=SIZE, segment_bytes=SEGMENT, place=Place(wrong))
        assert not (journal / "pool").is_symlink()
    with pytest.raises(JournalRefused, match="cannot map"):  # a device that mmap does not take
        segment.Pool.create(tmp_path / "pool", size=SIZE, segment_bytes=SEGMENT, at=Path("/dev/null"))


def test_journal_and_pool_lie_where_their_maker_says_when_their_names_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spawn_owner(Path("journal"), size_bytes=SIZE, segment_bytes=SEGMENT, linger_s=60.0, place=Place(Path("records")))
    with JournalClient.connect(Path("journal")) as client:
        assert (tmp_path / "records").stat().st_size == SIZE
        client.shutdown()
    await_true(lambda: not (tmp_path / "journal").exists() and not (tmp_path / "records").exists(), "both are removed")


def test_pool_on_a_device_is_mapped_when_mmap_takes_it(tmp_path: Path) -> None:
    device = Path("/dev/zero")  # a character device, as devdax is
    pool = segment.Pool.create(tmp_path / "pool", size=4 * SEGMENT, segment_bytes=SEGMENT, at=device)
    pool.view[5 * 1000] = 7
    assert (pool.segment_count, pool.view[5 * 1000], pool.is_marked_free(3)) == (4, 7, True)
    pool.close()


def test_owner_does_not_wait_for_a_process_when_it_has_closed_its_streams(journal: Path) -> None:
    owner = start(journal, linger_s=0.2)
    with JournalClient.connect(journal) as client:
        opened, _ = open_rank(client)
        opened.close()
    await_true(lambda: not fence.is_alive(owner), "the owner ends although this process lives")


def test_client_says_so_when_it_is_used_after_fork(journal: Path) -> None:
    start(journal)
    with JournalClient.connect(journal) as client:
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                client.stats()
            except JournalError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.close(writer)
        assert b"fork" in os.read(reader, 1000)
        os.close(reader)
        os.wait()
        assert client.stats()["peers"] == 1


def test_key_news_and_finish_work_when_asked_through_the_socket(journal: Path) -> None:
    start(journal)
    with JournalClient.connect(journal) as client:
        opened, writer = open_rank(client, replica=7)
        scheduler = client.open_stream(
            writer_kind=abi.WRITER_SCHEDULER, rank=0, world=1, replica=7, layout_hash=5, label="scheduler"
        )
        big = (1 << 128) - 1
        writer.append(Entry(abi.KIND_KV_BLOCK, big, 1, 0, 4, flags=4), b"block")
        notes = writer_of(scheduler)
        notes.append(Entry(abi.KIND_BLOCK_KEY, big, 1), key_payload({0: big - 1}))
        first = client.key_news(layout_hash=5, world=1)
        assert (first.is_all, first.come) == (True, [big - 1])
        assert client.key_news(layout_hash=6, world=1).come == []
        assert client.key_news(layout_hash=5, world=1, after=first.cursor).is_nothing
        assert client.match_prefix([big - 1, 3], layout_hash=5, world=1).block_keys == [big - 1]
        client.finish(big)
        await_true(lambda: client.stats()["idle_blocks"] == 1, "the block has no request any more")
        assert client.key_news(layout_hash=5, world=1).come == [big - 1]
        writer.append(Entry(abi.KIND_KV_BLOCK, 9, 1, 0, 4, flags=4), b"block")
        notes.append(Entry(abi.KIND_BLOCK_KEY, 9, 1), key_payload({0: 8}))
        news = client.key_news(layout_hash=5, world=1, after=first.cursor)
        assert (news.is_all, news.come, news.gone) == (False, [8], [])
        # of another owner, whose numbers say nothing here
        assert client.key_news(layout_hash=5, world=1, after=news.cursor ^ 1 << 32).is_all
        opened.close()
        scheduler.close()
        assert {s["is_sealed"] for s in client.stats()["streams"] if s["writer_kind"] != abi.WRITER_CLEANER} == {True}


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


def is_mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


def test_files_are_unmapped_when_the_client_and_its_last_stream_are_closed(journal: Path) -> None:
    start(journal)
    with JournalClient.connect(journal) as client:
        client.map()
        assert is_mapped(journal / "pool")
    assert not is_mapped(journal)
    client = JournalClient.connect(journal)
    opened, writer = open_rank(client)
    client.close()
    writer.append(Entry(abi.KIND_KV_TAIL, 1, 1, 0, 1), b"x")  # an executor may still run
    opened.close()
    del opened, writer
    assert not is_mapped(journal)
    with JournalClient.connect(journal) as other:
        assert other.committed(1) == 1
        assert other.stats()["peers"] == 1, "a closed client hung up for good"


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
