"""Registered memory with a layout, floor 4.

Owns: `KvGeometry` (where a token's bytes lie in an engine's KV cache), regions and their
description in memory that the executor reads. Promises: a geometry whose elements leave the block
or lie on each other is refused; two geometries with one layout_hash hold blocks and tails of the
same meaning. Called by checkpointer.py and by connectors, which make the geometry. Does not guess
layouts and reads no KV.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from concordia import abi
from concordia.device.driver import Burst, Device
from concordia.errors import UsageError
from concordia.runtime.op_table import Operator

BASE_ALIGNMENT = 16  # the widest access of a lane


@dataclass(frozen=True, slots=True)
class Plane:
    """K or V of one block: byte strides from the block's start.

    Kernels that multiply tiles keep K and V in tiles: `token_tile` tokens lie `token_stride` apart
    and tiles `token_tile_stride`; elements alike. A tile of 0 is none.
    """

    offset: int
    head_stride: int
    token_stride: int
    element_stride: int
    token_tile: int = 0
    token_tile_stride: int = 0
    element_tile: int = 0
    element_tile_stride: int = 0

    def place(
        self,
        heads: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        elements: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """Byte offset in the block of the first byte of each element; the arguments are
        broadcast.
        """
        found: npt.NDArray[np.int64] = (
            self.offset
            + heads * self.head_stride
            + _tiled(tokens, self.token_stride, self.token_tile, self.token_tile_stride)
            + _tiled(elements, self.element_stride, self.element_tile, self.element_tile_stride)
        )
        return found


def _tiled(
    index: npt.NDArray[np.int64], stride: int, tile: int, tile_stride: int
) -> npt.NDArray[np.int64]:
    return index * stride if tile == 0 else index // tile * tile_stride + index % tile * stride


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """A paged KV cache: one tensor per layer, `block_count` blocks of `block_bytes`, `block_stride`
    bytes apart (0: side by side).
    """

    layers: int
    block_count: int
    block_tokens: int
    block_bytes: int
    heads: int
    head_dim_key: int
    head_dim_value: int
    element_bytes: int
    key: Plane
    value: Plane
    dtype: str
    instruction_set: str
    block_stride: int = 0

    @property
    def stride(self) -> int:
        """Bytes from one block of a layer to the next."""
        return self.block_stride or self.block_bytes

    def layout_hash(self) -> int:
        """64 bits that name what bytes mean; how many blocks there are, and how far apart, is no
        part of it.
        """
        facts = asdict(self)
        del facts["block_count"], facts["block_stride"]
        return xxhash.xxh3_64_intdigest(json.dumps(facts, sort_keys=True).encode())

    def tail_bytes(self, tokens: int) -> int:
        """Payload of a KIND_KV_TAIL record."""
        return (
            self.layers
            * self.heads
            * (self.head_dim_key + self.head_dim_value)
            * self.element_bytes
            * tokens
        )

    def raw_bytes(self) -> int:
        """Payload of a KIND_KV_BLOCK record of one block."""
        return self.layers * self.block_bytes

    def offsets(self, plane: Plane, dim: int) -> npt.NDArray[np.int64]:
        """Byte offset in a block of every element: [head, token, element]."""
        return plane.place(*np.ogrid[: self.heads, : self.block_tokens, :dim])

    def check(self) -> None:
        """Raise UsageError unless every element lies inside the block and on its own bytes."""
        counts = (
            self.layers,
            self.block_count,
            self.block_tokens,
            self.block_bytes,
            self.heads,
            self.head_dim_key,
            self.element_bytes,
        )
        if min(counts) < 1 or self.head_dim_value < 0 or self.element_bytes not in (1, 2, 4, 8):
            raise UsageError(f"not a geometry: {self}")
        if self.stride < self.block_bytes:
            raise UsageError(f"blocks of {self.block_bytes} bytes lie {self.stride} apart")
        planes = [
            self.offsets(self.key, self.head_dim_key),
            self.offsets(self.value, self.head_dim_value),
        ]
        starts = np.sort(np.concatenate([found.ravel() for found in planes]))
        if starts[0] < 0 or starts[-1] + self.element_bytes > self.block_bytes:
            raise UsageError(
                f"elements at bytes {starts[0]} to {starts[-1]} of a block of "
                f"{self.block_bytes}: {self}"
            )
        if len(starts) > 1 and int(np.diff(starts).min()) < self.element_bytes:
            raise UsageError(f"elements lie on each other: {self}")

    def constants(self) -> dict[str, int]:
        """The numbers that kernels/kv.h is compiled with."""
        found = {
            "KV_LAYERS": self.layers,
            "KV_HEADS": self.heads,
            "KV_ELEMENT_BYTES": self.element_bytes,
            "KV_BLOCK_TOKENS": self.block_tokens,
            "KV_BLOCK_BYTES": self.block_bytes,
            "KV_BLOCK_STRIDE": self.stride,
            "KV_KEY_DIM": self.head_dim_key,
            "KV_VALUE_DIM": self.head_dim_value,
        }
        for name, plane in (("KEY", self.key), ("VALUE", self.value)):
            found |= {f"KV_{name}_{field.upper()}": value for field, value in asdict(plane).items()}
        return found


class RegionEntry:
    """A Region of kernels/abi.h with its base addresses, where the executor reads it."""

    def __init__(
        self,
        device: Device,
        *,
        number: int,
        bases: Sequence[int],
        block_count: int,
        layout_hash: int = 0,
        page_hashes: int = 0,
    ) -> None:
        self._device = device
        self.address = device.allocate(abi.REGION.size + 8 * len(bases))
        words = np.zeros(1, dtype=abi.REGION.dtype)
        words["bases"] = self.address + abi.REGION.size
        words["base_count"] = len(bases)
        words["region"] = number
        words["block_count"] = block_count
        words["layout_hash"] = layout_hash
        words["page_hashes"] = page_hashes
        device.write(self.address, words.tobytes() + np.array(bases, dtype="<u8").tobytes())

    def close(self) -> None:
        """No operator names this region any more."""
        self._device.free(self.address)


@dataclass(frozen=True, slots=True)
class Region:
    """A registered KV cache and the operators that know its layout."""

    number: int
    geometry: KvGeometry
    layout_hash: int
    entry: RegionEntry
    append: Operator
    apply: Operator
    hash: Operator


@dataclass(frozen=True, slots=True)
class PageRegion:
    """A registered opaque region, found dirty by hash."""

    number: int
    address: int
    page_bytes: int
    page_count: int
    layout_hash: int  # what its bytes mean, as the caller names it
    entry: RegionEntry
    page_hashes: int  # device address of the table
    scan: Operator
    # scans with the whole device, where there is one and pages are single leaves
    burst: Burst | None

    @staticmethod
    def table_bytes(page_count: int) -> int:
        """Size of the table, as kernels/page_table.h lays it out: a hash per page, then the length
        and the numbers of a list of pages.
        """
        return 16 * page_count + 8 + 4 * page_count

    @property
    def size(self) -> int:
        """Bytes of all pages."""
        return self.page_bytes * self.page_count

    @property
    def found_count(self) -> int:
        """Device address of the list's length."""
        return self.page_hashes + 16 * self.page_count
