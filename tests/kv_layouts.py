"""KV caches as engines lay them out, and what records of them hold, by reshaping alone: tests compare handlers with it."""

from __future__ import annotations

import numpy as np

from concordia.checkpoint.region import KvGeometry, Plane

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
BLOCKS = 6


def packed_cpu(*, layers: int, heads: int, tokens: int, dim: int, size: int) -> KvGeometry:
    """vLLM on a CPU: per (block, head) K as [element][token], then V as [token][element]."""
    half = tokens * dim * size
    return KvGeometry(
        layers, BLOCKS, tokens, heads * 2 * half, heads, dim, dim, size,
        key=Plane(0, 2 * half, size, tokens * size),
        value=Plane(half, 2 * half, dim * size, size),
        dtype="bfloat16", instruction_set="vec",
    )  # fmt: skip


def packed_gpu(
    *, layers: int, heads: int, tokens: int, key: int, value: int, size: int, gap: int = 0
) -> KvGeometry:
    """vLLM on a GPU: [token][head][K | V]."""
    row = (key + value) * size
    block = tokens * heads * row
    return KvGeometry(
        layers, BLOCKS, tokens, block, heads, key, value, size,
        key=Plane(0, row, heads * row, size),
        value=Plane(key * size, row, heads * row, size),
        dtype="uint8", instruction_set="any", block_stride=block + gap,
    )  # fmt: skip


def head_first(*, layers: int, heads: int, tokens: int, dim: int, size: int) -> KvGeometry:
    """vLLM on a GPU, heads outside tokens: [head][token][K | V]."""
    row = 2 * dim * size
    return KvGeometry(
        layers, BLOCKS, tokens, tokens * heads * row, heads, dim, dim, size,
        key=Plane(0, tokens * row, row, size),
        value=Plane(dim * size, tokens * row, row, size),
        dtype="uint8", instruction_set="any",
    )  # fmt: skip


def stacked(*, layers: int, heads: int, tokens: int, dim: int, size: int) -> KvGeometry:
    """vLLM on a GPU, all of K before all of V: [K | V][token][head]."""
    half = tokens * heads * dim * size
    return KvGeometry(
        layers, BLOCKS, tokens, 2 * half, heads, dim, dim, size,
        key=Plane(0, dim * size, heads * dim * size, size),
        value=Plane(half, dim * size, heads * dim * size, size),
        dtype="uint8", instruction_set="any",
    )  # fmt: skip


def tiled_cpu(*, layers: int, heads: int, tokens: int, dim: int, size: int) -> KvGeometry:
    """vLLM on a CPU with AMX: per (block, head) K in tiles of 16 tokens by 2 elements, then V in tiles of 16 elements by 2 tokens."""
    half, pair = tokens * dim * size, 32 * size
    return KvGeometry(
        layers, BLOCKS, tokens, heads * 2 * half, heads, dim, dim, size,
        key=Plane(0, 2 * half, 2 * size, size, 16, 16 * dim * size, 2, pair),
        value=Plane(half, 2 * half, size, 2 * size, 2, pair, 16, 16 * tokens * size),
        dtype="bfloat16", instruction_set="amx",
    )  # fmt: skip


GEOMETRIES = {
    "amx-bf16": tiled_cpu(layers=2, heads=2, tokens=64, dim=32, size=2),
    "amx-fp8": tiled_cpu(layers=2, heads=1, tokens=32, dim=64, size=1),
    "cpu-bf16": packed_cpu(layers=2, heads=2, tokens=128, dim=64, size=2),
    "cpu-fp8": packed_cpu(layers=3, heads=1, tokens=32, dim=80, size=1),
    "gpu-bf16": packed_gpu(layers=3, heads=4, tokens=16, key=64, value=64, size=2),
    "gpu-fp8-gap": packed_gpu(layers=2, heads=2, tokens=16, key=128, value=128, size=1, gap=4096),
    "head-first": head_first(layers=2, heads=4, tokens=16, dim=32, size=2),
    "stacked-fp8": stacked(layers=2, heads=2, tokens=16, dim=64, size=1),
    "mla": packed_gpu(layers=3, heads=1, tokens=64, key=576, value=0, size=2),
    "mla-fp8": packed_gpu(layers=2, heads=1, tokens=64, key=656, value=0, size=1),
    "odd": packed_gpu(layers=2, heads=3, tokens=8, key=20, value=12, size=2),
}


def planes(name: str, layer: Bytes) -> list[Bytes]:
    """K and V of one layer as [block, head, token, byte], by reshaping alone."""
    g = GEOMETRIES[name]
    blocks = layer.reshape(BLOCKS, g.stride)[:, : g.block_bytes]
    if name.startswith("amx"):
        halves = blocks.reshape(BLOCKS, g.heads, 2, -1)
        keys = halves[:, :, 0].reshape(
            BLOCKS, g.heads, g.block_tokens // 16, g.head_dim_key // 2, 16, 2, g.element_bytes
        )
        values = halves[:, :, 1].reshape(
            BLOCKS, g.heads, g.head_dim_value // 16, g.block_tokens // 2, 16, 2, g.element_bytes
        )
        shape = (BLOCKS, g.heads, g.block_tokens, -1)
        return [
            keys.transpose(0, 1, 2, 4, 3, 5, 6).reshape(shape),
            values.transpose(0, 1, 3, 5, 2, 4, 6).reshape(shape),
        ]
    if name.startswith("cpu"):
        heads = blocks.reshape(BLOCKS, g.heads, 2, g.block_tokens * g.head_dim_key, g.element_bytes)
        key = heads[:, :, 0].reshape(
            BLOCKS, g.heads, g.head_dim_key, g.block_tokens, g.element_bytes
        )
        value = heads[:, :, 1].reshape(BLOCKS, g.heads, g.block_tokens, -1)
        return [key.transpose(0, 1, 3, 2, 4).reshape(BLOCKS, g.heads, g.block_tokens, -1), value]
    if name.startswith("stacked"):
        halves = blocks.reshape(BLOCKS, 2, g.block_tokens, g.heads, -1)
        return [halves[:, half].transpose(0, 2, 1, 3) for half in (0, 1)]
    if name.startswith("head"):
        rows = blocks.reshape(BLOCKS, g.heads, g.block_tokens, -1)
    else:
        rows = blocks.reshape(BLOCKS, g.block_tokens, g.heads, -1).transpose(0, 2, 1, 3)
    at = g.head_dim_key * g.element_bytes
    return [rows[..., :at], rows[..., at:]]


def tail_of(name: str, layers: list[Bytes], start: int, end: int, blocks: list[int]) -> bytes:
    size = GEOMETRIES[name].block_tokens
    parts = []
    for layer in layers:
        for plane in planes(name, layer):
            tokens = [
                plane[blocks[t // size - start // size], :, t % size] for t in range(start, end)
            ]
            parts.append(np.stack(tokens, axis=1).tobytes())
    return b"".join(parts)


def raw_of(name: str, layers: list[Bytes], blocks: list[int]) -> bytes:
    g = GEOMETRIES[name]
    return b"".join(
        layer[block * g.stride : block * g.stride + g.block_bytes].tobytes()
        for block in blocks
        for layer in layers
    )
