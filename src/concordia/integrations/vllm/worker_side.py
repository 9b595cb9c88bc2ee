"""The connector in a worker: one rank's KV out to the journal and back.

Owns: this rank's stream, its Checkpointer, the KV region and what is known about its layout.
Promises: an entry point only enqueues, except where bytes must be in place before the engine goes
on (a restore, a block about to be overwritten), and those waits are bounded; bytes that were
promised to the engine and cannot be had are reported as failed loads, never left to chance;
unproven layouts are saved as whole blocks. Called by connector.py behind the guest door. It decides
nothing about requests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.device.policy import AUTO, DEFAULT
from concordia.errors import ConcordiaError, DeviceError, RecoveryError
from concordia.integrations.vllm import compat
from concordia.integrations.vllm.append_clock import AppendClock
from concordia.integrations.vllm.appends import Append, Batch, Event
from concordia.integrations.vllm.applier import Applier
from concordia.integrations.vllm.audit import DIFFERS, Audit
from concordia.integrations.vllm.door import logger
from concordia.integrations.vllm.graph_places import GraphPlaces, RankTickets, open_places
from concordia.integrations.vllm.layout import Layout, describe_kv, in_words
from concordia.integrations.vllm.layout_proof import LayoutProof
from concordia.integrations.vllm.metadata import StepMetadata, WorkerReport
from concordia.integrations.vllm.pump import AppendPump
from concordia.integrations.vllm.step_appends import StepAppends
from concordia.journal.client import JournalClient
from concordia.journal.mapped_ahead import MappedAhead
from concordia.journal.record import request_key

if TYPE_CHECKING:
    from concordia.integrations.vllm.settings import Settings


class WorkerSide:
    """One rank of one engine."""

    def __init__(self, settings: Settings, vllm_config: Any, kv_cache_config: Any) -> None:
        self._settings = settings
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._why_not = compat.why_unprotected(vllm_config, kv_cache_config)
        self._rank = 0
        self._client: JournalClient | None = None
        self._attachment: Any = None
        self._mapped: MappedAhead | None = None
        self._checkpointer: Checkpointer | None = None
        self._region: Any = None
        self._layout: Layout | None = None
        self._proof: LayoutProof | None = None
        self._pump: AppendPump | None = None
        self._applier: Applier | None = None
        self._audit: Audit | None = None
        self._clock: AppendClock | None = None
        self._places: GraphPlaces | None = None
        self._appends: StepAppends | None = None
        self._block_tokens = compat.block_tokens(kv_cache_config) if self._why_not is None else 0
        self._is_cuda = self._is_abandoned = False
        # requests whose load failed in this step: their blocks hold nothing to save
        self._refused: set[str] = set()
        self._report = WorkerReport()

    def register_kv_caches(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The engine has its KV memory: describe it, open the stream, build the handlers."""
        if self._why_not is not None:
            raise RecoveryError(self._why_not)
        if self._places is not None and self._places.count:
            # they read the old memory, and cannot be taken out of graphs that may be replayed
            raise RecoveryError("the engine made its KV memory anew after it captured our places")
        if self._checkpointer is not None:
            # the engine has made its KV memory anew: what was known of the old one is over
            self.close()
        try:
            self._open(describe_kv(self._vllm_config, self._kv_cache_config, tensors), tensors)
        except BaseException:
            self.close()
            raise

    def _open(self, layout: Layout, layers: Iterable[str]) -> None:
        self._rank = compat.worker_rank(self._vllm_config)
        self._is_cuda = layout.rows[0].device.type == "cuda"
        device = self._settings.device
        if device == "auto":
            device = f"cuda:{layout.rows[0].device.index or 0}" if self._is_cuda else "host"
        self._client = JournalClient.connect(self._settings.journal)
        self._attachment = self._client.open_stream(
            writer_kind=abi.WRITER_RANK,
            rank=self._rank,
            world=compat.world_size(self._vllm_config),
            replica=self._settings.replica,
            layout_hash=layout.geometry.layout_hash(),
            label=f"vllm rank {self._rank}",
            node=compat.device_node(layout.rows[0].device),
        )
        if not self._is_cuda:  # a GPU's driver maps what it registers
            self._mapped = MappedAhead(self._attachment.pool.mapping)
        self._checkpointer = Checkpointer.open(
            device,
            self._attachment.target,
            lanes=self._settings.executor_ctas if self._is_cuda else 1,
            residency=self._residency(device),
        )
        self._region = self._checkpointer.register_kv(layout.geometry, layout.addresses)
        runtime = self._checkpointer.runtime
        self._places = open_places(runtime, self._vllm_config, layers=layers)
        tickets = RankTickets(self._checkpointer, self._places)
        self._clock = AppendClock(self._busy_ns)
        control = self._attachment.board.control(self._attachment.slot)
        self._pump = AppendPump(
            tickets, is_threaded=self._is_cuda, committed=lambda: control.committed_count
        )
        self._applier = Applier(
            self._checkpointer,
            self._region,
            rank=self._rank,
            pool_address=self._attachment.target.pool_address,
        )
        if not (self._is_cuda and compat.may_sleep(self._vllm_config)):
            self._audit = Audit(tickets, self._region, rank=self._rank, say=self.event)
        self._appends = StepAppends(
            self._checkpointer, self._region, block_tokens=self._block_tokens, audit=self._audit
        )
        self._layout = layout
        is_given_up = self._settings.layout == "blocks"
        self._proof = LayoutProof(
            layout, rank=self._rank, say=self.event, is_given_up=is_given_up
        )
        logger.info(
            "Concordia protects rank %d: %s, %s, %s",
            *(self._rank, device, self._checkpointer.runtime.stats().residency),
            in_words(layout.geometry),
        )

    def _residency(self, device: str) -> str:
        """What was asked for; on a CPU, which has one, that."""
        wanted = self._settings.residency
        if device == "host" and wanted not in (DEFAULT, AUTO):
            logger.warning(
                "Concordia: a CPU has no residency %s; rank %d goes on with %s",
                *(wanted, self._rank, DEFAULT),
            )
            return DEFAULT
        return wanted

    def _busy_ns(self) -> int:
        assert self._checkpointer is not None
        placed = self._places.busy_ns if self._places is not None else 0
        return self._checkpointer.runtime.busy_ns() + placed

    # --- while the engine captures its graphs

    @property
    def has_places(self) -> bool:
        """Whether we want to hear of layers: appends may have places in graphs."""
        return self._places is not None

    def is_capturing(self) -> bool:
        """Whether layers are put into a graph now."""
        return bool(torch.cuda.is_current_stream_capturing())

    def layer_done(self, name: str, *, is_step: bool) -> None:
        """The engine has launched or captured a layer."""
        if self._places is None:
            return
        if is_step:
            self._places.layer_launched()
        else:
            self._places.layer_captured(name)

    # --- the order of one step

    def before_step(self, meta: StepMetadata) -> None:
        """Nothing of this step is written yet: let go of what it overwrites, and keep what the
        proof of the layout compares.
        """
        self._report.step = meta.step
        self._refused.clear()
        pump, proof = self._live_pump(), self._proof
        assert proof is not None
        self._collect()  # by now the step before is saved, and one look tells so
        if self._audit is not None:
            self._audit.step(
                [*meta.reused, *(block for write in meta.writes for block in write.blocks)]
            )
        if self._places is not None:
            self._places.begin_step(self._rank)
            if pump.reads(meta.reused):
                self._places.flush()  # nobody may wait for a place that does not come
        # whom it gave up for that is collected
        pump.wait_for(meta.reused, timeout_s=config.BLOCK_REUSE_WAIT_S)
        if not meta.loads:
            proof.arm(meta.writes)
        self._place(meta)

    def _place(self, meta: StepMetadata) -> None:
        """Hand in now what a graph of this step may append itself. Whole records keep their order:
        nothing goes there while appends wait for the executor's own launches.
        """
        places, pump, proof = self._places, self._live_pump(), self._proof
        assert proof is not None
        if places is None or not meta.writes or meta.loads or not proof.has_rows:
            return
        blocks = sum(len(write.full) for write in meta.writes)
        most = blocks + len(meta.writes)
        is_small = blocks <= config.PLACED_BLOCKS_MAX
        if is_small and places.takes(most) and pump.may_follow(most):
            appends = self._of(meta)
            tickets = places.hand_in([append.task for append in appends])
            if tickets:
                for append, ticket in zip(appends, tickets, strict=True):
                    append.ticket = ticket
                pump.follow(appends)

    def _of(self, meta: StepMetadata) -> list[Append]:
        appends, proof = self._appends, self._proof
        assert appends is not None
        assert proof is not None
        return [
            append
            for write in meta.writes
            if write.request not in self._refused
            for append in appends.of(write, meta.step, has_rows=proof.has_rows)
        ]

    def load(self, meta: StepMetadata) -> set[int]:
        """Fill the blocks of resumed requests, hash and compare them in place; returns the blocks
        that are not as committed.
        """
        failed: set[int] = set()
        if self._applier is None:
            raise RecoveryError(self._why_not or "the engine never registered its KV memory")
        if not meta.loads:
            return failed
        if self._is_cuda:
            # The executor has a stream of its own: what earlier steps still write into these blocks
            # must have landed before we do.
            torch.cuda.current_stream().synchronize()
        assert self._clock is not None
        self._refused.update(load.request for load in meta.loads)
        started = time.monotonic()
        with self._clock.restoring():
            mismatches = self._applier.apply(meta.loads)
        spent_s = time.monotonic() - started
        for load, count in zip(meta.loads, mismatches, strict=True):
            self._report.loaded[load.request] = count
            self._report.load_s[load.request] = spent_s
            if count == 0:
                self._refused.discard(load.request)
            else:
                failed.update(load.blocks[load.first_block :])
        return failed

    def save(self, meta: StepMetadata) -> None:
        """Enqueue what this step wrote."""
        pump, proof = self._live_pump(), self._proof
        assert proof is not None
        if self._places is not None and self._places.end_step():
            return
        batch = Batch(event=self._record_event() if meta.writes else None)
        proof.judge(batch, self._record_event)
        batch.appends = self._of(meta)
        if batch.appends or batch.before is not None:
            pump.submit(batch)

    def take_report(self) -> WorkerReport:
        """What the scheduler side must know; the step is over."""
        report, self._report = self._report, WorkerReport(step=self._report.step)
        report.append_ns = self._clock.take() if self._clock is not None else 0
        if report.append_ns and self._places is not None:
            report.graph_steps, self._places.step_count = self._places.step_count, 0
        report.has_rows = self._proof is not None and self._proof.has_rows
        for found in self._audit.rest() if self._audit is not None else ():
            report.lost.setdefault(found.write.request, DIFFERS)
            report.differing.append(found.block)
        return report

    def abandon(self) -> None:
        """The guest door has shut: nothing of ours may read or write the engine's blocks from here
        on.

        The caller is the engine's own thread, so no block changes hands while what the executor has
        taken runs out, within a bound.
        """
        self._is_abandoned = True
        if self._audit is not None:
            self._audit.close()
        if self._pump is not None:
            self._pump.abandon()
        self._clock = None
        if self._checkpointer is not None:
            if self._places is not None:
                self._checkpointer.retire()  # the engine goes on replaying graphs with our places
            else:
                self._checkpointer.close()

    def close(self) -> None:
        """Let the appends finish, within a bound, and end the stream."""
        if self._audit is not None:
            self._audit.close()
        if self._pump is not None:
            if not self._is_abandoned:
                if self._places is not None:
                    with suppress(DeviceError):  # a lost GPU; the rest is given back all the same
                        self._places.flush()  # the graph that it waits for is replayed no more
                self._pump.drain(timeout_s=config.WAIT_TASK_S)
            self._pump.close()
        if self._checkpointer is not None:
            self._checkpointer.close()
        if self._mapped is not None:
            self._mapped.close()
        if self._attachment is not None:
            self._attachment.close()
        if self._client is not None:
            self._client.close()
        self._clock = self._audit = self._pump = self._applier = None
        self._places = self._appends = self._mapped = None
        self._checkpointer = self._attachment = self._client = None

    # --- leaves

    def _live_pump(self) -> AppendPump:
        if self._pump is None:
            raise RecoveryError(self._why_not or "the engine never registered its KV memory")
        return self._pump

    def _record_event(self) -> Event | None:
        if not self._is_cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event  # type: ignore[no-any-return]

    def _collect(self) -> None:
        for request, failure in self._live_pump().collect().items():
            if failure.may_pass:
                self._report.missed[request] = failure.start, failure.reason
            else:
                self._report.lost.setdefault(request, failure.reason)

    def event(self, facts: dict[str, Any]) -> None:
        """Say something in this rank's stream."""
        if self._checkpointer is None:
            return
        if self._pump is not None:
            self._pump.count_other()
        try:
            self._checkpointer.append_bytes(
                json.dumps(facts).encode(),
                kind=abi.KIND_EVENT,
                key=request_key(str(facts.get("request", ""))),
                incarnation=0,
            )
        except ConcordiaError as error:
            logger.warning("Concordia could not record %s: %s", facts, error)
            if self._pump is not None:
                self._pump.count_other(-1)

