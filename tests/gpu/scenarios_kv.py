"""Scenarios of handlers, journal, framework and faults; each runs in a child and answers plain values."""

from __future__ import annotations

import json
import os
import pathlib
import time
from typing import Any

import numpy as np
from stage import JournalFile, counting, first_difference, geometry, mask, place, random_layers

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.expected import KvRange, expected_bytes
from concordia.checkpoint.region import KvGeometry
from concordia.checkpoint.restore_tasks import KvPiece
from concordia.device.compiler import HandlerSource
from concordia.device.driver import open_device
from concordia.errors import ConcordiaError
from concordia.journal.client import JournalClient
from concordia.journal.record import payload_hash

SEGMENT = 1 << 20
BYTE_SIZES = (0, 1, 15, 16, 127, 128, 129, 4095, 4096, 4097, 70_001)


def _ranges(shape: KvGeometry, seed: int) -> list[KvRange]:
    """Tails of every kind of length and place, and whole blocks; blocks in no order."""
    generator = np.random.default_rng(seed)
    size = shape.block_tokens
    wanted = [(0, 1), (size - 1, size), (size - 1, size + 1), (0, 3 * size), (size + 2, 4 * size - 1), (5 * size + 1, 5 * size + 2)]
    found = []
    for start, end in wanted:
        count = (end - 1) // size - start // size + 1
        blocks = tuple(int(b) for b in generator.permutation(shape.block_count)[:count])
        found.append(KvRange(abi.KIND_KV_TAIL, start, end, blocks))
    for start, count in ((0, 1), (2, 3)):
        blocks = tuple(int(b) for b in generator.permutation(shape.block_count)[:count])
        found.append(KvRange(abi.KIND_KV_BLOCK, start * size, (start + count) * size, blocks))
    return found


def handlers(device: str, lanes: int, shape_name: str, seed: int, path: str) -> dict[str, Any]:
    """Every KV handler of one geometry against numpy, byte for byte; answers what differs."""
    shape = geometry(shape_name)
    layers = random_layers(shape, seed)
    journal = JournalFile.create(pathlib.Path(path), segments=24, segment_bytes=SEGMENT)
    wrong: list[str] = []
    opened = open_device(device)
    checkpointer = Checkpointer(opened, journal.target(), lanes=lanes)
    addresses = place(opened, layers)
    region = checkpointer.register_kv(shape, addresses)
    ranges = _ranges(shape, seed)
    tickets = [
        checkpointer.append_kv(region, kind=w.kind, key=i, incarnation=1, token_start=w.token_start, token_end=w.token_end, blocks=w.blocks, step=i)
        for i, w in enumerate(ranges)
    ]  # fmt: skip
    done = [checkpointer.wait(ticket) for ticket in tickets]
    records, end = journal.records()
    if len(records) != len(ranges) or end.value != "clean":
        wrong.append(f"{len(records)} records, {end}")
    for wanted, record, answer in zip(ranges, records, done, strict=True):
        expected = expected_bytes(shape, layers, wanted)
        difference = first_difference(expected, journal.payload(record))
        if difference:
            wrong.append(f"append {wanted}: {difference}")
        if not record.payload_hash == answer.payload_hash == payload_hash(expected):
            wrong.append(f"append {wanted}: hash {record.payload_hash:#x}, expected {payload_hash(expected):#x}")
        if (record.kind, record.token_start, record.token_end, record.layout_hash) != (wanted.kind, wanted.token_start, wanted.token_end, shape.layout_hash()):
            wrong.append(f"append {wanted}: header {record}")
        held = checkpointer.wait(checkpointer.hash_kv(region, kind=wanted.kind, token_start=wanted.token_start, token_end=wanted.token_end, blocks=wanted.blocks))
        if held.payload_hash != record.payload_hash:
            wrong.append(f"hash {wanted}: {held.payload_hash:#x}")
    wrong += _apply(checkpointer, region, journal, cache=list(zip(addresses, layers, strict=True)), pairs=list(zip(ranges, records, strict=True)))
    refused = checkpointer.wait(checkpointer.append_kv(region, kind=abi.KIND_KV_TAIL, key=1, incarnation=1, token_start=0, token_end=1, blocks=[shape.block_count], step=1))
    checkpointer.close()
    opened.close()
    return {"wrong": wrong, "refused_status": refused.status}


