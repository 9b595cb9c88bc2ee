"""integrations/vllm/layout.py.

Invariants: the descriptor of a known shape names exactly the bytes that the backend writes for a token; it counts only after proof; one stray
byte disproves it for good; what cannot be addressed block by block is refused.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch

from concordia import config
from concordia.errors import LayoutMismatch
from concordia.integrations.vllm.layout import Layout, Probe, Proof, describe, predicted_bytes

BLOCKS, HEADS, TOKENS, DIM = 6, 2, 32, 8


def cpu_tensors(layers: int = 3) -> dict[str, Any]:
    return {f"l{i}": torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM, dtype=torch.bfloat16) for i in range(layers)}


def described(tensors: dict[str, Any], *, instruction_set: str = "x86_64-vec", dim: int | None = DIM) -> Layout:
    return describe(
        tensors, block_count=BLOCKS, block_tokens=TOKENS, head_dim_key=dim, instruction_set=instruction_set
    )


def write_cpu_token(tensor: Any, block: int, slot: int, value: float) -> None:
    """What vLLM's CPU kernel does: K as [element][token], V as [token][element], per head."""
    view = tensor.view(BLOCKS, HEADS, 2, TOKENS * DIM)
    view[block, :, 0].view(HEADS, DIM, TOKENS)[:, :, slot] = value
    view[block, :, 1].view(HEADS, TOKENS, DIM)[:, slot, :] = value


def run_probe(layout: Layout, tensors: dict[str, Any], *, token: int, write: Any) -> Probe:
    probe = Probe(layout)
    probe.arm(token, 3)
    for tensor in tensors.values():
        write(tensor)
    probe.judge(probe.capture(), token)
    return probe


def test_descriptor_is_proven_when_tokens_change_what_it_predicts() -> None:
    tensors = cpu_tensors()
    layout = described(tensors)
    layout.geometry.check()
    probe = Probe(layout)
    for token in range(config.PROBE_PROOFS):
        assert probe.proof is Proof.UNKNOWN
        probe.arm(token, 3)
        for tensor in tensors.values():
            write_cpu_token(tensor, 3, token, 1.5)
        probe.judge(probe.capture(), token)
    assert probe.proof is Proof.PROVEN


def test_descriptor_is_disproven_when_one_other_byte_changes() -> None:
    tensors = cpu_tensors()

    def write(tensor: Any) -> None:
        write_cpu_token(tensor, 3, 5, 1.5)
        tensor[3, 1, 31, 15] = 2.0

    probe = run_probe(described(tensors), tensors, token=5, write=write)
    assert probe.proof is Proof.DISPROVEN
    assert "token 5 changed byte" in probe.reason


def test_descriptor_is_disproven_when_the_backend_tiles_differently() -> None:
    tensors = cpu_tensors()

    def write(tensor: Any) -> None:
        tensor[3, :, 5, :] = 1.5  # what the shape says, and this backend does not do

    assert run_probe(described(tensors), tensors, token=5, write=write).proof is Proof.DISPROVEN


def test_descriptor_stays_unknown_when_nothing_changes_and_is_given_up_at_the_bound() -> None:
    tensors = cpu_tensors()
    probe = Probe(described(tensors))
    for attempt in range(config.PROBE_ATTEMPTS_MAX):
        assert probe.proof is Proof.UNKNOWN, attempt
        probe.arm(1, 3)
        probe.judge(probe.capture(), 1)
    assert probe.proof is Proof.GIVEN_UP


def test_blocks_are_all_that_is_known_when_elements_do_not_fill_amx_tiles() -> None:
    layout = described(cpu_tensors(), instruction_set="x86_64-amx")
    layout.geometry.check()
    assert not layout.has_planes
    assert Probe(layout).proof is Proof.GIVEN_UP
    assert layout.geometry.layout_hash() != described(cpu_tensors()).geometry.layout_hash()


