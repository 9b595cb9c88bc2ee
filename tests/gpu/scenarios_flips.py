"""Scenarios of flipped bits and of a full journal; each runs in a child.

A bit is flipped where the device keeps KV, where the journal keeps records, and while a record is on its way back.
"""

from __future__ import annotations

import pathlib
import threading
import time
from typing import Any

import numpy as np
from scenarios_kv import SEGMENT, _ranges
from stage import JournalFile, first_difference, geometry, mask, place, random_layers

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.journal.record import payload_hash

RACE_S = 1.5


def small_records(device: str, path: str, *, lanes: int, seed: int, sizes: list[int], segment_bytes: int) -> list[str]:
    """Records of these payload sizes, in two small segments; answers their hashes."""
    journal = JournalFile.create(pathlib.Path(path), segments=2, segment_bytes=segment_bytes)
    generator = np.random.default_rng(seed)
    hashes = []
    with Checkpointer.open(device, journal.target(), lanes=lanes) as checkpointer:
        for number, size in enumerate(sizes):
            payload = generator.integers(0, 256, size, dtype=np.uint8).tobytes()
            done = checkpointer.wait(checkpointer.append_bytes(payload, kind=abi.KIND_REQUEST, key=number, incarnation=1))
            assert done.is_ok, done
            assert done.payload_hash == payload_hash(payload)
            hashes.append(f"{done.payload_hash:032x}")
    return hashes


def flipped_kv(device: str, path: str, seed: int, count: int) -> dict[str, Any]:
    """A bit of committed KV changes where it lies: its hash is no longer the record's, and a restore heals exactly it."""
    shape = geometry("flash")
    layers = random_layers(shape, seed)
    journal = JournalFile.create(pathlib.Path(path), segments=24, segment_bytes=SEGMENT)
    checkpointer = Checkpointer.open(device, journal.target())
    addresses = place(checkpointer.device, layers)
    region = checkpointer.register_kv(shape, addresses)
    ranges = _ranges(shape, seed)
    for wanted in ranges:
        words = {"kind": wanted.kind, "token_start": wanted.token_start, "token_end": wanted.token_end, "blocks": wanted.blocks}
        checkpointer.wait(checkpointer.append_kv(region, key=1, incarnation=1, step=1, **words))
    records, _ = journal.records()
    chance = np.random.default_rng(seed)
    unseen, unhealed = [], []
    for _ in range(count):
        index, layer = int(chance.integers(len(ranges))), int(chance.integers(shape.layers))
        wanted, record = ranges[index], records[index]
        words = {"kind": wanted.kind, "token_start": wanted.token_start, "token_end": wanted.token_end, "blocks": wanted.blocks}
        at = int(chance.choice(np.flatnonzero(mask(shape, **words))))
        name = f"{wanted}, layer {layer}, byte {at}"
        checkpointer.device.write(addresses[layer] + at, bytes([layers[layer][at] ^ 1 << int(chance.integers(8))]))
        if checkpointer.wait(checkpointer.hash_kv(region, **words)).payload_hash == record.payload_hash:
            unseen.append(name)
        source = journal.target().pool_address + record.payload_offset
        restored = checkpointer.apply_kv(region, payload_address=source, payload_bytes=record.payload_bytes, payload_hash=record.payload_hash, **words)
        is_ok = checkpointer.wait(restored).is_ok
        is_same = checkpointer.wait(checkpointer.hash_kv(region, **words)).payload_hash == record.payload_hash
        if not is_ok or not is_same or checkpointer.device.read(addresses[layer], len(layers[layer])) != layers[layer]:
            unhealed.append(name)
    checkpointer.close()
    return {"records": len(records), "unseen": unseen, "unhealed": unhealed}