def _apply(checkpointer: Checkpointer, region: Any, journal: JournalFile, *, cache: list[tuple[int, bytes]], pairs: list[Any]) -> list[str]:
    """Each record back into zeroes: exactly its range is written, and nothing when the hash is another."""
    shape, device, wrong = region.geometry, checkpointer.device, []
    addresses, layers = [at for at, _ in cache], [layer for _, layer in cache]
    zeros = [bytes(len(layer)) for layer in layers]
    pool = journal.target().pool_address
    for wanted, record in pairs:
        written = mask(shape, wanted.kind, wanted.token_start, wanted.token_end, wanted.blocks)
        for promise, after in ((record.payload_hash ^ 1, zeros), (record.payload_hash, [(np.frombuffer(layer, np.uint8) * written).tobytes() for layer in layers])):
            for address, zero in zip(addresses, zeros, strict=True):
                device.write(address, zero)
            done = checkpointer.wait(
                checkpointer.apply_kv(region, kind=wanted.kind, token_start=wanted.token_start, token_end=wanted.token_end, blocks=wanted.blocks,
                                      payload_address=pool + record.payload_offset, payload_bytes=record.payload_bytes, payload_hash=promise)
            )  # fmt: skip
            want_status = abi.STATUS_OK if promise == record.payload_hash else abi.STATUS_HASH_MISMATCH
            if done.status != want_status:
                wrong.append(f"apply {wanted}: status {done.status}, expected {want_status}")
            for layer, (address, want) in enumerate(zip(addresses, after, strict=True)):
                difference = first_difference(want, device.read(address, len(want)))
                if difference:
                    wrong.append(f"apply {wanted}, layer {layer}: {difference}")
    for address, layer in zip(addresses, layers, strict=True):
        device.write(address, layer)
    return wrong


def restored(device: str, shape_name: str, seed: int, path: str, count: int) -> dict[str, Any]:
    """Pieces that lie on each other go back in their order, over more than one list; those with another hash are named."""
    shape = geometry(shape_name)
    generator = np.random.default_rng(seed)
    journal = JournalFile.create(pathlib.Path(path), segments=24, segment_bytes=SEGMENT)
    opened = open_device(device)
    checkpointer = Checkpointer(opened, journal.target())
    addresses = place(opened, random_layers(shape, seed))
    region = checkpointer.register_kv(shape, addresses)
    ranges, caches = [], []
    for i in range(24):  # each from a cache of other bytes
        start = int(generator.integers(shape.block_tokens))
        end = int(generator.integers(start + 1, shape.block_tokens + 1))
        kind = abi.KIND_KV_BLOCK if i % 4 == 0 else abi.KIND_KV_TAIL
        wanted = KvRange(kind, start, end, (int(generator.integers(shape.block_count)),))
        caches.append(random_layers(shape, seed + i))
        for address, layer in zip(addresses, caches[-1], strict=True):
            opened.write(address, layer)
        checkpointer.wait(checkpointer.append_kv(region, kind=kind, key=i, incarnation=1, token_start=start, token_end=end, blocks=wanted.blocks, step=i))
        ranges.append(wanted)
    pool = journal.target().pool_address
    pieces = [
        KvPiece(w.kind, w.token_start, w.token_end, w.blocks, pool + r.payload_offset, r.payload_bytes, r.payload_hash)
        for w, r in zip(ranges, journal.records()[0], strict=True)
    ]  # fmt: skip
    order = [int(i) for i in generator.integers(len(pieces), size=count)]
    said = checkpointer.restore_kv(region, [pieces[i] for i in order], timeout_s=20)
    found = [np.frombuffer(opened.read(address, len(layer)), np.uint8) for address, layer in zip(addresses, caches[-1], strict=True)]
    expected = [np.frombuffer(layer, np.uint8).copy() for layer in caches[-1]]  # what lay there before
    for i in order:
        is_written = mask(shape, ranges[i].kind, ranges[i].token_start, ranges[i].token_end, ranges[i].blocks).astype(bool)
        for layer, one in enumerate(caches[i]):
            expected[layer][is_written] = np.frombuffer(one, np.uint8)[is_written]
    wrong = [layer for layer, (one, other) in enumerate(zip(found, expected, strict=True)) if (one != other).any()]
    flipped = [pieces[i]._replace(payload_hash=pieces[i].payload_hash ^ (i % 3 == 0)) for i in range(len(pieces))]
    named = checkpointer.restore_kv(region, flipped, timeout_s=20)
    outside = pieces[0]._replace(address=pool + journal.target().pool_bytes - 16)
    unknown = pieces[0]._replace(blocks=(shape.block_count,))
    refused = checkpointer.restore_kv(region, [outside, unknown], timeout_s=20)
    checkpointer.close()
    opened.close()
    return {"wrong": wrong, "said": all(said), "named": [i for i, is_good in enumerate(named) if not is_good], "refused": refused}