@pytest.mark.parametrize("slot", [0, 1, 17, 63])
@pytest.mark.parametrize(
    ("isa", "dtype", "kv_dtype", "dim"),
    [
        ("amx", "bfloat16", "auto", 64),
        ("amx", "bfloat16", "fp8_e4m3", 64),
        ("vec", "bfloat16", "auto", 64),
        ("vec", "float32", "auto", 32),
        ("vec", "bfloat16", "fp8_e4m3", 64),
        ("vec16", "bfloat16", "auto", 80),
    ],
)
def test_descriptor_names_what_the_kernel_of_vllm_writes(isa: str, dtype: str, kv_dtype: str, dim: int, slot: int) -> None:
    ops = pytest.importorskip("vllm._custom_ops", reason="vLLM is not installed")
    platform = pytest.importorskip("vllm.platforms").current_platform
    if not platform.is_cpu():
        pytest.skip("this vLLM has no kernels for a CPU")
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has no AMX")
    if kv_dtype != "auto" and not torch.cpu._is_avx512_supported():
        pytest.skip("this CPU has no AVX-512, which vLLM's fp8 cache needs")
    platform.import_kernels()
    tokens, element = 64, getattr(torch, dtype)
    cache = torch.zeros(BLOCKS, HEADS, tokens, 2 * dim, dtype=element if kv_dtype == "auto" else torch.uint8)
    layout = describe(
        {"l0": cache}, block_count=BLOCKS, block_tokens=tokens, head_dim_key=dim, instruction_set=f"x86_64-{isa}"
    )
    layout.geometry.check()
    key, value = torch.rand(2, 1, HEADS, dim).to(element) + 1
    halves = cache.view(BLOCKS, HEADS, 2 * tokens, -1).chunk(2, dim=2)
    place = torch.tensor([3 * tokens + slot])
    ops.cpu_attn_reshape_and_cache(key, value, *halves, place, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype=kv_dtype)
    block = layout.rows[0][3].numpy()
    mask = predicted_bytes(layout.geometry, slot)
    assert not block[~mask].any()
    assert block[mask].reshape(-1, layout.geometry.element_bytes).any(axis=1).all()
    if kv_dtype == "auto":  # and each element in its place, not only among its token's
        places = layout.geometry.offsets(layout.geometry.key, dim)[:, slot]
        found = torch.from_numpy(block.copy()).view(element)[torch.from_numpy(places // layout.geometry.element_bytes)]
        assert torch.equal(found, key[0])


def test_strides_are_followed_when_tokens_lie_outside_heads() -> None:
    """vLLM 0.26 on a GPU: the shape says heads before tokens, memory has tokens before heads, K and V side by side."""
    memory = torch.zeros(BLOCKS, TOKENS, HEADS, 2 * DIM, dtype=torch.bfloat16, device="meta")
    tensor = memory.permute(0, 2, 1, 3)
    found = _shape_of(tensor)
    assert found is not None
    heads, key_dim, value_dim, key, value = found
    assert (heads, key_dim, value_dim) == (HEADS, DIM, DIM)
    assert (key.offset, key.token_stride, key.head_stride, key.element_stride) == (0, HEADS * 2 * DIM * 2, 2 * DIM * 2, 2)
    assert value.offset == DIM * 2


def test_planes_are_apart_when_the_shape_has_k_and_v_in_front() -> None:
    found = _shape_of(torch.zeros(BLOCKS, 2, TOKENS, HEADS, DIM, dtype=torch.bfloat16, device="meta"))
    assert found is not None
    assert found[4].offset == TOKENS * HEADS * DIM * 2
    assert found[3].token_stride == HEADS * DIM * 2


def _shape_of(tensor: Any) -> Any:
    from concordia.integrations.vllm import layout

    return layout._shape(tensor, BLOCKS, TOKENS, DIM, isa="")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "no KV tensors"),
        ({"a": [torch.zeros(1)]}, "not one tensor"),
        ({"a": torch.zeros(2, BLOCKS, TOKENS, HEADS, DIM)}, "blocks in front"),
        ({"a": torch.zeros(HEADS, BLOCKS, TOKENS, DIM).permute(1, 0, 2, 3)}, "not one run"),
        ({"a": torch.zeros(BLOCKS, 1, TOKENS, DIM), "b": torch.zeros(BLOCKS, 2, TOKENS, DIM)}, "different shapes"),
    ],
)
def test_layout_is_refused_when_blocks_cannot_be_addressed(tensors: dict[str, Any], words: str) -> None:
    with pytest.raises(LayoutMismatch, match=words):
        described(tensors)


def test_shared_layer_is_saved_once_when_two_names_have_one_memory() -> None:
    tensors = cpu_tensors(2)
    tensors["again"] = tensors["l0"]
    assert described(tensors).geometry.layers == 2


