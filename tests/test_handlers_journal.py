"""Appends as the journal sees them, on the CPU device, for one lane and for four, in the CPU's shape and in the GPU's.

Invariants: records fill one segment after the other, in order, to the journal's end; what no segment holds is refused, what none is lent for is
dropped and counted; an owner that lends nonsense is not believed; without a journal a region can still be hashed and restored.
"""

import numpy as np
import pytest

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.scratch_journal import record_bytes
from concordia.device.host import HostDevice
from concordia.device.memory import Buffer
from kv_layouts import BLOCKS, GEOMETRIES, raw_of
from scratch_stream import LAYOUT, ScratchStream, tree_hash, wide


@pytest.mark.parametrize("segments", [1, 3, 60])
def test_blocks_count_in_order_over_segments_and_to_the_journal_s_end(shape: tuple[HostDevice, int], segments: int) -> None:
    """Groups of a task's blocks are chained while the next are on their way: a segment may end within a group, behind one, or for good."""
    geometry, count = GEOMETRIES["odd"], 90
    size, each = geometry.block_tokens, record_bytes(geometry.raw_bytes())
    random = np.random.default_rng(segments)
    buffers = [Buffer(BLOCKS * geometry.stride) for _ in range(geometry.layers)]
    layers = [np.frombuffer(buffer.view, np.uint8) for buffer in buffers]
    for layer in layers:
        layer[:] = random.integers(0, 256, layer.size, np.uint8)
    blocks = [int(block) for block in random.integers(0, BLOCKS, count)]
    for leaves in (1, 2, 5, 13, 14, 15, 20, 40):  # of a segment, which holds 1, 2, 5, 15, 16, 17, 23, 47 records
        room = min(count, segments * ((leaves * abi.LEAF_BYTES - 256) // each))
        most = min(60, leaves * abi.IDS_PER_LEAF)  # that a task may name
        parts = [range(first, min(first + most, count)) for first in range(0, count, most)]
        stream = ScratchStream(segments=segments, segment_bytes=leaves * abi.LEAF_BYTES)
        with Checkpointer(shape[0], stream.target, lanes=shape[1]) as checkpointer:
            region = checkpointer.register_kv(geometry, [buffer.address for buffer in buffers])
            answers = [
                checkpointer.wait(checkpointer.append_kv(
                    region, kind=abi.KIND_KV_BLOCK, key=9, incarnation=4, token_start=part.start * size, token_end=part.stop * size,
                    blocks=blocks[part.start : part.stop], step=3, is_each=True,
                ))
                for part in parts
            ]  # fmt: skip
            records = stream.records()
        for part, answer in zip(parts, answers, strict=True):
            done = max(0, min(part.stop, room) - part.start)
            assert answer.status == (abi.STATUS_OK if done == len(part) else abi.STATUS_JOURNAL_FULL)
            assert answer.result == done
            assert not done or answer.sequence == part.start + done - 1
        assert [record.header["token_start"] // size for record in records] == list(range(room))
        assert [record.payload for record in records] == [raw_of("odd", layers, [block]) for block in blocks[:room]]
        stream.close()


def test_tokens_find_the_next_segment_and_the_end_of_the_journal(shape: tuple[HostDevice, int]) -> None:
    geometry = GEOMETRIES["odd"]  # 192 bytes a token, a record of 640: 51 in a segment of 32 KiB
    buffers = [Buffer(BLOCKS * geometry.stride) for _ in range(geometry.layers)]
    stream = ScratchStream(segments=3, segment_bytes=1 << 15)
    with Checkpointer(shape[0], stream.target, lanes=shape[1]) as checkpointer:
        region = checkpointer.register_kv(geometry, [buffer.address for buffer in buffers])
        tasks = [
            checkpointer.kv_task(region, kind=abi.KIND_KV_TAIL, key=i, incarnation=1, token_start=i, token_end=i + 1, blocks=[i % BLOCKS], step=i)
            for i in range(200)
        ]  # fmt: skip
        with checkpointer.runtime.parked():
            tickets = checkpointer.submit_many(tasks)
        answers = [checkpointer.wait(ticket) for ticket in tickets]
        records = stream.records()
    room = 3 * ((32768 - 256) // record_bytes(geometry.tail_bytes(1)))
    assert room < 200
    assert [answer.status for answer in answers] == [abi.STATUS_OK] * room + [abi.STATUS_JOURNAL_FULL] * (200 - room)
    assert [wide(record.header["key"]) for record in records] == list(range(room))
    stream.close()


def test_record_is_refused_when_no_segment_holds_it(shape: tuple[HostDevice, int]) -> None:
    stream = ScratchStream(segment_bytes=8192)
    with Checkpointer(shape[0], stream.target, lanes=shape[1]) as checkpointer:
        largest = 8192 - 256 - 256 - 128
        for size, status in (
            (largest, abi.STATUS_OK),
            (largest + 1, abi.STATUS_TOO_LARGE),
            (100_000, abi.STATUS_TOO_LARGE),
        ):
            ticket = checkpointer.append_bytes(
                bytes(size), kind=abi.KIND_EVENT, key=1, incarnation=1
            )
            assert checkpointer.wait(ticket).status == status
    assert [len(record.payload) for record in stream.records()] == [largest]
    stream.close()


@pytest.mark.parametrize("size", [0, 1, 15, 16, 127, 128, 129, 4095, 4096, 4097, 65536, 70001])
def test_bytes_are_kept_when_appended(shape: tuple[HostDevice, int], size: int) -> None:
    payload = np.random.default_rng(size).bytes(size)
    stream = ScratchStream()
    with Checkpointer(shape[0], stream.target, lanes=shape[1]) as checkpointer:
        ticket = checkpointer.append_bytes(
            payload,
            kind=abi.KIND_TOKENS,
            key=3 << 100,
            incarnation=2,
            token_start=5,
            token_end=9,
            step=1,
        )
        answer = checkpointer.wait(ticket)
        assert (answer.status, answer.payload_hash) == (abi.STATUS_OK, tree_hash(payload))
    (record,) = stream.records()
    assert record.payload == payload
    header = record.header
    assert (header["kind"], wide(header["key"]), header["token_start"], header["token_end"]) == (
        abi.KIND_TOKENS,
        3 << 100,
        5,
        9,
    )
    assert (header["layout_hash"], header["region"]) == (LAYOUT, 0)
    stream.close()


def test_stream_goes_on_when_records_fill_many_segments(shape: tuple[HostDevice, int]) -> None:
    stream = ScratchStream(segments=40, segment_bytes=16384)
    random = np.random.default_rng(3)
    payloads = [random.bytes(int(random.integers(0, 9000))) for _ in range(70)]
    with Checkpointer(shape[0], stream.target, lanes=shape[1]) as checkpointer:
        tickets = [
            checkpointer.append_bytes(p, kind=abi.KIND_EVENT, key=1, incarnation=1)
            for p in payloads
        ]
        assert all(checkpointer.wait(ticket).is_ok for ticket in tickets)
        assert stream.word("committed_count") == len(payloads)
    assert [record.payload for record in stream.records()] == payloads
    stream.close()


def test_records_are_dropped_and_counted_when_no_segment_is_lent(
    shape: tuple[HostDevice, int],
) -> None:
    stream = ScratchStream(segment_bytes=8192, lend=0)
    with Checkpointer(shape[0], stream.target, lanes=shape[1]) as checkpointer:

        def put(payload: bytes) -> int:
            return checkpointer.wait(
                checkpointer.append_bytes(payload, kind=abi.KIND_EVENT, key=1, incarnation=1)
            ).status

        assert put(b"lost") == abi.STATUS_JOURNAL_FULL
        stream.lend(1)
        assert put(b"kept") == abi.STATUS_OK
        assert put(bytes(7168)) == abi.STATUS_JOURNAL_FULL
        assert put(b"small enough") == abi.STATUS_OK
        stream.lend(1)
        assert put(bytes(7168)) == abi.STATUS_OK
        assert checkpointer.stats()[1].dropped_count == 2
    assert [len(record.payload) for record in stream.records()] == [4, 12, 7168]
    stream.close()


@pytest.mark.parametrize("bit", [1, 15, 31, 32, 47, 63])
def test_appends_are_dropped_when_the_owner_lends_nonsense(shape: tuple[HostDevice, int], bit: int) -> None:
    stream = ScratchStream(segments=2, segment_bytes=8192)
    at = abi.STREAM_CONTROL.offsets()["lent"]
    stream.control.view[at + bit // 8] ^= 1 << bit % 8  # of segment number and ordinal, both 0
    before = bytes(stream.pool.view)
    with Checkpointer(shape[0], stream.target, lanes=shape[1]) as checkpointer:
        ticket = checkpointer.append_bytes(b"x", kind=abi.KIND_EVENT, key=1, incarnation=1)
        assert checkpointer.wait(ticket).status == abi.STATUS_JOURNAL_FULL
    assert bytes(stream.pool.view) == before
    stream.close()


def test_hash_and_apply_work_when_there_is_no_journal(shape: tuple[HostDevice, int]) -> None:
    geometry = GEOMETRIES["gpu-bf16"]
    buffers = [Buffer(BLOCKS * geometry.stride) for _ in range(geometry.layers)]
    with Checkpointer(shape[0], None, lanes=shape[1]) as checkpointer:
        region = checkpointer.register_kv(geometry, [buffer.address for buffer in buffers])
        ticket = checkpointer.hash_kv(
            region, kind=abi.KIND_KV_TAIL, token_start=0, token_end=2, blocks=[1]
        )
        assert checkpointer.wait(ticket).payload_hash == tree_hash(bytes(geometry.tail_bytes(2)))
        ticket = checkpointer.append_bytes(b"x", kind=abi.KIND_EVENT, key=1, incarnation=1)
        assert checkpointer.wait(ticket).status == abi.STATUS_JOURNAL_FULL
