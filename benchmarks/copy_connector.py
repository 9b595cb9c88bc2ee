"""What a user would write to save a vLLM engine's KV: each step's blocks, by cudaMemcpyAsync.

Owns: a KVConnectorBase_V1 that knows nothing of Concordia. After a step it gathers every block that
the step wrote, behind an event and in a stream of its own, and copies them to pinned memory. It
keeps no index, verifies nothing and waits for nothing: the least that such a copy costs. A request
with kv_transfer_params {"copy": false} is left out. Loaded by vLLM (kv_connector_module_path).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

STAGED_BLOCKS = 64  # gathered at once: 128 MiB of an 8B model


@dataclass
class WrittenBlocks(KVConnectorMetadata):
    """Blocks of this step, in no order."""

    blocks: list[int] = field(default_factory=list)


class CopyConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One object on the scheduler's side, one in the worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._block_count = kv_cache_config.num_blocks
        self._blocks: dict[str, list[int]] = {}  # of each request that is copied
        self._is_left_out: set[str] = set()
        self._layers: list[tuple[torch.Tensor, int]] = []  # and which dimension counts blocks

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # --- scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if (request.kv_transfer_params or {}).get("copy") is False:
            self._is_left_out.add(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        counts, found = scheduler_output.num_scheduled_tokens, WrittenBlocks()
        for new in scheduler_output.scheduled_new_reqs:
            self._blocks[new.req_id] = list(new.block_ids[0])
            self._add(found, new.req_id, new.num_computed_tokens, counts[new.req_id])
        cached = scheduler_output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            ids = list(cached.new_block_ids[i][0]) if cached.new_block_ids[i] else []
            kept = [] if name in cached.resumed_req_ids else self._blocks.get(name, [])
            self._blocks[name] = kept + ids
            self._add(found, name, cached.num_computed_tokens[i], counts[name])
        return found

    def _add(self, found: WrittenBlocks, name: str, start: int, count: int) -> None:
        if name not in self._is_left_out:
            first, last = start // self._block_tokens, (start + count - 1) // self._block_tokens
            found.blocks += self._blocks[name][first : last + 1]

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self._blocks.pop(request.request_id, None)
        self._is_left_out.discard(request.request_id)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return self.request_finished(request, block_ids)

    # --- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        for tensor in kv_caches.values():
            self._layers.append((tensor, list(tensor.shape).index(self._block_count)))
        first = self._layers[0][0]
        elements = first.numel() // self._block_count * STAGED_BLOCKS * len(self._layers)
        self._staged = torch.empty(elements, dtype=first.dtype, device=first.device)
        self._host = torch.empty(elements, dtype=first.dtype, pin_memory=True)
        self._stream = torch.cuda.Stream()

    def wait_for_save(self) -> None:
        meta = self._connector_metadata
        if not isinstance(meta, WrittenBlocks) or not meta.blocks or not self._layers:
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for start in range(0, len(meta.blocks), STAGED_BLOCKS):
                self._copy(meta.blocks[start : start + STAGED_BLOCKS])

    def _copy(self, blocks: list[int]) -> None:
        device = self._staged.device
        chosen = torch.tensor(blocks).pin_memory().to(device, non_blocking=True)
        at = 0
        for tensor, dim in self._layers:
            shape = [*tensor.shape[:dim], len(blocks), *tensor.shape[dim + 1 :]]
            size = tensor.numel() // self._block_count * len(blocks)
            torch.index_select(tensor, dim, chosen, out=self._staged[at : at + size].view(shape))
            at += size
        self._host[:at].copy_(self._staged[:at], non_blocking=True)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        return