def test_small_kernel_blocks_are_one_block_when_the_manager_s_are_larger() -> None:
    tensors = {"a": torch.zeros(BLOCKS * 2, HEADS, TOKENS // 2, 2 * DIM, dtype=torch.bfloat16)}
    layout = described(tensors)
    layout.geometry.check()
    assert not layout.has_planes
    assert layout.geometry.block_bytes == HEADS * TOKENS * 2 * DIM * 2


def test_predicted_bytes_of_all_tokens_fill_the_block_once() -> None:
    geometry = described(cpu_tensors()).geometry
    total = sum(predicted_bytes(geometry, slot).astype(int) for slot in range(TOKENS))
    assert (total == 1).all()


# --- every physical layout of vLLM, made by vLLM itself

KINDS: dict[str, dict[str, Any]] = {
    "gqa": {"num_kv_heads": 4, "head_size": 32, "dtype": torch.bfloat16},
    "gqa-fp8": {"num_kv_heads": 4, "head_size": 32, "dtype": torch.uint8},
    "one-head": {"num_kv_heads": 1, "head_size": 64, "dtype": torch.float16},
    "other-value": {"num_kv_heads": 2, "head_size": 32, "head_size_v": 16, "dtype": torch.bfloat16},
    "fp8-scales-inside": {"num_kv_heads": 2, "head_size": 32, "dtype": torch.uint8, "state_content_bytes": 2 * (32 + 4)},
    "int4-packed": {"num_kv_heads": 2, "head_size": 64, "dtype": torch.uint8, "state_content_bytes": 40},
    "stacked": {"num_kv_heads": 4, "head_size": 16, "dtype": torch.bfloat16, "num_head_slots": 2, "state_content_bytes": 4 * 16 * 2},
    "mla": {"num_kv_heads": 1, "head_size": 576, "dtype": torch.bfloat16, "head_size_v": 0},
    "mla-fp8": {"num_kv_heads": 1, "head_size": 576, "dtype": torch.uint8, "head_size_v": 0, "state_content_bytes": 656},
    "padded": {"num_kv_heads": 2, "head_size": 16, "dtype": torch.bfloat16, "page_size_padded": 8192},
}  # fmt: skip


def layers_of_vllm(layout: str, kind: str, *, layers: int = 3) -> tuple[Any, dict[str, Any], int]:
    """The allocation and the views that vLLM makes of it, and heads as the layout has them."""
    interface = pytest.importorskip("vllm.v1.kv_cache_interface", reason="vLLM is not installed")
    layouts = pytest.importorskip("vllm.v1.kv_cache_layout", reason="this vLLM has no named layouts")
    spec = interface.FullAttentionSpec(block_size=TOKENS, **KINDS[kind])
    chosen = layouts.KVCacheLayout[layout]
    strides = interface.compute_layout_strides(spec, BLOCKS, layers, chosen)
    names = [f"l{i}" for i in range(layers)]
    raw = torch.zeros(layers * BLOCKS * spec.page_size_bytes, dtype=torch.int8)
    placed = interface.KVCacheTensor(size=raw.numel(), layers=names, layer_stride=strides[0], block_stride=strides[1])
    views = interface.create_kv_cache_views(raw, spec, BLOCKS, chosen, placed)
    return raw, dict(zip(names, views, strict=True)), spec.num_heads


SCATTERED = ("LHBNC", "BHLNC")  # a block's heads lie apart, where there are several
LAYOUTS = ("LBHNC", "LBNHC", "BLHNC", "BLNHC", *SCATTERED)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [(layout, kind) for layout in LAYOUTS for kind in KINDS if not (layout in SCATTERED and kind == "padded")],  # vLLM pads none of these
)
def test_descriptor_names_a_token_s_bytes_in_every_layout_of_vllm(layout: str, kind: str) -> None:
    raw, tensors, heads = layers_of_vllm(layout, kind)
    if layout in SCATTERED and heads > 1:
        with pytest.raises(LayoutMismatch, match="not one run"):
            described(tensors, instruction_set="", dim=KINDS[kind]["head_size"])
        return
    found = described(tensors, instruction_set="", dim=KINDS[kind]["head_size"])
    found.geometry.check()
    assert found.has_planes
    assert found.geometry.heads == heads
    assert (found.geometry.head_dim_value == 0) == (kind in {"mla", "int4-packed"})
    for name, block, slot in (("l0", 0, 0), ("l1", 3, 17), ("l2", BLOCKS - 1, TOKENS - 1)):
        raw.zero_()
        tensors[name][block, :, slot].view(torch.uint8).fill_(7)
        row = found.rows[list(tensors).index(name)]
        mask = predicted_bytes(found.geometry, slot)
        assert (row[block].numpy() == 7 * mask).all()
        assert int(raw.count_nonzero()) == mask.sum(), "every byte of the token is in that block"


def test_latents_are_one_plane_when_the_cache_is_of_mla() -> None:
    """[block, token, latent], as backends with a shape of their own have it."""
    cache = torch.zeros(BLOCKS, TOKENS, 576, dtype=torch.bfloat16)
    found = described({"l0": cache}, instruction_set="", dim=576)
    found.geometry.check()
    assert (found.geometry.heads, found.geometry.head_dim_key, found.geometry.head_dim_value) == (1, 576, 0)
    cache[2, 5].view(torch.uint8).fill_(9)
    assert (found.rows[0][2].numpy() == 9 * predicted_bytes(found.geometry, 5)).all()


def test_only_blocks_are_known_when_latents_lie_on_a_cpu() -> None:
    """vLLM's CPU kernels tile K and V; what they do to latents is not described."""
    for cache in (torch.zeros(BLOCKS, 1, TOKENS, 64, dtype=torch.bfloat16), torch.zeros(BLOCKS, TOKENS, 64, dtype=torch.bfloat16)):
        found = described({"l0": cache}, dim=64)
        found.geometry.check()
        assert not found.has_planes