def flipped_payload(device: str, path: str, seed: int, count: int) -> dict[str, Any]:
    """Every bit of a record's payload (or `count` of them), and every bit of the hash it promises: no byte is restored of it."""
    shape = geometry("odd")
    layers = random_layers(shape, seed)
    journal = JournalFile.create(pathlib.Path(path), segments=24, segment_bytes=SEGMENT)
    checkpointer = Checkpointer.open(device, journal.target())
    addresses = place(checkpointer.device, layers)
    region = checkpointer.register_kv(shape, addresses)
    words = {"kind": abi.KIND_KV_TAIL, "token_start": 3, "token_end": 4, "blocks": [2]}
    checkpointer.wait(checkpointer.append_kv(region, key=1, incarnation=1, step=1, **words))
    (record,), _ = journal.records()
    zeros = bytes(len(layers[0]))
    for address in addresses:
        checkpointer.device.write(address, zeros)
    view, source = journal.pool.view, journal.target().pool_address + record.payload_offset

    def restore(promised: int) -> int:
        return checkpointer.wait(checkpointer.apply_kv(region, payload_address=source, payload_bytes=record.payload_bytes, payload_hash=promised, **words)).status

    bits = np.random.default_rng(seed).permutation(record.payload_bytes * 8)[: count or None]
    accepted = []
    for bit in map(int, bits):
        view[record.payload_offset + bit // 8] ^= 1 << bit % 8
        if restore(record.payload_hash) != abi.STATUS_HASH_MISMATCH:
            accepted.append(f"payload bit {bit}")
        view[record.payload_offset + bit // 8] ^= 1 << bit % 8
    accepted += [f"hash bit {bit}" for bit in range(128) if restore(record.payload_hash ^ 1 << bit) != abi.STATUS_HASH_MISMATCH]
    written = [layer for layer, address in enumerate(addresses) if checkpointer.device.read(address, len(zeros)) != zeros]
    status = restore(record.payload_hash)
    is_written = mask(shape, **words)
    expected = [(np.frombuffer(layer, np.uint8) * is_written).tobytes() for layer in layers]
    wrong = [first_difference(want, checkpointer.device.read(at, len(want))) for at, want in zip(addresses, expected, strict=True)]
    checkpointer.close()
    return {"bits": len(bits), "payload_bits": record.payload_bytes * 8, "accepted": accepted, "written": written, "status": status, "wrong": [w for w in wrong if w]}


def racing_flips(device: str, path: str, lanes: int, seed: int) -> dict[str, Any]:
    """A byte of the payload flips back and forth while it is restored: all of what was committed is written, or nothing."""
    shape = geometry("flash")
    layers = random_layers(shape, seed)
    journal = JournalFile.create(pathlib.Path(path), segments=24, segment_bytes=SEGMENT)
    checkpointer = Checkpointer.open(device, journal.target(), lanes=lanes)
    addresses = place(checkpointer.device, layers)
    region = checkpointer.register_kv(shape, addresses)
    words = {"kind": abi.KIND_KV_BLOCK, "token_start": 0, "token_end": 6 * shape.block_tokens, "blocks": [7, 1, 4, 0, 9, 2]}
    checkpointer.wait(checkpointer.append_kv(region, key=1, incarnation=1, step=1, **words))
    (record,), _ = journal.records()
    is_written = mask(shape, **words)
    whole = [(np.frombuffer(layer, np.uint8) * is_written).tobytes() for layer in layers]
    zeros = [bytes(len(layer)) for layer in layers]
    view, at = journal.pool.view, record.payload_offset + int(np.random.default_rng(seed).integers(record.payload_bytes))
    good, stop = view[at], threading.Event()

    def flip() -> None:
        while not stop.is_set():
            view[at] = good ^ 0x10
            time.sleep(0.00005)
            view[at] = good
            time.sleep(0.00005)

    flipper = threading.Thread(target=flip)
    flipper.start()
    counts, torn = {abi.STATUS_OK: 0, abi.STATUS_HASH_MISMATCH: 0}, []
    until = time.monotonic() + RACE_S
    while time.monotonic() < until and len(torn) < 5:
        for address, zero in zip(addresses, zeros, strict=True):
            checkpointer.device.write(address, zero)
        status = checkpointer.wait(
            checkpointer.apply_kv(region, payload_address=journal.target().pool_address + record.payload_offset, payload_bytes=record.payload_bytes,
                                  payload_hash=record.payload_hash, **words)
        ).status  # fmt: skip
        counts[status] = counts.get(status, 0) + 1
        expected = whole if status == abi.STATUS_OK else zeros
        for layer, (address, want) in enumerate(zip(addresses, expected, strict=True)):
            difference = first_difference(want, checkpointer.device.read(address, len(want)))
            if difference:
                torn.append(f"status {status}, layer {layer}: {difference}")
    stop.set()
    flipper.join()
    checkpointer.close()
    return {"ok": counts.pop(abi.STATUS_OK), "refused": counts.pop(abi.STATUS_HASH_MISMATCH), "other": counts, "torn": torn}


def exhausted(device: str, path: str, lanes: int) -> dict[str, Any]:
    """No segment is lent any more: each loss is answered and counted, nothing waits, and with room it goes on."""
    journal = JournalFile.create(pathlib.Path(path), segments=6, segment_bytes=SEGMENT)
    journal.control.store("lent_count", 2)
    payloads = [bytes([number % 251]) * 300_000 for number in range(24)]
    statuses: list[int] = []
    with Checkpointer.open(device, journal.target(), lanes=lanes) as checkpointer:

        def put(numbers: range) -> None:
            for number in numbers:
                ticket = checkpointer.append_bytes(payloads[number], kind=abi.KIND_REQUEST, key=number, incarnation=1)
                statuses.append(checkpointer.wait(ticket).status)

        put(range(10))
        journal.control.store("lent_count", 4)
        put(range(10, 20))
        journal.control.store("lent_count", 6)
        put(range(20, 24))
        dropped = checkpointer.stats()[1].dropped_count
    records, end = journal.records()
    wrong = [r.key for r in records if journal.payload(r) != payloads[r.key]]
    return {"statuses": statuses, "dropped": dropped, "kept": [r.key for r in records], "wrong": wrong, "end": end.value}
