"""Where a token's bytes lie in an engine's KV tensors: first a guess, then proof.

Owns: deriving a KvGeometry from shapes, strides and backend, and the probe that holds it against
what a forward really wrote. Promises: a descriptor counts as proven only after single tokens
changed exactly the bytes it predicts, in several layers; one byte changed elsewhere disproves it
for good. Unproven or disproven means whole blocks, never guessed rows. Called by the worker side. A
layout whose blocks are not one run of bytes per layer is refused with LayoutMismatch.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from concordia import config
from concordia.checkpoint.region import KvGeometry, Plane
from concordia.errors import LayoutMismatch

# new KV may equal old bytes here and there; far fewer changes mean that another token was there
# before
CHANGED_SHARE_MIN = 0.9


class Proof(enum.Enum):
    """UNKNOWN -> PROVEN or DISPROVEN or GIVEN_UP."""

    UNKNOWN = 1
    PROVEN = 2
    DISPROVEN = 3
    GIVEN_UP = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """The geometry, the base address of each layer, and a byte view [block, byte] of each."""

    geometry: KvGeometry
    addresses: tuple[int, ...]
    rows: tuple[torch.Tensor, ...]
    has_planes: bool  # False: blocks are all that is known, so nothing is to be proven


def describe(
    tensors: Mapping[str, torch.Tensor],
    *,
    block_count: int,
    block_tokens: int,
    head_dim_key: int | None,
    instruction_set: str,
) -> Layout:
    """The layout of an engine's KV tensors; raises LayoutMismatch when blocks cannot be
    addressed.
    """
    layers = _distinct(tensors)
    first = layers[0]
    for layer in layers:
        if (layer.shape, layer.stride(), layer.dtype, layer.device) != (
            first.shape, first.stride(), first.dtype, first.device,
        ):  # fmt: skip
            raise LayoutMismatch("KV tensors of different layers have different shapes")
    rows = tuple(_rows(layer, block_count) for layer in layers)
    isa = instruction_set if first.device.type == "cpu" else ""
    planes = _shape(first, block_count, block_tokens, head_dim_key, isa=isa)
    heads, key_dim, value_dim, key, value = planes or _no_planes(rows[0], block_tokens, first)
    geometry = KvGeometry(
        layers=len(layers),
        block_count=block_count,
        block_tokens=block_tokens,
        block_bytes=rows[0].shape[1],
        block_stride=rows[0].stride(0),
        heads=heads,
        head_dim_key=key_dim,
        head_dim_value=value_dim,
        element_bytes=first.element_size(),
        key=key,
        value=value,
        dtype=str(first.dtype).removeprefix("torch."),
        instruction_set=isa or "any",
    )
    return Layout(geometry, tuple(row.data_ptr() for row in rows), rows, planes is not None)


class Probe:
    """Holds the descriptor against the bytes that forwards change; one step at a time."""

    def __init__(self, layout: Layout) -> None:
        self.proof = Proof.UNKNOWN if layout.has_planes else Proof.GIVEN_UP
        self.reason = "" if layout.has_planes else "this backend's tiling is not described"
        self._geometry = layout.geometry
        last = len(layout.rows) - 1
        self._rows = [layout.rows[i] for i in sorted({0, last // 2, last})]
        self._proofs = 0
        self._attempts = 0
        self._token = 0
        self._block = 0
        self._before: list[torch.Tensor] = []

    def arm(self, token: int, block: int) -> None:
        """Keep the block's bytes as they are before this token is computed."""
        self._token, self._block = token, block
        self._before = [row[block].clone() for row in self._rows]

    @property
    def is_armed(self) -> bool:
        return bool(self._before)

    def capture(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Bytes before and after; to be called on the stream of the forward, judged once that is
        done.
        """
        pairs = [
            (b, row[self._block].clone()) for b, row in zip(self._before, self._rows, strict=True)
        ]
        self._before = []
        return pairs

    def judge(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], token: int) -> Proof:
        """What these bytes say; the answer changes once at most."""
        if self.proof is not Proof.UNKNOWN:
            return self.proof
        self._attempts += 1
        mask = predicted_bytes(self._geometry, token % self._geometry.block_tokens)
        is_clear = True
        for before, after in pairs:
            changed = (before != after).cpu().numpy()
            stray = np.flatnonzero(changed & ~mask)
            if stray.size:
                self.reason = (
                    f"token {token} changed byte {int(stray[0])} of its block, which the "
                    "descriptor gives to another"
                )
                self.proof = Proof.DISPROVEN
                return self.proof
            elements = changed[mask].reshape(-1, self._geometry.element_bytes).any(axis=1)
            is_clear = is_clear and float(elements.mean()) >= CHANGED_SHARE_MIN
        self._proofs += is_clear
        if self._proofs >= config.PROBE_PROOFS:
            self.proof = Proof.PROVEN
        elif self._attempts >= config.PROBE_ATTEMPTS_MAX:
            self.reason = f"{self._attempts} steps changed too little to tell"
            self.proof = Proof.GIVEN_UP
        return self.proof

    @property
    def token(self) -> int:
        return self._token


def predicted_bytes(geometry: KvGeometry, slot: int) -> npt.NDArray[np.bool_]:
    """Which bytes of one layer's block belong to the token in this slot; one row per (plane, head,
    element) in order.
    """
    mask = np.zeros(geometry.block_bytes, dtype=bool)
    for plane, dim in (
        (geometry.key, geometry.head_dim_key),
        (geometry.value, geometry.head_dim_value),
    ):
        places = plane.place(*np.ogrid[: geometry.heads, slot : slot + 1, :dim])
        mask[(places[..., None] + np.arange(geometry.element_bytes)).ravel()] = True
    return mask


def in_words(geometry: KvGeometry) -> str:
    """For the log."""
    return (
        f"{geometry.layers} layers, {geometry.block_count} blocks of {geometry.block_tokens} "
        "tokens, "
        f"{geometry.block_bytes} bytes each, {geometry.dtype}, {geometry.instruction_set}"
    )


def _distinct(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Layers in the engine's order, each memory once: layers may share a cache."""
    found: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if not isinstance(tensor, torch.Tensor):
            raise LayoutMismatch(f"a layer's KV cache is {type(tensor).__name__}, not one tensor")
        found.setdefault(tensor.data_ptr(), tensor)
    if not found:
        raise LayoutMismatch("the engine has no KV tensors")
    return list(found.values())


