"""Every KV handler against numpy, bit for bit, on the CPU device.

Invariants: a record holds exactly the bytes of its range in the promised order, for every layout met so far, for one lane and for four,
in the CPU's shape and in the GPU's; its hash is what the xxhash library computes; a restore writes exactly its range, and nothing at all
when the payload is not what was promised; what does not exist is refused, never touched.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import Region
from concordia.device.compiler import HostCompiler
from concordia.device.host import HostDevice
from concordia.device.memory import Buffer
from concordia.errors import DeviceError, UsageError
from concordia.journal.control import Lent
from concordia.journal.ledger import Source
from concordia.journal.replay import ReplayIndex
from concordia.journal.stream import StreamReader
from concordia.recovery.restore import plan_restore, verify
from kv_layouts import BLOCKS, GEOMETRIES, Bytes, raw_of, tail_of
from scratch_stream import STREAM, ScratchStream, tree_hash, wide


@dataclass
class Setup:
    name: str
    checkpointer: Checkpointer
    stream: ScratchStream
    layers: list[Bytes]
    region: Region

    def ranges(self) -> list[tuple[int, int, int, list[int]]]:
        """Kind, token range, blocks: one token, part of a block, over three blocks, blocks whole and begun."""
        size = self.region.geometry.block_tokens
        tail, block = abi.KIND_KV_TAIL, abi.KIND_KV_BLOCK
        return [
            (tail, 0, 1, [3]),
            (tail, size - 1, size, [5]),
            (tail, 3, size - 2, [0]),
            (tail, 7 * size + size // 2, 9 * size + 3, [4, 1, 2]),
            (block, 2 * size, 3 * size, [1]),
            (block, 0, 2 * size, [5, 0]),
            (block, size, size + 3, [2]),
        ]

    def expected(self, kind: int, start: int, end: int, blocks: list[int]) -> bytes:
        if kind == abi.KIND_KV_BLOCK:
            return raw_of(self.name, self.layers, blocks)
        return tail_of(self.name, self.layers, start, end, blocks)


@pytest.fixture(params=GEOMETRIES)
def setup(request: pytest.FixtureRequest, shape: tuple[HostDevice, int]) -> Iterator[Setup]:
    geometry = GEOMETRIES[request.param]
    random = np.random.default_rng(5)
    buffers = [Buffer(BLOCKS * geometry.stride) for _ in range(geometry.layers)]
    layers = [np.frombuffer(buffer.view, np.uint8) for buffer in buffers]
    for layer in layers:
        layer[:] = random.integers(0, 256, layer.size, np.uint8)
    stream = ScratchStream()
    with Checkpointer(shape[0], stream.target, lanes=shape[1]) as checkpointer:
        region = checkpointer.register_kv(geometry, [buffer.address for buffer in buffers])
        yield Setup(request.param, checkpointer, stream, layers, region)
    stream.close()


def append(setup: Setup, kind: int, start: int, end: int, blocks: list[int]) -> int:
    return setup.checkpointer.append_kv(
        setup.region,
        kind=kind,
        key=(7 << 64) | 9,
        incarnation=4,
        token_start=start,
        token_end=end,
        blocks=blocks,
        step=12,
        model_hash=(1 << 64) - 21,
    )


Wanted = tuple[int, int, int, list[int]]


def apply(setup: Setup, wanted: Wanted, *, address: int, payload: bytes, promised: int) -> int:
    kind, start, end, blocks = wanted
    ticket = setup.checkpointer.apply_kv(
        setup.region, kind=kind, token_start=start, token_end=end, blocks=blocks,
        payload_address=address, payload_bytes=len(payload), payload_hash=promised,
    )  # fmt: skip
    return setup.checkpointer.wait(ticket).status


def test_records_hold_the_bytes_of_their_range_when_appended(setup: Setup) -> None:
    tickets = [append(setup, *wanted) for wanted in setup.ranges()]
    answers = [setup.checkpointer.wait(ticket) for ticket in tickets]
    records = setup.stream.records()
    assert [answer.status for answer in answers] == [abi.STATUS_OK] * len(tickets)
    assert [answer.sequence for answer in answers] == list(range(len(tickets)))
    for wanted, answer, record in zip(setup.ranges(), answers, records, strict=True):
        expected = setup.expected(*wanted)
        assert record.payload == expected, wanted
        assert answer.payload_hash == wide(record.header["payload_hash"]) == tree_hash(expected)
        header, geometry = record.header, setup.region.geometry
        assert (header["kind"], header["token_start"], header["token_end"]) == wanted[:3]
        assert (wide(header["key"]), header["incarnation"], header["step"]) == (
            (7 << 64) | 9,
            4,
            12,
        )
        assert (header["region"], header["layout_hash"]) == (1, geometry.layout_hash())
        assert (header["flags"], header["handler_hash"]) == (
            geometry.block_tokens,
            setup.region.append.digest,
        )
        assert header["stamp_ns"] > 0
        assert header["model_hash"] == (1 << 64) - 21


def test_whole_blocks_of_one_task_are_records_of_their_own(setup: Setup) -> None:
    size, blocks = setup.region.geometry.block_tokens, [5, 0, 1, 3, 2]
    words = {"kind": abi.KIND_KV_BLOCK, "key": 9, "incarnation": 4, "step": 12, "is_each": True}
    submit, wait = setup.checkpointer.append_kv, setup.checkpointer.wait
    answers = [
        wait(submit(setup.region, token_start=3 * size, token_end=8 * size, blocks=blocks, **words)),
        wait(submit(setup.region, token_start=0, token_end=size, blocks=[4], **words)),
    ]
    expected = [raw_of(setup.name, setup.layers, [block]) for block in [*blocks, 4]]
    records = setup.stream.records()
    assert [record.payload for record in records] == expected
    assert [wide(record.header["payload_hash"]) for record in records] == [tree_hash(payload) for payload in expected]
    found = [(record.header["token_start"] // size, record.header["token_end"] // size) for record in records]
    assert found == [(3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (0, 1)]
    assert [(answer.status, answer.result, answer.sequence) for answer in answers] == [(abi.STATUS_OK, 5, 4), (abi.STATUS_OK, 1, 5)]
    assert answers[0].payload_hash == tree_hash(expected[4])
    for start, end, kind in ((0, size + 1, abi.KIND_KV_BLOCK), (1, size + 1, abi.KIND_KV_BLOCK), (0, 2 * size, abi.KIND_KV_TAIL)):
        ticket = submit(setup.region, token_start=start, token_end=end, blocks=[1, 2], **(words | {"kind": kind}))
        assert wait(ticket).status == abi.STATUS_BAD_TASK
    assert len(setup.stream.records()) == 6


def test_tokens_of_many_requests_are_a_record_each_in_their_order(setup: Setup) -> None:
    """On the GPU's shape those that wait together share one way through the handler; what is among them that is no single token, or names
    no block, has its own."""
    size, checkpointer = setup.region.geometry.block_tokens, setup.checkpointer
    rng = random.Random(seed := random.randrange(1 << 30))
    print("seed", seed)
    words = {"incarnation": 4, "step": 12, "model_hash": 21}
    tasks, expected, statuses = [], [], []
    for i in range(60):
        token, block = rng.randrange(9 * size), rng.randrange(BLOCKS)
        kind, end, blocks, status = abi.KIND_KV_TAIL, token + 1, [block], abi.STATUS_OK
        if i % 13 == 5:
            blocks, status = [BLOCKS], abi.STATUS_BAD_TASK
        elif i % 11 == 7:
            token, end, kind = 0, size, abi.KIND_KV_BLOCK
        tasks.append(checkpointer.kv_task(setup.region, kind=kind, key=(1 << 64) + i, token_start=token, token_end=end, blocks=blocks, **words))
        statuses.append(status)
        if status == abi.STATUS_OK:
            expected.append((i, token, end, setup.expected(kind, token, end, blocks)))
    with checkpointer.runtime.parked():  # so that they are found together
        tickets = checkpointer.submit_many(tasks)
    answers = [checkpointer.wait(ticket) for ticket in tickets]
    assert [answer.status for answer in answers] == statuses
    good = [answer for answer in answers if answer.is_ok]
    assert [answer.sequence for answer in good] == list(range(len(expected)))
    records = setup.stream.records()
    assert len(records) == len(expected)
    for (i, start, end, payload), record, answer in zip(expected, records, good, strict=True):
        header = record.header
        assert record.payload == payload
        assert wide(header["payload_hash"]) == answer.payload_hash == tree_hash(payload)
        assert (wide(header["key"]), header["token_start"], header["token_end"]) == ((1 << 64) + i, start, end)
        assert (header["incarnation"], header["step"], header["model_hash"], header["stamp_ns"] > 0) == (4, 12, 21, True)
    stats = checkpointer.runtime.stats()
    assert stats.submitted == stats.done >= 60


def test_hash_is_that_of_an_append_when_nothing_changed(setup: Setup) -> None:
    for kind, start, end, blocks in setup.ranges():
        ticket = setup.checkpointer.hash_kv(
            setup.region, kind=kind, token_start=start, token_end=end, blocks=blocks
        )
        assert setup.checkpointer.wait(ticket).payload_hash == tree_hash(
            setup.expected(kind, start, end, blocks)
        )
    assert setup.stream.records() == []


def test_apply_writes_exactly_its_range_when_the_hash_is_right(setup: Setup) -> None:
    saved = [layer.copy() for layer in setup.layers]
    for wanted in setup.ranges():
        setup.checkpointer.wait(append(setup, *wanted))
    for wanted, record in zip(setup.ranges(), setup.stream.records(), strict=True):
        for layer in setup.layers:
            layer[:] = 0
        address = setup.stream.pool.address + record.offset + 256
        assert (
            apply(
                setup,
                wanted,
                address=address,
                payload=record.payload,
                promised=tree_hash(record.payload),
            )
            == abi.STATUS_OK
        )
        assert setup.expected(*wanted) == record.payload
        zeroed = [layer.copy() for layer in setup.layers]
        # Everything else is still zero: clear the range through the reference's own views, and nothing is left.
        kind, start, end, blocks = wanted
        geometry = setup.region.geometry
        for layer in zeroed:
            if kind == abi.KIND_KV_BLOCK:
                for block in blocks:
                    layer[
                        block * geometry.stride : block * geometry.stride + geometry.block_bytes
                    ] = 0
        for layer, before in zip(zeroed, saved, strict=True):
            if kind == abi.KIND_KV_TAIL:
                kept = before.copy()
                clear_tail(setup.name, kept, start, end, blocks)
                assert np.array_equal(np.where(kept == before, 0, before), layer)
            else:
                assert not layer.any()
        for layer, before in zip(setup.layers, saved, strict=True):
            layer[:] = before


def clear_tail(name: str, layer: Bytes, start: int, end: int, blocks: list[int]) -> None:
    """Flip every byte of the range in place, found through index arithmetic that shares nothing with the kernels."""
    g = GEOMETRIES[name]
    for token in range(start, end):
        base = blocks[token // g.block_tokens - start // g.block_tokens] * g.stride
        slot = token % g.block_tokens
        for plane, dim in ((g.key, g.head_dim_key), (g.value, g.head_dim_value)):
            for head in range(g.heads):
                for element in range(dim):
                    row, rest = divmod(slot, plane.token_tile or g.block_tokens)
                    column, inner = divmod(element, plane.element_tile or dim)
                    at = (
                        base
                        + plane.offset
                        + head * plane.head_stride
                        + row * plane.token_tile_stride
                        + rest * plane.token_stride
                        + column * plane.element_tile_stride
                        + inner * plane.element_stride
                    )
                    layer[at : at + g.element_bytes] ^= 0xFF


def test_apply_writes_nothing_when_the_payload_is_not_the_promised(setup: Setup) -> None:
    wanted = setup.ranges()[3]
    setup.checkpointer.wait(append(setup, *wanted))
    record = setup.stream.records()[0]
    before = [layer.copy() for layer in setup.layers]
    for layer in setup.layers:
        layer[:] = 1
    address = setup.stream.pool.address + record.offset + 256
    promised = tree_hash(record.payload)
    at = record.offset + 256 + len(record.payload) - 1
    setup.stream.pool.view[at] = record.payload[-1] ^ 1
    assert (
        apply(setup, wanted, address=address, payload=record.payload, promised=promised)
        == abi.STATUS_HASH_MISMATCH
    )
    setup.stream.pool.view[at] = record.payload[-1]
    assert (
        apply(setup, wanted, address=address, payload=record.payload, promised=promised ^ 1 << 127)
        == abi.STATUS_HASH_MISMATCH
    )
    assert all((layer == 1).all() for layer in setup.layers)
    assert (
        apply(setup, wanted, address=address, payload=record.payload, promised=promised)
        == abi.STATUS_OK
    )
    assert setup.expected(*wanted) == record.payload
    for layer, kept in zip(setup.layers, before, strict=True):
        layer[:] = kept


@dataclass
class PoolBytes:
    view: memoryview
    segment_bytes: int


def replayed(stream: ScratchStream) -> ReplayIndex:
    """The journal's own reader and index over what was appended."""
    reader = StreamReader(PoolBytes(stream.pool.view, stream.segment_bytes), STREAM)
    for ordinal, salt in enumerate(stream.salts):
        reader.lend(Lent(ordinal, ordinal, salt))
    index = ReplayIndex(stream.segment_bytes)
    source = Source(STREAM, abi.WRITER_RANK, 0, 1, 1, 0, is_final=True)
    for record in reader.read(1000):
        index.ingest(record, source, stream.pool.view)
    return index