def grouped(device: str, lanes: int, shape_name: str, seed: int, *, path: str, segment_bytes: int) -> dict[str, Any]:
    """Whole blocks of one task as a record each, over segments that hold a few; then the journal is full in the middle of a task."""
    shape = geometry(shape_name)
    generator = np.random.default_rng(seed)
    journal = JournalFile.create(pathlib.Path(path), segments=12, segment_bytes=segment_bytes)
    layers = random_layers(shape, seed)
    opened = open_device(device)
    checkpointer = Checkpointer(opened, journal.target(), lanes=lanes)
    region = checkpointer.register_kv(shape, place(opened, layers))
    size, wrong, wanted = shape.block_tokens, [], []

    def submit(first: int, blocks: Any) -> Any:
        words = {"key": first, "incarnation": 3, "token_start": first * size, "token_end": (first + len(blocks)) * size, "step": first}
        return checkpointer.wait(checkpointer.append_kv(region, kind=abi.KIND_KV_BLOCK, blocks=blocks, is_each=True, **words))

    for first, count in ((0, 1), (1, 2), (3, 5), (8, shape.block_count)):
        blocks = [int(b) for b in generator.permutation(shape.block_count)[:count]]
        done = submit(first, blocks)
        wanted += [KvRange(abi.KIND_KV_BLOCK, (first + i) * size, (first + i + 1) * size, (block,)) for i, block in enumerate(blocks)]
        if (done.status, done.result, done.sequence, done.payload_hash) != (abi.STATUS_OK, count, len(wanted) - 1, payload_hash(expected_bytes(shape, layers, wanted[-1]))):
            wrong.append(f"answer for {count}: {done}")
    records, end = journal.records()
    if len(records) != len(wanted) or end.value != "clean":
        wrong.append(f"{len(records)} records of {len(wanted)}, {end}")
    for one, record in zip(wanted, records, strict=False):
        expected = expected_bytes(shape, layers, one)
        if (record.kind, record.token_start, record.token_end, record.incarnation) != (one.kind, one.token_start, one.token_end, 3):
            wrong.append(f"{one}: {record}")
        if record.payload_hash != payload_hash(expected) or journal.payload(record) != expected:
            wrong.append(f"{one}: {first_difference(expected, journal.payload(record))}")
    refused = [submit(0, range(shape.block_count)) for _ in range(40)]
    kept, _ = journal.records()
    full = [answer for answer in refused if answer.status != abi.STATUS_OK]
    if len(kept) - len(records) != sum(answer.result for answer in refused) or not full:
        wrong.append(f"{len(kept)} records, answers {refused}")
    odd = checkpointer.wait(checkpointer.append_kv(region, kind=abi.KIND_KV_BLOCK, key=1, incarnation=1, token_start=0, token_end=size + 1, blocks=[0, 1], step=1, is_each=True))
    checkpointer.close()
    opened.close()
    return {"wrong": wrong, "full": sorted({answer.status for answer in full}), "odd": odd.status}


