"""Invariants: what the compiled executor appends through a stream of a living owner is what readers get, byte for byte: headers, payloads,
chain, segments; whatever a kill leaves of it, every task that was answered is there; it takes the segments that the owner lends while it
runs. The two writers, compiled and Python, give the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import concordia
from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import KvGeometry, Plane
from concordia.journal import fence, record
from concordia.journal.client import JournalClient, StreamAttachment
from concordia.journal.inspection import export, verify
from concordia.journal.owner import spawn_owner
from concordia.journal.writer import Entry
from concordia.testing.journal import SmallJournal

SEGMENT = 1 << 20
WAIT_S = 30.0

GEOMETRY = KvGeometry(
    layers=2, block_count=8, block_tokens=4, block_bytes=2 * 4 * 2 * 8 * 2, heads=2, head_dim_key=8,
    head_dim_value=8, element_bytes=2,
    key=Plane(offset=0, head_stride=4 * 8 * 2, token_stride=8 * 2, element_stride=2),
    value=Plane(offset=2 * 4 * 8 * 2, head_stride=4 * 8 * 2, token_stride=8 * 2, element_stride=2),
    dtype="bf16", instruction_set="plain",
)  # fmt: skip


@pytest.fixture
def client(tmp_path: Path) -> Iterator[JournalClient]:
    path = Path("/dev/shm") / f"concordia-test-{os.getpid()}-{tmp_path.name}"
    spawn_owner(path, size_bytes=48 * SEGMENT, segment_bytes=SEGMENT, linger_s=60.0)
    with JournalClient.connect(path) as found:
        yield found
        owner = found.stats()["pid"]
        found.shutdown()
    deadline = time.monotonic() + WAIT_S
    while fence.is_alive(owner) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert not path.exists()


def open_rank(client: JournalClient, layout_hash: int = 5) -> StreamAttachment:
    return client.open_stream(
        writer_kind=abi.WRITER_RANK, rank=0, world=1, replica=7, layout_hash=layout_hash, label="rank 0"
    )


def payload(sequence: int) -> bytes:
    return random.Random(sequence).randbytes(sequence * 97 % 9000)


@pytest.mark.parametrize("lanes", [1, 4])
def test_reader_gets_what_the_executor_appended_over_many_segments(client: JournalClient, lanes: int) -> None:
    opened = open_rank(client)
    made: list[bytes] = []
    with Checkpointer.open("host", opened.target, lanes=lanes) as writer:
        control = opened.board.control(opened.slot)
        while control.taken_count < 6:
            sequence = len(made)
            made.append(payload(sequence))
            done = writer.wait(
                writer.append_bytes(
                    made[-1], kind=abi.KIND_KV_TAIL, key=sequence << 64 | 3, incarnation=sequence,
                    token_start=sequence, token_end=sequence + 1, step=9,
                )
            )  # fmt: skip
            assert (done.status, done.sequence) == (abi.STATUS_OK, sequence)
    opened.close()
    assert verify(client.journal).exit_code == 0
    lines = [line for line in export(client.journal, payloads=False) if line["stream"] == opened.stream]
    assert [line["sequence"] for line in lines] == list(range(len(made)))
    for sequence, line in enumerate(lines):
        at = line["pool_offset"]
        assert bytes(opened.pool.view[at : at + line["payload_bytes"]]) == made[sequence]
        assert line["payload_hash"] == f"{record.payload_hash(made[sequence]):032x}"
        assert line["key"] == f"{sequence << 64 | 3:032x}"
        assert (line["incarnation"], line["token_start"], line["token_end"], line["step"]) == (
            sequence, sequence, sequence + 1, 9,
        )  # fmt: skip


def test_kv_of_a_request_is_cut_byte_for_byte_when_the_executor_wrote_it(client: JournalClient) -> None:
    seed = 7
    print("seed", seed)
    layout = GEOMETRY.layout_hash()
    opened = open_rank(client, layout)
    memory = [
        np.frombuffer(random.Random(seed + layer).randbytes(GEOMETRY.block_count * GEOMETRY.block_bytes), np.uint8).copy()
        for layer in range(GEOMETRY.layers)
    ]
    with Checkpointer.open("host", opened.target) as writer:
        region = writer.register_kv(GEOMETRY, [layer.ctypes.data for layer in memory])
        blocks = [5, 2, 7]
        for index in range(2):
            ticket = writer.append_kv(
                region, kind=abi.KIND_KV_BLOCK, key=1, incarnation=1, token_start=4 * index,
                token_end=4 * index + 4, blocks=blocks[index : index + 1], step=1,
            )  # fmt: skip
        ticket = writer.append_kv(
            region, kind=abi.KIND_KV_TAIL, key=1, incarnation=1, token_start=8, token_end=11, blocks=blocks[2:], step=1
        )
        writer.wait(ticket)
        assert client.committed(1) == 11
        assert sum(client.seal_replica(7).values()) == 3
        cut = client.cut(1, tokens_known=12, layout_hash=layout, world=1)
        assert cut.tokens == 11
        fresh = [np.zeros_like(layer) for layer in memory]
        target = writer.register_kv(GEOMETRY, [layer.ctypes.data for layer in fresh])
        for piece in cut.pieces[0]:
            done = writer.wait(
                writer.apply_kv(
                    target, kind=piece.kind, token_start=piece.token_start, token_end=piece.token_end,
                    blocks=[blocks[piece.token_start // 4]], payload_bytes=piece.payload_bytes,
                    payload_address=opened.target.pool_address + piece.pool_offset,
                    payload_hash=piece.payload_hash,
                )
            )  # fmt: skip
            assert done.status == abi.STATUS_OK
    for layer, (old, new) in enumerate(zip(memory, fresh, strict=True)):
        for index in range(2):
            span = slice(blocks[index] * GEOMETRY.block_bytes, (blocks[index] + 1) * GEOMETRY.block_bytes)
            assert bytes(old[span]) == bytes(new[span]), f"layer {layer}, block {index}"
        for plane, dim in ((GEOMETRY.key, 8), (GEOMETRY.value, 8)):
            for head in range(2):
                at = blocks[2] * GEOMETRY.block_bytes + plane.offset + head * plane.head_stride
                size = 3 * dim * 2
                assert bytes(old[at : at + size]) == bytes(new[at : at + size]), f"tail of layer {layer}"
                assert not new[at + size : at + plane.head_stride].any()
    opened.close()


def test_both_writers_make_the_same_bytes_when_given_the_same_records(tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=16, segment_bytes=1 << 16) as journal:
        raw: list[list[bytes]] = []
        for is_compiled in (False, True):
            stream, python = journal.open()
            found = []
            with contextlib.ExitStack() as stack:
                if is_compiled:
                    target = StreamAttachment(None, stream.control.slot, 0, journal.pool, journal.board).target  # type: ignore[arg-type]
                    compiled = stack.enter_context(Checkpointer.open("host", target))
                for index in range(30):
                    journal.streams.lend(stream)
                    if is_compiled:
                        done = compiled.wait(
                            compiled.append_bytes(payload(index), kind=6, key=index, incarnation=2, token_start=3, token_end=4, step=5)
                        )
                        assert done.status == abi.STATUS_OK
                    else:
                        python.append(Entry(6, index, 2, 3, 4, 5), payload(index))
            for made in stream.reader.read(100):
                header = made._replace(
                    salt=0, previous_hash=0, header_hash=0, offset=0, handler_hash=0, stamp_ns=0, layout_hash=0
                )
                end = made.end_offset - abi.LINE_BYTES
                found.append(record.pack_record(header) + bytes(journal.pool.view[made.payload_offset : end]))
                word = int.from_bytes(journal.pool.view[end : end + 8], "little")
                assert word == abi.commit_word(made.salt, made.sequence)
            assert len(set(stream.segments.values())) > 2
            raw.append(found)
        assert len(raw[0]) == 30
        assert raw[0] == raw[1]


CHILD = """
import random, sys
from pathlib import Path
from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.journal.client import JournalClient

