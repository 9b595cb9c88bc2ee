"""What vLLM hands a connector, as much of it as one reads."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

BLOCKS, HEADS, TOKENS, DIM = 16, 2, 32, 8


def vllm_config(journal: pathlib.Path, **more: Any) -> Any:
    """As much of a VllmConfig as a connector reads."""
    parallel = {"world_size": 1, "decode_context_parallel_size": 1, "pipeline_parallel_size": 1, **more.pop("parallel", {})}
    extra = {"journal": str(journal), "replica": 3, **more.pop("extra", {})}
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra, is_kv_producer=True),
        parallel_config=SimpleNamespace(**parallel),
        scheduler_config=SimpleNamespace(async_scheduling=more.pop("is_async", False)),
        speculative_config=more.pop("speculative", None),
        cache_config=SimpleNamespace(cache_dtype=more.pop("cache_dtype", "auto"), **more.pop("cache", {})),
        model_config=SimpleNamespace(**{"model": "m", "dtype": torch.bfloat16, "hf_config": None} | more),
    )


def spec(kind: Any = FullAttentionSpec, **more: Any) -> Any:
    return kind(block_size=TOKENS, num_kv_heads=HEADS, head_size=DIM, dtype=torch.bfloat16, **more)


def cache_config(*specs: Any) -> KVCacheConfig:
    groups = [KVCacheGroupSpec(layer_names=[f"l{i}"], kv_cache_spec=one) for i, one in enumerate(specs or (spec(),))]
    return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)


def tensors() -> dict[str, torch.Tensor]:
    return {f"l{i}": torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM, dtype=torch.bfloat16) for i in range(2)}


def asked(name: str, tokens: int, **more: Any) -> Any:
    fields = {
        "request_id": name, "all_token_ids": list(range(tokens)), "prompt_token_ids": list(range(tokens)),
        "kv_transfer_params": None, "mm_features": [], "lora_request": None, "cache_salt": None, "prompt_embeds": None,
    }  # fmt: skip
    return SimpleNamespace(**fields | more)


def step_of(*new: tuple[str, list[int], int, int], cached: tuple[tuple[str, list[int], int, int], ...] = (), **more: Any) -> Any:
    """A step of new and running requests: (name, blocks, computed, count)."""
    counts = {name: count for name, _, _, count in (*new, *cached)}
    data = CachedRequestData.make_empty()
    for name, blocks, computed, _ in cached:
        data.req_ids.append(name)
        data.new_block_ids.append((blocks,) if blocks else None)
        data.num_computed_tokens.append(computed)
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [
        NewRequestData(name, list(range(count)), [], None, None, (blocks,), computed, None)
        for name, blocks, computed, count in new
    ]
    output.scheduled_cached_reqs = data
    output.num_scheduled_tokens = counts
    output.total_num_scheduled_tokens = sum(counts.values())
    for name, value in more.items():
        setattr(output, name, value)
    return output


def blocks_of(*ids: int) -> Any:
    return SimpleNamespace(get_block_ids=lambda: (list(ids),))
