"""What differs between vLLM versions, and how its objects read.

Owns: every access to a vLLM structure that is not a connector method: scheduler output, KV cache
configuration, what the model is, instruction set. Promises: features are detected, not guessed from
a version number; what cannot be understood becomes a reason not to protect, in words. Read against
the sources of 0.26.0 and 0.32.0; run on 0.32.0 (CPU) and 0.26 (H200). Called by connector,
scheduler side and worker side.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from typing import Any

from concordia.device.numa import find_pci_node
from concordia.integrations.vllm import weights
from concordia.integrations.vllm.door import logger
from concordia.integrations.vllm.step_writes import Scheduled


def why_unprotected(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Why this engine's KV cannot be protected as it is set up; None when it can."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return (
            f"the model has {len(groups)} KV cache groups (hybrid or sliding-window layers); one "
            "is supported"
        )
    spec = groups[0].kv_cache_spec
    kinds = {type(part) for part in getattr(spec, "kv_cache_specs", {}).values()} or {type(spec)}
    if not all(issubclass(kind, FullAttentionSpec) for kind in kinds):
        return (
            f"KV cache of kind {', '.join(sorted(k.__name__ for k in kinds))}; full attention is "
            "supported"
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is {getattr(parallel, name)}: a block's tokens are spread over ranks"
    if getattr(parallel, "pipeline_parallel_size", 1) > 1:
        return "pipeline parallelism: stages hold different layers, which one cut cannot join yet"
    if getattr(spec, "prefix_replay_tokens", 0):
        return "the KV cache replays part of every prefix hit"
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return (
            "calculate_kv_scales: every engine scales its KV by what it saw first, so no other "
            "can read it"
        )
    if vllm_config.speculative_config is not None and is_async(vllm_config):
        return (
            "speculative decoding with asynchronous scheduling: which tokens are sure is known "
            "too late"
        )
    return None


def is_async(vllm_config: Any) -> bool:
    """Whether the scheduler runs ahead of the workers."""
    return bool(getattr(vllm_config.scheduler_config, "async_scheduling", False))


def block_tokens(kv_cache_config: Any) -> int:
    """Tokens of one block of the only group."""
    return int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)


def world_size(vllm_config: Any) -> int:
    """Ranks that each hold a shard of every token's KV."""
    return int(vllm_config.parallel_config.world_size)


def worker_rank(vllm_config: Any) -> int:
    """This worker's rank among `world_size`."""
    from vllm.distributed import get_world_group

    rank: int = get_world_group().rank_in_group
    return rank % world_size(vllm_config)


def device_node(device: Any) -> int | None:
    """The memory node that a torch device hangs on; None for a CPU, or where nobody says."""
    if device.type != "cuda":
        return None
    import torch

    found = torch.cuda.get_device_properties(device)
    try:
        name = f"{found.pci_domain_id:x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    except AttributeError:  # a torch that does not say
        return None
    return find_pci_node(name)