def tokens(device: str, lanes: int, shape_name: str, seed: int, *, path: str) -> dict[str, Any]:
    """Single tokens of many requests, found together, with blocks and bad ids among them, over several segments: a record each."""
    shape, generator = geometry(shape_name), np.random.default_rng(seed)
    journal = JournalFile.create(pathlib.Path(path), segments=40, segment_bytes=1 << 18)
    layers = random_layers(shape, seed)
    opened = open_device(device)
    checkpointer = Checkpointer(opened, journal.target(), lanes=lanes)
    region = checkpointer.register_kv(shape, place(opened, layers))
    size, tasks, wanted, wrong = shape.block_tokens, [], [], []
    for i in range(400):
        token, block = int(generator.integers(9 * size)), int(generator.integers(shape.block_count))
        one = KvRange(abi.KIND_KV_TAIL, token, token + 1, (shape.block_count if i % 37 == 5 else block,))
        if i % 11 == 7:
            one = KvRange(abi.KIND_KV_BLOCK, 0, size, (block,))
        tasks.append(checkpointer.kv_task(region, kind=one.kind, key=i, incarnation=1, token_start=one.token_start, token_end=one.token_end, blocks=one.blocks, step=i))
        wanted.append(one if one.blocks[0] < shape.block_count else None)
    answers = [checkpointer.wait(ticket) for ticket in checkpointer.submit_many(tasks)]
    if [answer.is_ok for answer in answers] != [one is not None for one in wanted]:
        wrong.append(f"{[answer.status for answer in answers]}")
    good = [(i, one, answer) for i, (one, answer) in enumerate(zip(wanted, answers, strict=True)) if one is not None]
    records, end = journal.records()
    if len(records) != len(good) or end.value != "clean":
        wrong.append(f"{len(records)} records of {len(good)}, {end}")
    for sequence, ((i, one, answer), record) in enumerate(zip(good, records, strict=False)):
        expected = expected_bytes(shape, layers, one)
        if (record.kind, record.key, record.token_start, record.token_end) != (one.kind, i, one.token_start, one.token_end):
            wrong.append(f"{one}: {record}")
        if (answer.sequence, answer.payload_hash, record.payload_hash) != (sequence, payload_hash(expected), payload_hash(expected)):
            wrong.append(f"{one}: {answer}")
        if journal.payload(record) != expected:
            wrong.append(f"{one}: {first_difference(expected, journal.payload(record))}")
    stats = checkpointer.runtime.stats()
    checkpointer.close()
    opened.close()
    return {"wrong": wrong[:5], "undone": stats.submitted - stats.done}


def appended_bytes(device: str, lanes: int, seed: int, path: str) -> dict[str, Any]:
    """bytes_append over lengths around every boundary, over many segments; a full journal is said and counted."""
    journal = JournalFile.create(pathlib.Path(path), segments=4, segment_bytes=SEGMENT)
    generator = np.random.default_rng(seed)
    opened = open_device(device)
    checkpointer = Checkpointer(opened, journal.target(), lanes=lanes)
    payloads = [generator.integers(0, 256, size, dtype=np.uint8).tobytes() for size in (*BYTE_SIZES, *generator.integers(0, 90_000, 30).tolist())]
    done = [checkpointer.wait(checkpointer.append_bytes(p, kind=abi.KIND_REQUEST, key=i << 64 | i, incarnation=i)) for i, p in enumerate(payloads)]
    records, end = journal.records()
    wrong = [] if len(records) == len(payloads) else [f"{len(records)} of {len(payloads)}, {end}"]
    for payload, record, answer in zip(payloads, records, done, strict=False):
        if journal.payload(record) != payload or not record.payload_hash == answer.payload_hash == payload_hash(payload) or answer.sequence != record.sequence:
            wrong.append(f"{len(payload)} bytes: {record} {answer}")
    big = bytes(700_000)
    statuses = [checkpointer.wait(checkpointer.append_bytes(big, kind=abi.KIND_REQUEST, key=1, incarnation=1)).status for _ in range(6)]
    _, stream = checkpointer.stats()
    checkpointer.close()
    opened.close()
    return {"wrong": wrong, "end": end.value, "statuses": statuses, "dropped": stream.dropped_count}


