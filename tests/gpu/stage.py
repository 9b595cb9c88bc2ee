"""What GPU scenarios share: a journal in one file without an owner, counting handlers, deterministic KV.

Owns: the file layout [control page | segments] that outlives its writer. Promises: another process reads it with nothing but this file's
path and concordia.journal. Called by the scenarios and by the tests that read after a crash.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from concordia import abi
from concordia.checkpoint.region import KvGeometry, Plane
from concordia.device.compiler import HandlerSource
from concordia.device.memory import JournalTarget, SharedFile
from concordia.journal.control import Control, Lent
from concordia.journal.record import Record
from concordia.journal.stream import End, StreamReader

STREAM = 0x5EED
PAGE = abi.STREAM_CONTROL.size

# Every task adds one to the word at task.arg and answers what was there before: a lost or repeated task shows.
COUNTING = """#include "call.h"
HANDLER {
  if (lane == 0) call->result = (add_device(reinterpret_cast<uint64_t*>(call->task.arg), 1) << 16) | VERSION;
}
"""


def counting(version: int) -> HandlerSource:
    return HandlerSource.of("counting", {"VERSION": version}, text=COUNTING)


@dataclass(frozen=True)
class PoolBytes:
    """The pool as StreamReader wants it."""

    view: memoryview
    segment_bytes: int


class JournalFile:
    """One stream with all its segments lent, in one file."""

    def __init__(self, file: SharedFile, segment_bytes: int) -> None:
        self.file = file
        self.segment_bytes = segment_bytes
        self.control = Control(file.view[:PAGE], 0, file.address)
        self.pool = PoolBytes(file.view[PAGE:], segment_bytes)

    @classmethod
    def create(cls, path: pathlib.Path, *, segments: int, segment_bytes: int) -> JournalFile:
        path.unlink(missing_ok=True)
        journal = cls(SharedFile.create(path, PAGE + segments * segment_bytes), segment_bytes)
        words = np.zeros(1, dtype=abi.STREAM_CONTROL.dtype)
        words["stream"] = STREAM
        words["state"] = abi.STREAM_OPEN
        words["sealed_count"] = abi.NOT_SEALED
        journal.file.view[:PAGE] = words.tobytes()
        for ordinal in range(segments):
            journal.control.lend(Lent(ordinal, (ordinal * 7 + 3) % segments, 0xA5A5_0000_0000_0001 + ordinal * 0x1_0001))
        return journal

    @classmethod
    def open(cls, path: pathlib.Path, *, segment_bytes: int) -> JournalFile:
        return cls(SharedFile.open(path, writable=True), segment_bytes)

    def target(self) -> JournalTarget:
        return JournalTarget(self.file.address + PAGE, self.file.size - PAGE, self.segment_bytes, self.file.address)

    def records(self) -> tuple[list[Record], End]:
        """All committed records and what their end means, for a writer that is gone."""
        reader = StreamReader(self.pool, STREAM)
        for lent in self.control.lent():
            reader.lend(lent)
        committed = self.control.committed_count
        return reader.read(1 << 30), reader.classify(committed, is_final=True)

    def payload(self, record: Record) -> bytes:
        return bytes(self.pool.view[record.payload_offset : record.payload_offset + record.payload_bytes])


def geometry(name: str, **changes: Any) -> KvGeometry:
    """A few real shapes, small."""
    rows = {"layers": 4, "block_count": 12, "block_tokens": 16, "heads": 4, "head_dim_key": 64, "head_dim_value": 64, "element_bytes": 2}
    token = 4 * 64 * 2
    shapes: dict[str, dict[str, Any]] = {
        # vLLM's FlashAttention: K of all tokens, then V, each [token][head][element]
        "flash": {"key": Plane(0, 128, token, 2), "value": Plane(16 * token, 128, token, 2), "block_bytes": 32 * token},
        # K and V side by side per head: [token][head][K | V]
        "interleaved": {"key": Plane(0, 256, 2 * token, 2), "value": Plane(128, 256, 2 * token, 2), "block_bytes": 32 * token},
        # vLLM's CPU shape: K as [head][element][token], V as [head][token][element]
        "transposed": {"key": Plane(0, 2048, 2, 32), "value": Plane(16 * token, 2048, 128, 2), "block_bytes": 32 * token},
        # vLLM's CPU shape with AMX: K in tiles of 16 tokens by 2 elements, V in tiles of 16 elements by 2 tokens
        "tiled": {"key": Plane(0, 4096, 4, 2, 16, 2048, 2, 64), "value": Plane(2048, 4096, 2, 4, 2, 64, 16, 512), "block_bytes": 32 * token},
        # MLA: one latent per token, no V; a stride between blocks
        "latent": {"heads": 1, "head_dim_key": 576, "head_dim_value": 0, "key": Plane(0, 1152, 1152, 2), "value": Plane(0, 0, 0, 2), "block_bytes": 16 * 1152, "block_stride": 16 * 1152 + 256},
        "fp8": {"element_bytes": 1, "key": Plane(0, 64, 256, 1), "value": Plane(16 * 256, 64, 256, 1), "block_bytes": 32 * 256},
        "odd": {"heads": 3, "head_dim_key": 10, "head_dim_value": 6, "block_tokens": 5, "key": Plane(2, 20, 60, 2), "value": Plane(400, 12, 36, 2), "block_bytes": 600},
    }  # fmt: skip
    return KvGeometry(**(rows | shapes[name] | {"dtype": "bytes", "instruction_set": "sm"} | changes))


def random_layers(shape: KvGeometry, seed: int) -> list[bytes]:
    """The bytes of every layer; the same for the same seed."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, shape.block_count * shape.stride, dtype=np.uint8).tobytes() for _ in range(shape.layers)]


def first_difference(expected: bytes, found: bytes) -> str | None:
    """None when equal, else where and what."""
    if expected == found:
        return None
    if len(expected) != len(found):
        return f"{len(found)} bytes, expected {len(expected)}"
    at = int(np.flatnonzero(np.frombuffer(expected, np.uint8) != np.frombuffer(found, np.uint8))[0])
    return f"byte {at}: {found[at]:#x}, expected {expected[at]:#x}"


def place(device: Any, layers: Sequence[bytes]) -> list[int]:
    """Layers in device memory."""
    addresses = [device.allocate(len(layer)) for layer in layers]
    for address, layer in zip(addresses, layers, strict=True):
        device.write(address, layer)
    return addresses


def mask(shape: KvGeometry, kind: int, token_start: int, token_end: int, blocks: Sequence[int]) -> np.ndarray[Any, Any]:
    """Which bytes of a layer a restore of this range writes: 1, else 0."""
    written = np.zeros(shape.block_count * shape.stride, dtype=np.uint8)
    if kind == abi.KIND_KV_BLOCK:
        for block in blocks:
            written[block * shape.stride : block * shape.stride + shape.block_bytes] = 1
        return written
    first = token_start // shape.block_tokens
    for plane, dim in ((shape.key, shape.head_dim_key), (shape.value, shape.head_dim_value)):
        offsets = shape.offsets(plane, dim)
        for token in range(token_start, token_end):
            at = blocks[token // shape.block_tokens - first] * shape.stride + offsets[:, token % shape.block_tokens, :].ravel()
            for byte in range(shape.element_bytes):
                written[at + byte] = 1
    return written