def model_identity(vllm_config: Any) -> dict[str, Any]:
    """What must be equal for two engines to compute the same KV from the same tokens."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    hf_config: Any = getattr(model, "hf_config", None)
    load = getattr(vllm_config, "load_config", None)
    return {
        "model": str(model.model),
        "source": str(getattr(model, "model_weights", "")),
        "revision": [str(getattr(model, name, None)) for name in ("revision", "code_revision")],
        "commit": str(getattr(hf_config, "_commit_hash", None)),
        "dtype": str(model.dtype),
        "quantization": [
            str(getattr(model, name, None)) for name in ("quantization", "quantization_config")
        ],
        "code": [
            str(getattr(model, name, None)) for name in ("model_impl", "model_class_overrides")
        ],
        "config": hf_config.to_json_string()
        if hasattr(hf_config, "to_json_string")
        else str(hf_config),
        "is_stretched": _is_stretched(model),
        "cache_dtype": [
            str(cache.cache_dtype),
            str(getattr(cache, "kv_cache_dtype_skip_layers", None)),
        ],
        "attention": str(getattr(getattr(vllm_config, "attention_config", None), "backend", None)),
        "load_format": str(getattr(load, "load_format", None)),
        "world": world_size(vllm_config),
        "weights": _weights(model, load),
        "drafter": _drafter(vllm_config.speculative_config, load),
    }


def request_seed_parts(request: Any, adapters: weights.Adapters) -> dict[str, Any]:
    """What else, beside its tokens and the engine's model, determines a request's KV; RecoveryError
    when that cannot be told.
    """
    lora = getattr(request, "lora_request", None)
    adapter = None
    if lora is not None:
        adapter = adapters.identify(
            lora.lora_name, lora.lora_int_id, str(getattr(lora, "lora_path", ""))
        )
    media = [
        str(getattr(feature, "identifier", ""))
        for feature in getattr(request, "mm_features", None) or ()
    ]
    return {"adapter": adapter, "salt": getattr(request, "cache_salt", None), "media": media}


def is_told_by_tokens(request: Any) -> bool:
    """Whether the request's token ids say all of its input, so that others with these tokens may
    share its blocks.
    """
    if getattr(request, "mm_features", None) or getattr(request, "prompt_embeds", None) is not None:
        return False
    return getattr(request, "prompt_token_ids", None) is not None


def scheduled_requests(
    output: Any, *, hits: Mapping[str, int], loaded: Mapping[str, Mapping[int, int]]
) -> list[Scheduled]:
    """The requests of a step in the order in which the scheduler took them."""
    found: dict[str, Scheduled] = {}
    counts = output.num_scheduled_tokens
    drafts = output.scheduled_spec_decode_tokens
    for new in output.scheduled_new_reqs:
        name = new.req_id
        start = new.num_computed_tokens
        found[name] = Scheduled(
            name, new.block_ids[0], True, start, start + counts[name], len(drafts.get(name, ())),
            hits.get(name, 0), loaded.get(name, {}),
        )  # fmt: skip
    cached = output.scheduled_cached_reqs
    for index, name in enumerate(cached.req_ids):
        is_resumed = name in cached.resumed_req_ids
        ids = cached.new_block_ids[index]
        start = cached.num_computed_tokens[index]
        found[name] = Scheduled(
            name, ids[0] if ids else (), is_resumed, start, start + counts[name],
            len(drafts.get(name, ())), hits.get(name, 0) if is_resumed else 0,
            loaded.get(name, {}) if is_resumed else {},
        )  # fmt: skip
    return [found[name] for name in counts if name in found]


def overwritten_blocks(output: Any) -> list[int]:
    """Blocks that the worker zeroes or copies into before this step's forward."""
    blocks = list(getattr(output, "new_block_ids_to_zero", None) or ())
    copies: Iterable[Any] = getattr(output, "kv_cache_block_copies", None) or ()
    blocks += [copy.dst_block_id for copy in copies]
    return blocks


def allow_tiles() -> None:
    """Ask the kernel for AMX. vLLM 0.32's attention uses it unasked, and oneDNN asks only for large
    matrices: a small model would die of SIGILL.
    """
    import torch

    torch.cpu._init_amx()


def may_sleep(vllm_config: Any) -> bool:
    """Whether the engine may give its KV memory away for a while, without a word to a connector:
    then it may be touched in steps only.
    """
    return bool(getattr(vllm_config.model_config, "enable_sleep_mode", False))


def why_no_places(vllm_config: Any) -> str | None:
    """Why appends of ours may not lie in the engine's graphs; None when they may."""
    if may_sleep(vllm_config):
        return "the engine may give its KV memory away, and its graphs would read it"
    parallel = vllm_config.parallel_config
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1:
        return "the engine runs parts of a batch in several streams"
    if getattr(vllm_config, "speculative_config", None) is not None:
        return "a drafting model writes KV after the graph of its target"
    return None


def cpu_instruction_set(vllm_config: Any, kv_cache_config: Any) -> str:
    """Which tiling vLLM's CPU backend uses for this cache: the tensor's shape does not tell."""
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        cache_dtype = vllm_config.cache_config.cache_dtype
        name = _get_attn_isa(
            vllm_config.model_config.dtype, spec.block_size, spec.head_size, cache_dtype
        )
    except (ImportError, AttributeError, TypeError):
        name = "unknown"
    return f"{platform.machine()}-{name}"


def _weights(model: Any, load: Any) -> weights.Fingerprint | None:
    """The model's files; where they are not to be found, models are told apart by name, revision
    and settings, and that is said.
    """
    revision, cache = getattr(model, "revision", None), getattr(load, "download_dir", None)
    folder = weights.locate(str(model.model), revision=revision, cache=cache)
    found = None if folder is None else weights.fingerprint(folder)
    if found is None and getattr(load, "load_format", None) != "dummy":
        logger.warning(
            "Concordia finds no weight files of %s: it knows the model by its name and "
            "revision only",
            model.model,
        )
    return found


def _drafter(speculative: Any, load: Any) -> list[Any] | None:
    """What drafts: its layers may have KV of their own."""
    if speculative is None:
        return None
    draft = getattr(speculative, "draft_model_config", None)
    return [
        str(getattr(speculative, "method", None)),
        None if draft is None else [str(draft.model), _weights(draft, load)],
    ]


def _is_stretched(model: Any) -> bool | None:
    """Whether positions may pass the length that the model was trained for: LongRoPE rotates every
    token otherwise then.
    """
    text: Any = getattr(model, "hf_text_config", None) or getattr(model, "hf_config", None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    trained = getattr(text, "original_max_position_embeddings", None)
    if trained is None and isinstance(rope, Mapping):
        trained = rope.get("original_max_position_embeddings")
    return None if trained is None else int(model.max_model_len) > int(trained)