def _rows(tensor: torch.Tensor, block_count: int) -> torch.Tensor:
    """The tensor as [block, byte], if a block is one run of bytes."""
    size = tensor.element_size()
    if tensor.dim() < 3 or tensor.shape[0] % block_count:
        raise LayoutMismatch(
            f"KV tensor of shape {tuple(tensor.shape)} has no {block_count} blocks in front"
        )
    per_block = tensor.shape[0] // block_count  # kernels may use smaller blocks than the manager
    inner = sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True))
    run = 1
    for stride, length in inner:
        if length > 1 and stride != run:
            raise LayoutMismatch(f"a block of strides {tensor.stride()} is not one run of bytes")
        run *= length
    if per_block > 1 and tensor.stride(0) != run:
        raise LayoutMismatch(f"kernel blocks of strides {tensor.stride()} do not lie side by side")
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    storage = tensor.untyped_storage()
    shape = (block_count, per_block * run * size)
    stride = (per_block * tensor.stride(0) * size, 1)
    return view.set_(storage, tensor.storage_offset() * size, shape, stride)


_Shape = tuple[int, int, int, Plane, Plane]


def _shape(
    tensor: torch.Tensor, block_count: int, block_tokens: int, head_dim_key: int | None, *, isa: str
) -> _Shape | None:
    """Heads, dims and planes where the shape tells them: [B, H, N, K|V], [B, N, latent], or the
    older [B, 2, N, H, D]. No `isa`: not on a CPU.
    """
    size = tensor.element_size()
    if tensor.shape[0] != block_count:
        return None
    stride = [s * size for s in tensor.stride()]
    if tensor.dim() == 3 and not isa:  # MLA by itself: [B, N, latent]
        tensor, stride = tensor.unsqueeze(1), [stride[0], stride[0], *stride[1:]]
    if tensor.dim() == 4 and tensor.shape[2] == block_tokens and tensor.stride(3) == 1:
        heads, content = int(tensor.shape[1]), int(tensor.shape[3])
        key_dim = min(head_dim_key or content // 2, content)  # all of it: latents, packed bits
        value_dim = content - key_dim
        if isa:
            of_cpu = _amx_shape if isa.endswith("amx") else _cpu_shape
            return of_cpu(tensor, heads=heads, dim=key_dim) if key_dim == value_dim else None
        key = Plane(0, stride[1], stride[2], size)
        value = Plane(key_dim * size, stride[1], stride[2], size)
        return heads, key_dim, value_dim, key, value
    if tensor.dim() == 5 and tensor.shape[1] == 2 and tensor.shape[2] == block_tokens and not isa:
        dim = int(tensor.shape[4])
        key = Plane(0, stride[3], stride[2], stride[4])
        value = Plane(stride[1], stride[3], stride[2], stride[4])
        return int(tensor.shape[3]), dim, dim, key, value
    return None


def _cpu_shape(tensor: torch.Tensor, *, heads: int, dim: int) -> _Shape | None:
    """vLLM's CPU kernels: per (block, head) first K as [element][token], then V as
    [token][element].
    """
    if not tensor.is_contiguous():
        return None
    size, tokens = tensor.element_size(), int(tensor.shape[2])
    head_stride = 2 * tokens * dim * size
    key = Plane(0, head_stride, size, tokens * size)
    value = Plane(tokens * dim * size, head_stride, dim * size, size)
    return heads, dim, dim, key, value


def _amx_shape(tensor: torch.Tensor, *, heads: int, dim: int) -> _Shape | None:
    """The same, where a CPU multiplies tiles (AMX): tiles of 16 columns by rows of two, which lie
    side by side.

    K is [token / 16][element / 2][16 tokens][2 elements], V is [element / 16][token / 2][16
    elements][2 tokens].
    """
    tokens = int(tensor.shape[2])
    if not tensor.is_contiguous() or tokens % 16 or dim % 16:
        return None
    size = tensor.element_size()
    head_stride, row = 2 * tokens * dim * size, 32 * size
    key = Plane(0, head_stride, 2 * size, size, 16, 16 * dim * size, 2, row)
    value = Plane(tokens * dim * size, head_stride, size, 2 * size, 2, row, 16, 16 * tokens * size)
    return heads, dim, dim, key, value


def _no_planes(row: torch.Tensor, block_tokens: int, tensor: torch.Tensor) -> _Shape:
    """A descriptor that only names blocks: never used for rows."""
    size = tensor.element_size()
    dim = max(1, row.shape[1] // (block_tokens * size))
    plane = Plane(0, row.shape[1], dim * size, size)
    return 1, dim, 0, plane, Plane(0, 0, 0, size)


def describe_kv(
    vllm_config: Any, kv_cache_config: Any, tensors: Mapping[str, torch.Tensor]
) -> Layout:
    """`describe` for the only group of a vLLM engine."""
    from concordia.integrations.vllm import compat

    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    instruction_set = compat.cpu_instruction_set(vllm_config, kv_cache_config)
    if instruction_set.endswith("amx"):
        compat.allow_tiles()
    return describe(
        tensors,
        block_count=int(kv_cache_config.num_blocks),
        block_tokens=compat.block_tokens(kv_cache_config),
        head_dim_key=getattr(spec, "head_size", None),
        instruction_set=instruction_set,
    )
