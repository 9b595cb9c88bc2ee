"""KV blocks into the journal and back: append_bandwidth, restore_bandwidth.

Owns: two caches of an 8B-shaped model's block size, 2 MiB: one whose blocks are single pieces of
2 MiB, one with 32 pieces of 64 KiB each, as vLLM lays them out. Promises: every record is
committed or the figure is none; after a restore every block was hashed in place and is what its
record promised. GB are 10^9 bytes. Called by device_runtime.py.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Final

import numpy as np
from bench import Bench
from figures import gb_per_s
from lent_stream import SEGMENT_BYTES, Stream
from loops import Array
from peers import Copies

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import KvGeometry, Plane, Region
from concordia.checkpoint.restore_tasks import KvPiece
from concordia.device.cuda_call import checked
from concordia.device.memory import Buffer
from concordia.errors import DeviceError
from concordia.journal.record import Record
from concordia.runtime.ring import Task, Ticket

BLOCKS: Final = 2048  # of each cache: 4 GiB
# Llama-3.1-8B in vLLM: 32 layers, 8 KV heads of 128, bf16, blocks of 16 tokens.
SMALL_PIECES: Final = KvGeometry(
    layers=32, block_count=BLOCKS, block_tokens=16, block_bytes=64 << 10, heads=8,
    head_dim_key=128, head_dim_value=128, element_bytes=2, key=Plane(0, 512, 4096, 2),
    value=Plane(256, 512, 4096, 2), dtype="bfloat16", instruction_set="sm_90",
)  # fmt: skip
# The same bytes with all layers of a block side by side.
LARGE_PIECES: Final = dataclasses.replace(
    SMALL_PIECES, layers=1, block_bytes=2 << 20, heads=256,
    key=Plane(0, 512, 512 * 256, 2), value=Plane(256, 512, 512 * 256, 2),
)  # fmt: skip
NOISE_BYTES: Final = 64 << 20
APPENDED: Final = 1024  # records of 2 MiB a round
APPEND_CTAS: Final = (1, 4, 8)
APPEND_ROUNDS: Final = 7
RESTORE_SEGMENTS: Final = 140  # of 31 such records each: 8 GiB and some
RESTORE_ROUNDS: Final = 5
IN_FLIGHT: Final = 1024  # a quarter of the ring
PEER_BLOCKS: Final = 512  # 1 GiB of each cache, for peers that take their time
PEER_ROUNDS: Final = 3

Pieces = Sequence[tuple[Region, Sequence[KvPiece]]]  # of each cache


class Cache:
    """Device memory of one geometry, every block with bytes of its own."""

    def __init__(self, bench: Bench, shape: KvGeometry) -> None:
        self.shape = shape
        self._bench = bench
        self.layer_bytes = shape.block_count * shape.stride
        self.size = self.layer_bytes * shape.layers
        self.base = bench.device.allocate(self.size)
        self.layers = [self.base + i * self.layer_bytes for i in range(shape.layers)]
        noise = np.random.default_rng(3).integers(0, 256, NOISE_BYTES, dtype=np.uint8)
        bench.device.write(self.base, noise.tobytes())
        stream = bench.device._memory.stream
        with bench.device._context.current() as driver:
            done = NOISE_BYTES
            while done < self.size:
                more = min(done, self.size - done)
                copied = driver.cuMemcpyDtoDAsync(self.base + done, self.base, more, stream)
                checked(copied, "fill a cache")
                done += more
            for block in range(shape.block_count):
                at = self.base + block * shape.stride
                checked(driver.cuMemsetD32Async(at, block + 1, 1, stream), "stamp a block")
            checked(driver.cuStreamSynchronize(stream), "fill a cache")

    def wipe(self) -> None:
        """All zeroes."""
        stream = self._bench.device._memory.stream
        with self._bench.device._context.current() as driver:
            checked(driver.cuMemsetD8Async(self.base, 0, self.size, stream), "wipe a cache")
            checked(driver.cuStreamSynchronize(stream), "wipe a cache")

    def addresses(self, blocks: Sequence[int]) -> Array:
        """Of every piece of these blocks, in the order of a record's payload."""
        rows = np.array(blocks, np.uint64)[:, None] * np.uint64(self.shape.stride)
        return (rows + np.array(self.layers, np.uint64)[None, :]).ravel()

    def close(self) -> None:
        self._bench.device.free(self.base)


