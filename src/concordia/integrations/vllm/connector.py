"""ConcordiaConnector: what vLLM loads by name (kv_connector_module_path
concordia.integrations.vllm.connector).

Owns: the mapping from vLLM's connector methods to one of two sides. Promises: no error of ours gets
past the guest door but RestoreUnfinished; whatever was promised to the engine and cannot be kept is
reported to it as a failed load; save_kv_layer saves nothing, so full CUDA graphs stay possible, and
tells where in them a place may lie; KV delivery is best effort (requires_kv_delivery is False).
Called by vLLM's scheduler and workers, directly or through MultiConnector. It keeps no state but
what must survive a shut door: blocks that the engine counts on.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from concordia.integrations.vllm.door import GuestDoor
from concordia.integrations.vllm.metadata import StepMetadata, WorkerReport
from concordia.integrations.vllm.scheduler_side import SchedulerSide
from concordia.integrations.vllm.settings import Settings
from concordia.integrations.vllm.worker_side import WorkerSide

if TYPE_CHECKING:
    import torch


class ConcordiaConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One object per side and process, as vLLM wants it."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        is_scheduler = role == KVConnectorRole.SCHEDULER
        self._door = GuestDoor("this engine's scheduler" if is_scheduler else "this worker")
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._promised: list[int] = []  # scheduler: blocks that the coming step must load
        self._failed: set[int] = set()  # worker: blocks of this step that were not loaded
        self._is_off_said = False
        self._hears_layers = False  # a plain word: what asks for it may be compiled with the model
        self._door.call("start", None, self._start, vllm_config, kv_cache_config, is_scheduler)

    def _start(self, vllm_config: Any, kv_cache_config: Any, is_scheduler: bool) -> None:
        settings = Settings.of(self._kv_transfer_config.kv_connector_extra_config)
        if is_scheduler:
            self._scheduler = SchedulerSide(settings, vllm_config, kv_cache_config)
            self._door.on_shut(self._scheduler.shut)
        else:
            worker = self._worker = WorkerSide(settings, vllm_config, kv_cache_config)
            self._door.on_shut(lambda _: worker.abandon())

    @property
    def requires_kv_delivery(self) -> bool:
        """A save of ours that does not happen is a restore that will not, never a wrong answer."""
        return False

    # --- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._worker is not None:
            self._door.call("register_kv_caches", None, self._worker.register_kv_caches, kv_caches)
            self._hears_layers = self._worker.has_places

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None and isinstance(kv_connector_metadata, StepMetadata):
            self._door.call(
                "handle_preemptions", None, self._worker.before_step, kv_connector_metadata
            )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        meta = self._meta()
        if meta is None or not (meta.loads or meta.spoiled):
            return
        counted_on = {block for load in meta.loads for block in load.blocks[load.first_block :]}
        if self._worker is None:
            failed = counted_on
        else:
            failed = self._door.call("start_load_kv", counted_on, self._worker.load, meta)
        self._failed |= failed | set(meta.spoiled)

    def has_connector_metadata(self) -> bool:
        """Whether per-layer calls are wanted: in steps that launch layers one by one, and while a
        graph is captured in which appends are to have a place.
        """
        if self._connector_metadata is not None:
            return True
        if not self._hears_layers or self._worker is None:
            return False
        return self._door.call("capture", False, self._worker.is_capturing)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        if self._hears_layers and self._worker is not None:
            is_step = self._connector_metadata is not None
            layer_done = partial(self._worker.layer_done, is_step=is_step)
            self._door.call("save_kv_layer", None, layer_done, layer_name)

    def wait_for_save(self) -> None:
        meta = self._meta()
        if self._worker is not None and meta is not None:
            self._door.call("wait_for_save", None, self._worker.save, meta)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = None
        if self._worker is not None:
            report = self._door.call("build_connector_worker_meta", None, self._worker.take_report)
        if not self._door.is_open and not self._is_off_said:
            self._is_off_said = True
            return WorkerReport(off=self._door.reason)
        return report

    def _meta(self) -> StepMetadata | None:
        meta = self._connector_metadata
        return meta if isinstance(meta, StepMetadata) else None

    # --- scheduler

    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._door.call("on_new_request", None, self._scheduler.arrive, request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        return self._door.call(
            "get_num_new_matched_tokens",
            (0, False),
            self._scheduler.match,
            request,
            num_computed_tokens,
        )

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is None:
            return
        ids = list(blocks.get_block_ids()[0])
        if num_external_tokens > 0:
            # Too many rather than too few: a block that is reported as failed is computed, one that
            # is not is believed.
            self._promised.extend(ids)
        self._door.call(
            "update_state_after_alloc",
            None,
            self._scheduler.allocate,
            request,
            ids,
            num_external_tokens,
        )

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        promised, self._promised = self._promised, []
        spoiled = StepMetadata(spoiled=promised)
        if self._scheduler is None:
            return spoiled
        return self._door.call(
            "build_connector_meta", spoiled, self._scheduler.build, scheduler_output
        )

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(report, WorkerReport):
            self._door.call("update_connector_output", None, self._scheduler.report, report)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is not None:
            self._door.call("request_finished", None, self._scheduler.finish, request)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: Any
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids)

    def reset_cache(self) -> bool:
        if self._scheduler is not None:
            self._door.call("reset_cache", None, self._scheduler.forget_cache)
        return True

    def shutdown(self) -> None:
        side = self._scheduler or self._worker
        self._scheduler = self._worker = None
        if side is not None:
            self._door.leave("shutdown", side.close)