def test_kv_comes_back_in_other_blocks_when_it_was_replayed(setup: Setup) -> None:
    """Append, replay, plan, verify, apply, hash: two blocks, part of a third, then single tokens."""
    geometry, pool = setup.region.geometry, setup.stream.pool
    size = geometry.block_tokens
    home, away = [4, 1, 5], [0, 3, 2]
    last = 2 * size + size // 2
    ranges = [(abi.KIND_KV_BLOCK, 0, size, home[:1]), (abi.KIND_KV_BLOCK, size, 2 * size, home[1:2]),
              (abi.KIND_KV_TAIL, 2 * size, last, home[2:])] + [(abi.KIND_KV_TAIL, t, t + 1, home[2:]) for t in range(last, last + 2)]  # fmt: skip
    for wanted in ranges:
        assert setup.checkpointer.wait(append(setup, *wanted)).is_ok
    want = tail_of(setup.name, setup.layers, 0, last + 2, home)
    cut = replayed(setup.stream).cuts.longest((7 << 64) | 9, tokens_known=last + 3, layout_hash=geometry.layout_hash(), world=1)
    plan = plan_restore(
        cut, world=1, layout_hash=geometry.layout_hash(), pool=pool.view, segment_bytes=setup.stream.segment_bytes, model_hash=(1 << 64) - 21
    )
    assert plan.tokens == last + 2
    verify(plan, pool.view, deadline=time.monotonic() + 10)
    for layer in setup.layers:
        layer[:] = 0
    for piece in plan.pieces[0]:
        blocks = away[piece.token_start // size : -(-piece.token_end // size)]
        span = piece.kind, piece.token_start, piece.token_end, blocks
        payload = bytes(piece.payload_bytes)  # only its length is told; the bytes lie in the pool
        assert apply(setup, span, address=pool.address + piece.pool_offset, payload=payload, promised=piece.payload_hash) == abi.STATUS_OK
        ticket = setup.checkpointer.hash_kv(setup.region, kind=piece.kind, token_start=piece.token_start, token_end=piece.token_end, blocks=blocks)
        assert setup.checkpointer.wait(ticket).payload_hash == piece.payload_hash
    assert tail_of(setup.name, setup.layers, 0, last + 2, away) == want


@pytest.mark.parametrize(
    ("kind", "start", "end", "blocks"),
    [
        (abi.KIND_KV_TAIL, 0, 1, [BLOCKS]),
        (abi.KIND_KV_TAIL, 0, 1, [0xFFFFFFFF]),
        (abi.KIND_KV_BLOCK, 0, 1, [BLOCKS]),
        (abi.KIND_KV_TAIL, 0, 1, []),
        (abi.KIND_KV_TAIL, 0, 1, [1, 2]),
        (abi.KIND_KV_TAIL, 5, 5, [1]),
        (abi.KIND_KV_TAIL, 6, 5, [1]),
        (abi.KIND_KV_TAIL, 0, 0xFFFFFFFF, [1]),
        (abi.KIND_EVENT, 0, 1, [1]),
    ],
)
def test_task_is_refused_when_it_names_what_is_not_there(
    setup: Setup, kind: int, start: int, end: int, blocks: list[int]
) -> None:
    answers = [
        setup.checkpointer.wait(append(setup, kind, start, end, blocks)).status,
        setup.checkpointer.wait(
            setup.checkpointer.hash_kv(
                setup.region, kind=kind, token_start=start, token_end=end, blocks=blocks
            )
        ).status,
        apply(
            setup,
            (kind, start, end, blocks),
            address=setup.stream.pool.address,
            payload=bytes(64),
            promised=0,
        ),
    ]
    assert answers == [abi.STATUS_BAD_TASK] * 3
    assert setup.checkpointer.wait(append(setup, *setup.ranges()[0])).is_ok


def test_payload_is_refused_when_it_lies_outside_pool_and_arena(setup: Setup) -> None:
    wanted = setup.ranges()[0]
    size = len(setup.expected(*wanted))
    pool = setup.stream.pool
    for address, length in ((pool.address - 16, size), (pool.address + pool.size - 16, size), (16, size), (2**64 - 16, size),
                            (pool.address, size + 16), (pool.address + 8, size)):  # fmt: skip
        assert (
            apply(setup, wanted, address=address, payload=bytes(length), promised=0)
            == abi.STATUS_BAD_TASK
        )


class SmallStage(HostDevice):
    stage_bytes = 4096


def test_payload_beyond_the_stage_is_restored_on_the_gpu_s_shape() -> None:
    """A GPU stages a few MiB; what is larger is read twice, and written only with the right hash all the same."""
    geometry = GEOMETRIES["gpu-bf16"]
    device = SmallStage(HostCompiler(flags=("-O1", "-DCONCORDIA_DEVICE_SHAPE=1")))
    stream = ScratchStream()
    buffers = [Buffer(BLOCKS * geometry.stride) for _ in range(geometry.layers)]
    layers = [np.frombuffer(buffer.view, np.uint8) for buffer in buffers]
    for layer in layers:
        layer[:] = np.random.default_rng(7).integers(0, 256, layer.size, np.uint8)
    with Checkpointer(device, stream.target, lanes=4) as checkpointer:
        region = checkpointer.register_kv(geometry, [buffer.address for buffer in buffers])
        setup = Setup("gpu-bf16", checkpointer, stream, layers, region)
        wanted = (abi.KIND_KV_BLOCK, 0, 2 * geometry.block_tokens, [5, 0])
        assert checkpointer.wait(append(setup, *wanted)).is_ok
        (record,) = stream.records()
        saved = [layer.copy() for layer in layers]
        assert len(record.payload) > SmallStage.stage_bytes
        address, promised = stream.pool.address + record.offset + 256, tree_hash(record.payload)
        for layer in layers:
            layer[:] = 0
        assert apply(setup, wanted, address=address, payload=record.payload, promised=promised ^ 1) == abi.STATUS_HASH_MISMATCH
        assert not any(layer.any() for layer in layers)
        assert apply(setup, wanted, address=address, payload=record.payload, promised=promised) == abi.STATUS_OK
        for layer, before in zip(layers, saved, strict=True):
            for block in range(BLOCKS):
                at = slice(block * geometry.stride, block * geometry.stride + geometry.block_bytes)
                assert (layer[at] == (before[at] if block in {5, 0} else 0)).all()
        look = checkpointer.hash_kv(region, kind=wanted[0], token_start=wanted[1], token_end=wanted[2], blocks=wanted[3])
        assert checkpointer.wait(look).payload_hash == promised
    device.close()
    stream.close()


def test_registration_is_refused_when_the_memory_is_not_ours(shape: tuple[HostDevice, int]) -> None:
    geometry = GEOMETRIES["mla"]
    memory = Buffer(BLOCKS * geometry.stride)
    with Checkpointer(shape[0], None) as checkpointer:
        for addresses in (
            [memory.address],
            [memory.address] * 2 + [4096],
            [memory.address + 8] * 3,
            [1 << 46] * 3,
        ):
            with pytest.raises(UsageError):
                checkpointer.register_kv(geometry, addresses)
        with pytest.raises(UsageError):
            checkpointer.register_pages(memory.address, size=4097, page_bytes=4096)


def test_registration_gives_everything_back_when_it_fails(monkeypatch: pytest.MonkeyPatch, shape: tuple[HostDevice, int]) -> None:
    geometry = GEOMETRIES["mla"]
    memory = Buffer(BLOCKS * geometry.stride)
    device = shape[0]

    def fail(*_: object, **__: object) -> None:
        raise DeviceError("no room")

    with Checkpointer(device, None) as checkpointer:
        held = set(device._buffers)
        for target, name in ((checkpointer._registry, "_load_burst"), (checkpointer.runtime, "adopt")):
            with monkeypatch.context() as patched:
                patched.setattr(target, name, fail)
                with pytest.raises(DeviceError, match="no room"):
                    checkpointer.register_kv(geometry, [memory.address] * geometry.layers)
                with pytest.raises(DeviceError, match="no room"):
                    checkpointer.register_pages(memory.address, size=4096, page_bytes=4096)
        assert set(device._buffers) == held
        region = checkpointer.register_kv(geometry, [memory.address] * geometry.layers)
        assert region.number == 1