def append(bench: Bench) -> None:
    """append_bandwidth, by 1, 4 and 8 CTAs, beside the copy engine into the same memory."""
    cache = Cache(bench, SMALL_PIECES)
    size = APPENDED * cache.shape.raw_bytes()
    found = {}
    for ctas in APPEND_CTAS:
        bench.say(f"append: {APPENDED} records of 2 MiB, {ctas} CTA(s)")
        bench.stream.restart()
        checkpointer = Checkpointer(bench.device, bench.stream.target(), lanes=ctas)
        region = checkpointer.register_kv(cache.shape, cache.layers)
        times = [_append_round(bench, checkpointer, region) for _ in range(APPEND_ROUNDS + 1)]
        found[ctas] = {**gb_per_s(size, times[1:]), "ctas": ctas}
        if ctas == APPEND_CTAS[-1]:  # the pool is registered as long as it is open
            bench.say("append: the copy engine")
            peer = _append_peers(bench, cache)
        checkpointer.close()
    best = max(APPEND_CTAS, key=lambda ctas: found[ctas]["median"])
    bench.report("append_bandwidth", found[best], peer=peer)
    for ctas in APPEND_CTAS:
        bench.report(f"append_bandwidth_{ctas}cta", found[ctas], peer=peer)
    cache.close()


def _append_round(bench: Bench, checkpointer: Checkpointer, region: Region) -> float:
    """Seconds from the first submission to the last commit."""
    blocks = [int(b) for b in np.random.default_rng(9).permutation(BLOCKS)[:APPENDED]]
    bench.stream.refill()
    tasks = append_tasks(checkpointer, region, blocks)
    checkpointer.wait(checkpointer.runtime.submit(Task()))
    started = time.perf_counter()
    tickets = checkpointer.submit_many(tasks)
    checkpointer.wait(tickets[-1])
    spent = time.perf_counter() - started
    _require_records(checkpointer, tickets, APPENDED)
    return spent


def append_tasks(checkpointer: Checkpointer, region: Region, blocks: Sequence[int]) -> list[Task]:
    """A record for each block, as many to a task as the product puts there in a prefill."""
    size, most, tasks = region.geometry.block_tokens, config.APPEND_BLOCKS, []
    for first in range(0, len(blocks), most):
        some = blocks[first : first + most]
        task = checkpointer.kv_task(
            region, kind=abi.KIND_KV_BLOCK, key=1, incarnation=1, token_start=first * size,
            token_end=(first + len(some)) * size, blocks=some, step=1, is_each=True
        )  # fmt: skip
        tasks.append(task)
    return tasks


def _require_records(checkpointer: Checkpointer, tickets: Sequence[Ticket], wanted: int) -> None:
    done = [checkpointer.wait(ticket) for ticket in tickets]
    count = sum(answer.result for answer in done if answer.is_ok)
    if count != wanted:
        bad = next((answer for answer in done if not answer.is_ok), None)
        raise DeviceError(f"{count} of {wanted} records were committed; first failure: {bad}")