def pages(device: str, lanes: int, seed: int, path: str, size: int) -> dict[str, Any]:
    """page_scan: everything at first, then exactly the pages that changed, then those that are named."""
    journal = JournalFile.create(pathlib.Path(path), segments=16, segment_bytes=SEGMENT)
    generator = np.random.default_rng(seed)
    count = 40
    content = generator.integers(0, 256, size * count, dtype=np.uint8)
    opened = open_device(device)
    checkpointer = Checkpointer(opened, journal.target(), lanes=lanes)
    address = opened.allocate(size * count)
    opened.write(address, content.tobytes())
    region = checkpointer.register_pages(address, size=size * count, page_bytes=size)
    results = [checkpointer.wait(checkpointer.scan_pages(region)).result, checkpointer.wait(checkpointer.scan_pages(region)).result]
    changed = sorted(int(p) for p in generator.permutation(count)[:7])
    for page in changed:
        at = page * size + int(generator.integers(size))
        content[at] ^= 1
        opened.write(address + at, bytes([int(content[at])]))
    results.append(checkpointer.wait(checkpointer.scan_pages(region)).result)
    for page in (turned := sorted(int(p) for p in generator.permutation(count)[:5])):
        content[page * size] ^= 1
        opened.write(address + page * size, bytes([int(content[page * size])]))
    # Two in a row: the second must not find what the first has told of.
    results += [checkpointer.wait(checkpointer.scan_pages(region, is_burst=True)).result for _ in range(2)]
    named = [int(p) for p in generator.permutation(count)[:9]]
    results.append(checkpointer.wait(checkpointer.append_pages(region, named)).result)
    records, end = journal.records()
    found = []
    for record in records:
        payload = journal.payload(record)
        numbers = np.frombuffer(payload[: abi.LEAF_BYTES], "<u4")[: record.token_end]
        found += [(int(n), payload[abi.LEAF_BYTES + i * size :][:size]) for i, n in enumerate(numbers)]
    latest = dict(found)
    wrong = [page for page in range(count) if latest[page] != content[page * size : (page + 1) * size].tobytes()]
    order = [number for number, _ in found]
    checkpointer.close()
    opened.close()
    return {"results": results, "changed": changed, "appended": sorted(order[count : count + 7]), "turned": turned, "burst": sorted(order[count + 7 : count + 12]), "named": named, "last": order[count + 12 :], "wrong": wrong, "end": end.value}


def framework(device: str, path: str, seed: int) -> dict[str, Any]:
    """In a process that torch uses too: its tensors as regions, its stream's order kept, its blocking calls not held up."""
    import torch

    torch.manual_seed(seed)
    torch.ones(8, device=device).sum().item()
    shape = geometry("interleaved", layers=16, block_count=64)
    # A block as vLLM lays it out: [block][token][head][K | V], seen by the model as [block][head][token][K | V].
    cache = [torch.randint(-128, 127, (shape.block_count, shape.block_bytes), dtype=torch.int8, device=device) for _ in range(shape.layers)]
    journal = JournalFile.create(pathlib.Path(path), segments=64, segment_bytes=SEGMENT)
    checkpointer = Checkpointer.open(device, journal.target())
    region = checkpointer.register_kv(shape, [layer.data_ptr() for layer in cache])
    stream = torch.cuda.Stream()
    stale, enqueue_s, calls_s = [], [], []
    size = shape.block_tokens
    for step in range(20):
        # The step's work takes milliseconds and writes its KV at the very end.
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            fresh = torch.randint(-128, 127, (shape.block_bytes,), dtype=torch.int8, device=device)
            for layer in cache:
                layer[step].copy_(fresh)
        started = time.monotonic()
        checkpointer.order_after(stream.cuda_stream)
        ticket = checkpointer.append_kv(region, kind=abi.KIND_KV_BLOCK, key=step, incarnation=1, token_start=step * size, token_end=(step + 1) * size, blocks=[step], step=step)
        enqueue_s.append(time.monotonic() - started)
        early = checkpointer.result(ticket) is not None and not stream.query()
        done = checkpointer.wait(ticket)
        expected = bytes(fresh.cpu().numpy().tobytes()) * shape.layers
        if early or not done.is_ok or done.payload_hash != payload_hash(expected):
            stale.append(step)
        checkpointer.append_bytes(b"x", kind=abi.KIND_EVENT, key=1, incarnation=1)  # the executor is in
        started = time.monotonic()
        torch.cuda.synchronize()
        torch.empty(1 << 22, device=device)
        torch.cuda.empty_cache()
        calls_s.append(time.monotonic() - started)
    result = {"stale": stale, "enqueue_us_median": float(np.median(enqueue_s) * 1e6), "calls_ms_max": max(calls_s) * 1e3}
    result |= _graph(checkpointer, region, cache, torch)
    checkpointer.close()
    torch.ones(8, device=device).sum().item()  # the framework goes on
    return result


