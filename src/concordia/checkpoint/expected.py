"""What a KV handler must do, said once more in numpy, floor 4.

Owns: the bytes of a token range by index, in the order that records have them. Promises: it shares
no code with the handlers, so both are wrong in one way only if a geometry is. Called by the
self-tests (handler.py, record_proof.py). Runs nothing on a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from concordia import abi
from concordia.checkpoint.region import KvGeometry
from concordia.errors import HandlerRefused


@dataclass(frozen=True, slots=True)
class KvRange:
    """A token range and the blocks that hold it."""

    kind: int
    token_start: int
    token_end: int
    blocks: tuple[int, ...]


def expected_bytes(geometry: KvGeometry, layers: Sequence[bytes], wanted: KvRange) -> bytes:
    """What a record of this range must hold, picked out by index."""
    if wanted.kind == abi.KIND_KV_BLOCK:
        starts = [block * geometry.stride for block in wanted.blocks]
        return b"".join(layer[at : at + geometry.block_bytes] for at in starts for layer in layers)
    parts = []
    for layer in layers:
        taken = np.frombuffer(layer, np.uint8)
        parts += [taken[at].tobytes() for at in _tail_indices(geometry, wanted)]
    return b"".join(parts)


def written_bytes(
    geometry: KvGeometry, wanted: KvRange, *, block_count: int
) -> npt.NDArray[np.bool_]:
    """Which bytes of a layer of so many blocks belong to this range."""
    mask = np.zeros(block_count * geometry.stride, dtype=bool)
    if wanted.kind == abi.KIND_KV_BLOCK:
        for block in wanted.blocks:
            mask[block * geometry.stride : block * geometry.stride + geometry.block_bytes] = True
        return mask
    for at in _tail_indices(geometry, wanted):
        mask[at] = True
    return mask


def _tail_indices(geometry: KvGeometry, wanted: KvRange) -> list[npt.NDArray[np.int64]]:
    """Byte positions in a layer, K's and then V's, in the order of a tail: [head, token, element,
    byte].
    """
    tokens = np.arange(wanted.token_start, wanted.token_end)
    blocks = np.array(wanted.blocks)[
        tokens // geometry.block_tokens - wanted.token_start // geometry.block_tokens
    ]
    slots = tokens % geometry.block_tokens
    found = []
    for plane, dim in (
        (geometry.key, geometry.head_dim_key),
        (geometry.value, geometry.head_dim_value),
    ):
        inside = (
            geometry.offsets(plane, dim)[:, slots, :] + (blocks * geometry.stride)[None, :, None]
        )
        found.append((inside[..., None] + np.arange(geometry.element_bytes)).ravel())
    return found


def compare(name: str, expected: bytes, found: bytes) -> None:
    """Raise HandlerRefused with the first byte that differs."""
    if expected == found:
        return
    differs = np.flatnonzero(np.frombuffer(expected, np.uint8) != np.frombuffer(found, np.uint8))
    at = int(differs[0])
    raise HandlerRefused(
        f"{name}: byte {at} of {len(expected)} is {found[at]:#04x}, expected "
        f"{expected[at]:#04x} ({len(differs)} differ)"
    )