def _append_peers(bench: Bench, cache: Cache) -> dict[str, float]:
    """GB/s of cuMemcpyDtoHAsync: whole segments' worth, and the pieces that a record gathers."""
    pool, size = bench.stream.pool_address, APPENDED * cache.shape.raw_bytes()
    copies = Copies(bench.device, bench.loops)
    whole = np.arange(size // SEGMENT_BYTES, dtype=np.uint64) * np.uint64(SEGMENT_BYTES)
    sources = cache.addresses(range(APPENDED))
    pieces = np.arange(len(sources), dtype=np.uint64) * np.uint64(cache.shape.block_bytes)
    at, base = np.uint64(pool), np.uint64(cache.base)
    found = {
        "copy_engine": copies.seconds(
            "to_host", at + whole, base + whole, SEGMENT_BYTES, rounds=PEER_ROUNDS
        ),
        "copy_engine_64kib_pieces": copies.seconds(
            "to_host", at + pieces, sources, cache.shape.block_bytes, rounds=PEER_ROUNDS
        ),
    }
    copies.close()
    return {name: size / seconds / 1e9 for name, seconds in found.items()}


def restore_pieces(checkpointer: Checkpointer, pieces: Pieces) -> None:
    """The product's way back; every block is hashed in place before this returns. Raises
    DeviceError.
    """
    for region, wanted in pieces:
        said = checkpointer.restore_kv(region, wanted, timeout_s=config.WAIT_TASK_S)
        if not all(said) or len(said) != len(wanted):
            raise DeviceError(f"{said.count(False)} of {len(wanted)} pieces were not restored")


def restore(bench: Bench) -> None:
    """restore_bandwidth: 4 GiB in pieces of 2 MiB and 4 GiB in pieces of 64 KiB, beside the
    driver's copies.
    """
    bench.say("restore: filling 8 GiB of journal")
    stream = Stream(segments=RESTORE_SEGMENTS)
    caches = {"2mib": Cache(bench, LARGE_PIECES), "64kib": Cache(bench, SMALL_PIECES)}
    checkpointer = Checkpointer(bench.device, stream.target(), lanes=1)
    try:
        pieces = _journal(checkpointer, stream, caches)
        for cache in caches.values():
            cache.wipe()
        both = list(pieces.values())
        restore_pieces(checkpointer, both)
        _prove(checkpointer, both)
        figures = {}
        for name, wanted in {"": both, **{name: [found] for name, found in pieces.items()}}.items():
            bench.say(f"restore: {sum(len(found) for _, found in wanted)} records {name}")
            times = []
            for _ in range(RESTORE_ROUNDS):
                started = time.perf_counter()
                restore_pieces(checkpointer, wanted)
                times.append(time.perf_counter() - started)
            size = sum(piece.payload_bytes for _, found in wanted for piece in found)
            figures[name] = gb_per_s(size, times)
        bench.say("restore: the driver's copies")
        peers = _restore_peers(bench, stream, caches, pieces)
    finally:
        checkpointer.close()
        for cache in caches.values():
            cache.close()
        stream.close()
    for name, value in figures.items():
        bench.report(f"restore_bandwidth{'_' * bool(name)}{name}", value, peer=peers[name])


def _journal(
    checkpointer: Checkpointer, stream: Stream, caches: dict[str, Cache]
) -> dict[str, tuple[Region, list[KvPiece]]]:
    """Append every block of the caches; each record with another block to go to, in no order."""
    regions = {
        name: checkpointer.register_kv(cache.shape, cache.layers) for name, cache in caches.items()
    }
    for region in regions.values():
        for first in range(0, BLOCKS, IN_FLIGHT):
            stream.refill()
            tasks = append_tasks(checkpointer, region, range(first, first + IN_FLIGHT))
            _require_records(checkpointer, checkpointer.submit_many(tasks), IN_FLIGHT)
    records = stream.records(2 * BLOCKS)
    if len(records) != 2 * BLOCKS:
        raise DeviceError(f"{len(records)} of {2 * BLOCKS} records can be read")
    generator = np.random.default_rng(11)
    found = {}
    for i, (name, region) in enumerate(regions.items()):
        own = records[i * BLOCKS : (i + 1) * BLOCKS]
        targets, order = generator.permutation(BLOCKS), generator.permutation(BLOCKS)
        found[name] = region, [piece_of(stream, own[j], int(targets[j])) for j in order]
    return found


def piece_of(stream: Stream, record: Record, block: int) -> KvPiece:
    """A record of one block, to be restored into `block`."""
    return KvPiece(
        *(record.kind, record.token_start, record.token_end, (block,)),
        *(stream.pool_address + record.payload_offset, record.payload_bytes, record.payload_hash),
    )


def _prove(checkpointer: Checkpointer, pieces: Pieces) -> None:
    """Hash every block in place once more, by other code than restored it."""
    runtime = checkpointer.runtime
    for region, wanted in pieces:
        for first in range(0, len(wanted), IN_FLIGHT):
            some = wanted[first : first + IN_FLIGHT]
            tickets = checkpointer.submit_many([piece.look(region) for piece in some])
            for ticket, piece in zip(tickets, some, strict=True):
                if runtime.wait(ticket).payload_hash != piece.payload_hash:
                    raise DeviceError(f"block {piece.blocks} is not what its record promised")


def _restore_peers(
    bench: Bench,
    stream: Stream,
    caches: dict[str, Cache],
    pieces: dict[str, tuple[Region, list[KvPiece]]],
) -> dict[str, dict[str, float]]:
    """GB/s by kind of piece ("": both), then by peer."""
    copies = Copies(bench.device, bench.loops)
    pageable = Buffer(PEER_BLOCKS * SMALL_PIECES.raw_bytes())
    np.frombuffer(pageable.view, np.uint8)[:] = 1
    seconds: dict[str, dict[str, float]] = {}
    for name, cache in caches.items():
        some, size = pieces[name][1][:PEER_BLOCKS], cache.shape.block_bytes
        targets = cache.addresses([piece.blocks[0] for piece in some])
        each = np.arange(cache.shape.layers, dtype=np.uint64) * np.uint64(size)
        payloads = np.array([piece.address for piece in some], np.uint64)
        pool = (payloads[:, None] + each[None, :]).ravel()
        steps = np.arange(len(pool), dtype=np.uint64) * np.uint64(size)
        plain = np.uint64(pageable.address) + steps
        one = np.array([cache.base], np.uint64), np.array([stream.pool_address], np.uint64)
        whole = PEER_BLOCKS * cache.shape.raw_bytes()
        rounds = PEER_ROUNDS
        sync = "to_device_sync"
        seconds[name] = {
            "naive_memcpy_pageable": copies.seconds(sync, targets, plain, size, rounds=rounds),
            "naive_memcpy_registered": copies.seconds(sync, targets, pool, size, rounds=rounds),
            "copy_engine_pieces": copies.seconds("to_device", targets, pool, size, rounds=rounds),
            "copy_engine_one_piece": copies.seconds("to_device", *one, whole, rounds=rounds),
        }
    copies.close()
    pageable.close()
    each_bytes = PEER_BLOCKS * SMALL_PIECES.raw_bytes()
    both = {key: sum(found[key] for found in seconds.values()) / 2 for key in seconds["2mib"]}
    return {
        name: {key: each_bytes / spent / 1e9 for key, spent in found.items()}
        for name, found in {"": both, **seconds}.items()
    }