def _graph(checkpointer: Checkpointer, region: Any, cache: list[Any], torch: Any) -> dict[str, Any]:
    """A captured step, replayed: appends between replays see each replay's KV."""
    shape = region.geometry
    counter = torch.zeros(1, dtype=torch.int8, device=cache[0].device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counter.add_(1)
        for layer in cache:
            layer[40].copy_(counter.expand(shape.block_bytes))
    counter.zero_()
    wrong = []
    tickets = []
    for step in range(1, 11):
        graph.replay()
        checkpointer.order_after(torch.cuda.current_stream().cuda_stream)
        tickets.append(checkpointer.append_kv(region, kind=abi.KIND_KV_BLOCK, key=9, incarnation=step, token_start=0, token_end=shape.block_tokens, blocks=[40], step=step))
        torch.cuda.current_stream().synchronize()
        if checkpointer.wait(tickets[-1]).payload_hash != payload_hash(bytes([step]) * shape.raw_bytes()):
            wrong.append(step)
    return {"graph_wrong": wrong}


def _pattern(shape: KvGeometry, step: int) -> list[bytes]:
    return random_layers(shape, 1000 + step)


def writer(device: str, path: str, shape_name: str) -> None:
    """Appends block after block until it is killed, and says which sequences were acknowledged."""
    shape = geometry(shape_name)
    journal = JournalFile.create(pathlib.Path(path), segments=60, segment_bytes=SEGMENT)
    checkpointer = Checkpointer.open(device, journal.target())
    addresses = [checkpointer.device.allocate(shape.block_count * shape.stride) for _ in range(shape.layers)]
    region = checkpointer.register_kv(shape, addresses)
    size = shape.block_tokens
    for step in range(100):
        for address, layer in zip(addresses, _pattern(shape, step % 7), strict=True):
            checkpointer.device.write(address, layer)
        tickets = [
            checkpointer.append_kv(region, kind=abi.KIND_KV_BLOCK, key=step % 7, incarnation=1, token_start=b * size, token_end=(b + 1) * size, blocks=[b], step=step)
            for b in range(shape.block_count)
        ]
        answers = [checkpointer.wait(ticket) for ticket in tickets]
        kept = [answer.sequence for answer in answers if answer.is_ok]
        print("ACK " + json.dumps([step, kept]), flush=True)


def restorer(device: str, path: str, shape_name: str, acknowledged: int) -> dict[str, Any]:
    """A second process on a fresh context: reads what the first left, restores it, and compares with what it must be."""
    shape = geometry(shape_name)
    journal = JournalFile.open(pathlib.Path(path), segment_bytes=SEGMENT)
    records, end = journal.records()
    opened = open_device(device)
    checkpointer = Checkpointer(opened, journal.target())
    addresses = place(opened, [bytes(shape.block_count * shape.stride)] * shape.layers)
    region = checkpointer.register_kv(shape, addresses)
    pool, size, wrong, mismatches = journal.target().pool_address, shape.block_tokens, [], 0
    newest: dict[int, Any] = {}
    for record in records:
        newest[record.token_start // size] = record
    for block, record in newest.items():
        done = checkpointer.wait(
            checkpointer.apply_kv(region, kind=record.kind, token_start=record.token_start, token_end=record.token_end, blocks=[block],
                                  payload_address=pool + record.payload_offset, payload_bytes=record.payload_bytes, payload_hash=record.payload_hash)
        )  # fmt: skip
        mismatches += not done.is_ok
    for layer, address in enumerate(addresses):
        found = opened.read(address, shape.block_count * shape.stride)
        for block, record in newest.items():
            at = block * shape.stride
            want = _pattern(shape, record.key)[layer][at : at + shape.block_bytes]
            difference = first_difference(want, found[at : at + shape.block_bytes])
            if difference:
                wrong.append(f"layer {layer} block {block}: {difference}")
    checkpointer.close()
    opened.close()
    return {"records": len(records), "end": end.value, "wrong": wrong[:5], "mismatches": mismatches, "lost": max(0, acknowledged - len(records))}


POISON = """#include "call.h"
HANDLER { if (lane == 0) *reinterpret_cast<volatile uint64_t*>(call->task.arg) = 1; }
"""


def poisoned(device: str, path: str) -> dict[str, Any]:
    """Commits, then a handler stores to an unmapped address: the error names CUDA's reason, and what was committed stays."""
    shape = geometry("flash")
    journal = JournalFile.create(pathlib.Path(path), segments=60, segment_bytes=SEGMENT)
    checkpointer = Checkpointer.open(device, journal.target())
    addresses = place(checkpointer.device, _pattern(shape, 0))
    region = checkpointer.register_kv(shape, addresses)
    size = shape.block_tokens
    tickets = [
        checkpointer.append_kv(region, kind=abi.KIND_KV_BLOCK, key=0, incarnation=1, token_start=b * size, token_end=(b + 1) * size, blocks=[b], step=0)
        for b in range(shape.block_count)
    ]
    kept = sum(checkpointer.wait(ticket).is_ok for ticket in tickets)
    operator = checkpointer.runtime.install("poison", HandlerSource.of("poison", text=POISON))
    from concordia.runtime.ring import Task

    checkpointer.runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=1 << 46))
    said = ""
    until = time.monotonic() + 10
    while not said and time.monotonic() < until:
        try:
            checkpointer.append_bytes(b"after", kind=abi.KIND_EVENT, key=1, incarnation=1)
            time.sleep(0.01)
        except ConcordiaError as error:
            said = str(error)
    closing = ""
    try:
        checkpointer.close()
    except ConcordiaError as error:
        closing = str(error)
    return {"kept": kept, "said": said, "closing": closing, "pid": os.getpid()}