def payload(sequence):
    return random.Random(sequence).randbytes(sequence * 97 % 9000)

client = JournalClient.connect(Path(sys.argv[1]))
opened = client.open_stream(writer_kind=abi.WRITER_RANK, rank=0, world=1, replica=7, layout_hash=5, label="child")
writer = Checkpointer.open("host", opened.target, lanes=int(sys.argv[2]))
print(opened.stream, flush=True)
sequence = 0
while True:
    tickets = [
        writer.append_bytes(payload(n), kind=abi.KIND_KV_TAIL, key=1, incarnation=1, token_start=n, token_end=n + 1)
        for n in range(sequence, sequence + 8)
    ]
    for ticket in tickets:
        if writer.wait(ticket).status != abi.STATUS_OK:
            sys.exit("a record was lost")
        sequence += 1
        print(sequence, flush=True)
"""


@pytest.mark.parametrize("seed", range(3))
def test_every_answered_record_is_there_when_the_engine_is_killed(client: JournalClient, seed: int) -> None:
    print("seed", seed)
    chance = random.Random(seed)
    environment = os.environ | {"PYTHONPATH": str(Path(concordia.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(client.journal), str(chance.choice([1, 4]))],
        stdout=subprocess.PIPE, env=environment,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        said = b""
        stop = chance.randint(1, 1500)
        deadline = time.monotonic() + WAIT_S
        while said.count(b"\n") <= stop:
            assert select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
            data = os.read(child.stdout.fileno(), 1 << 16)
            assert data, "the child has ended"
            said += data
        child.kill()
        while data := os.read(child.stdout.fileno(), 1 << 16):
            said += data
    lines = said[: said.rfind(b"\n")].split()
    stream, answered = int(lines[0]), int(lines[-1])
    sealed = client.seal_replica(7)[stream]
    assert sealed >= answered
    cut = client.cut(1, tokens_known=1 << 20, layout_hash=5, world=1)
    assert cut.tokens == sealed
    pool, _ = client.map()
    for piece in cut.pieces[0]:
        got = bytes(pool.view[piece.pool_offset : piece.pool_offset + piece.payload_bytes])
        assert got == payload(piece.token_start)
    report = verify(client.journal)
    assert report.damage == []
    assert client.stats()["corruptions"] == 0
