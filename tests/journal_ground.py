"""A journal of tests with an owner, its writers, and processes that talk line by line."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import concordia
from concordia import abi
from concordia.journal.client import JournalClient, StreamAttachment
from concordia.journal.owner import spawn_owner
from concordia.journal.writer import StreamWriter

SEGMENT = 1 << 20
SIZE = 32 * SEGMENT
WAIT_S = 20.0


def await_true(condition: Callable[[], bool], what: str) -> None:
    """Poll with a bound; the condition is outside this process, so there is nothing to wait on."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        threading.Event().wait(0.01)


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