def counted(device: str) -> int:
    """One task, to see that a GPU still works in a new process."""
    from concordia.runtime.executor import Runtime
    from concordia.runtime.ring import Task

    opened = open_device(device)
    runtime = Runtime(opened)
    word = opened.allocate(8)
    operator = runtime.install("count", counting(5))
    answer = runtime.wait(runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word))).result
    runtime.close()
    opened.close()
    return answer


def rank(device: str, *, journal: str, rank: int, world: int, count: int, seed: int) -> dict[str, Any]:
    """One rank of several that write one journal at once, each in its own stream, beside an owner that lends and reads."""
    generator = np.random.default_rng(seed)
    payloads = [generator.integers(0, 256, 1000 + 37 * index % 60_000, dtype=np.uint8).tobytes() for index in range(64)]
    refused = 0
    with JournalClient.connect(pathlib.Path(journal)) as client:
        opened = client.open_stream(writer_kind=abi.WRITER_RANK, rank=rank, world=world, replica=1, layout_hash=9, label=f"rank {rank}")
        with Checkpointer.open(device, opened.target) as checkpointer:
            for index in range(count):
                payload = payloads[index % len(payloads)]
                names = {"kind": abi.KIND_KV_TAIL, "key": 77, "incarnation": 1, "token_end": index + 1}
                done = checkpointer.wait(checkpointer.append_bytes(payload, token_start=index, **names))
                refused += not done.is_ok
        opened.close()
    return {"refused": refused}
