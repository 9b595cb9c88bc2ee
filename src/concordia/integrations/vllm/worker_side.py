"""The connector in a worker: one rank's KV out to the journal and back.

Owns: the order of a step, this rank's appends and restores, and what is known of its layout.
Promises: an entry point only enqueues, except where bytes must be in place before the engine goes
on (a restore, a block about to be overwritten), and those waits are bounded; bytes that were
promised to the engine and cannot be had are reported as failed loads, never left to chance;
unproven layouts are saved as whole blocks. Called by connector.py behind the guest door. It decides
nothing about requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from concordia import config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.errors import DeviceError, RecoveryError
from concordia.integrations.vllm import compat
from concordia.integrations.vllm.append_clock import AppendClock
from concordia.integrations.vllm.appends import Append, Batch, Event
from concordia.integrations.vllm.applier import Applier
from concordia.integrations.vllm.audit import DIFFERS, Audit
from concordia.integrations.vllm.graph_places import GraphPlaces
from concordia.integrations.vllm.layout import Layout, describe_kv
from concordia.integrations.vllm.layout_proof import LayoutProof
from concordia.integrations.vllm.metadata import StepMetadata, WorkerReport
from concordia.integrations.vllm.pump import AppendPump
from concordia.integrations.vllm.rank import Rank
from concordia.integrations.vllm.step_appends import StepAppends

if TYPE_CHECKING:
    from concordia.integrations.vllm.settings import Settings


class WorkerSide:
    """One rank of one engine."""

    def __init__(self, settings: Settings, vllm_config: Any, kv_cache_config: Any) -> None:
        self._settings = settings
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._why_not = compat.why_unprotected(vllm_config, kv_cache_config)
        self._rank: Rank | None = None
        self._checkpointer: Checkpointer | None = None
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
        rank = self._rank = Rank(self._settings, self._vllm_config, layout, layers=layers)
        self._is_cuda, self._places = rank.is_cuda, rank.places
        self._checkpointer = rank.checkpointer
        self._clock = AppendClock(rank.busy_ns)
        self._pump = AppendPump(
            rank.tickets, is_threaded=rank.is_cuda, committed=rank.committed_count
        )
        self._applier = Applier(
            rank.checkpointer, rank.region, rank=rank.number, pool_address=rank.pool_address
        )
        if not (rank.is_cuda and compat.may_sleep(self._vllm_config)):
            self._audit = Audit(rank.tickets, rank.region, rank=rank.number, say=self.event)
        self._appends = StepAppends(
            rank.checkpointer, rank.region, block_tokens=self._block_tokens, audit=self._audit
        )
        self._layout = layout
        is_given_up = self._settings.layout == "blocks"
        self._proof = LayoutProof(layout, rank=rank.number, say=self.event, is_given_up=is_given_up)

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
        if self._places is not None and self._rank is not None:
            self._places.begin_step(self._rank.number)
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
        started = time.monotonic()
        if self._is_cuda:
            # The executor has a stream of its own: what earlier steps still write into these blocks
            # must have landed before we do.
            torch.cuda.current_stream().synchronize()
        assert self._clock is not None
        self._refused.update(load.request for load in meta.loads)
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
        if self._rank is not None:
            self._rank.close()
        self._clock = self._audit = self._pump = self._applier = None
        self._places = self._appends = self._checkpointer = self._rank = None

    # --- leaves

    def _live_pump(self) -> AppendPump:
        if self._pump is None:
            raise RecoveryError(self._why_not or "the engine never registered its KV memory")
        return self._pump

    def _record_event(self) -> Event | None:
        if not self._is_cuda:
            return None
        # the pump sleeps for it: a thread that spins in the driver takes a core, and its locks
        event = torch.cuda.Event(blocking=True)
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
        if self._rank is not None:
            pump = self._pump
            self._rank.say(facts, pump.count_other if pump is not None else lambda _: None)
