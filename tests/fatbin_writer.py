"""Fat binaries as the vendor's tools make them, for tests: a container of entries, each raw, LZ4 or zstd.

Owns: the writing side of the format, which Concordia itself has no use for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import lz4.block
import zstandard

PTX, ELF = 1, 2
FLAGS = {"raw": 0, "lz4": 0x2000, "zstd": 0x8000}
SUFFIXES = {"": 0, "a": 0x100000, "f": 0x200000}


@dataclass(frozen=True)
class Part:
    """One entry; `name` lies behind the header, as a source file's name does."""

    kind: int
    architecture: int
    payload: bytes
    packing: str = "raw"
    suffix: str = ""
    name: bytes = b""


def container(parts: list[Part]) -> bytes:
    body = b"".join(map(_entry, parts))
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def _entry(part: Part) -> bytes:
    packed = {
        "raw": lambda data: data,
        "lz4": _lz4,
        "zstd": zstandard.ZstdCompressor(level=9).compress,
    }[part.packing](part.payload)
    stored = packed + bytes(-len(packed) % 8)
    name = part.name + bytes(-len(part.name) % 8)
    is_packed = part.packing != "raw"
    return (
        struct.pack(
            "<HHIQIIHHIIIQQQ", part.kind, 0x101, 64 + len(name), len(stored), len(packed) if is_packed else 0, 0, 7, 1, part.architecture,
            64 if name else 0, len(part.name), 0x11 | FLAGS[part.packing] | SUFFIXES[part.suffix], 0, len(part.payload) if is_packed else 0,
        ) + name + stored
    )  # fmt: skip


def _lz4(data: bytes) -> bytes:
    return lz4.block.compress(data, store_size=False)
