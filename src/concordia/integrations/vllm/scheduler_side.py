"""The connector in the scheduler: who is protected, what each step writes, what may be restored.

Owns: the tracks of the engine's requests, the step number and the scheduler's stream. Promises:
nothing here waits for a socket or another process, nor for a disk but to look at the files of an
adapter; a request that cannot be protected is named once, with the reason, and the engine serves it
all the same; every step is announced before it runs and reported done after. Called by connector.py
behind the guest door. It moves no KV: the workers do.
"""

from __future__ import annotations

import os
import pathlib
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from concordia import abi
from concordia.errors import ConcordiaError, RecoveryError, UsageError
from concordia.integrations.vllm import compat
from concordia.integrations.vllm.door import logger
from concordia.integrations.vllm.identity import (
    Identity,
    KeyChain,
    Roll,
    model_hash,
    parse_identity,
    seed_bytes,
)
from concordia.integrations.vllm.losses import Losses
from concordia.integrations.vllm.metadata import StepMetadata, WorkerReport
from concordia.integrations.vllm.questions import Source
from concordia.integrations.vllm.restorer import Restorer
from concordia.integrations.vllm.scribe import Scribe
from concordia.integrations.vllm.settings import Settings
from concordia.integrations.vllm.step_writes import StepWrites
from concordia.integrations.vllm.track import Track
from concordia.integrations.vllm.weights import Adapters
from concordia.integrations.vllm.write_set import WriteSet
from concordia.journal import folder, segment
from concordia.journal.client import JournalClient
from concordia.journal.mapped_ahead import MappedAhead


class SchedulerSide:
    """One engine."""

    def __init__(self, settings: Settings, vllm_config: Any, kv_cache_config: Any) -> None:
        why_not = compat.why_unprotected(vllm_config, kv_cache_config)
        self._settings = settings
        self._world = compat.world_size(vllm_config)
        with ExitStack() as opened:
            client = opened.enter_context(JournalClient.connect(settings.journal))
            pool, board = segment.attach(folder.Folder(settings.journal))
            opened.callback(pool.close)
            # a standby has time for it; a restore has not
            mapped = MappedAhead(pool.mapping)
            opened.callback(mapped.close)
            opened.callback(board.close)
            layout_hash = (
                0 if why_not else _layout_hash(board, replica=settings.replica, world=self._world)
            )
            self._scribe = Scribe(settings, client, layout_hash=layout_hash, world=self._world)
            opened.callback(self._scribe.close)
            if why_not is not None:
                self._scribe.event({"event": "unprotected", "request": "*", "reason": why_not})
                raise RecoveryError(why_not)
            self._block_tokens = compat.block_tokens(kv_cache_config)
            self._seed = {
                **compat.model_identity(vllm_config),
                "layout": layout_hash,
                "block": self._block_tokens,
            }
            self._writes = WriteSet(block_tokens=self._block_tokens)
            self._restorer = Restorer(
                Source(
                    client, pool.view, pool.segment_bytes, layout_hash, self._world,
                    self._block_tokens, lambda: mapped.is_done,
                ),
                say=self._scribe.event,
                is_known=self._writes.is_journaled,
                is_kept=self._writes.is_from_journal,
                is_prefix_restored=settings.is_prefix_restored,
            )
            opened.callback(self._restorer.close)
            self._opened = opened.pop_all()
        self._step = 0
        self._given: list[int] = []  # blocks handed out since the last step
        self._hits: dict[str, int] = {}
        self._losses = Losses(self._writes, self._scribe)
        self._adapters = Adapters()
        self._roll = Roll()
        self._learn_at_start()

    # --- what the scheduler tells us, in the order of a request's life

    def arrive(self, request: Any) -> None:
        """A request has entered the scheduler."""
        name = request.request_id
        if name in self._writes.tracks:
            return
        identity, parts = self._identify(request)
        seed = seed_bytes({**self._seed, **parts})
        chain = (
            KeyChain(seed, block_tokens=self._block_tokens)
            if compat.is_told_by_tokens(request)
            else None
        )
        track = Track(identity, chain, request.all_token_ids, model_hash(seed))
        track.is_protected = not identity.is_disabled
        self._writes.tracks[name] = track
        # an idle engine makes no steps, and knows only what was there when it started
        self._learn()
        self._restorer.arrive(name, track)

    def match(self, request: Any, hit: int) -> tuple[int | None, bool]:
        """How many tokens beyond the engine's own hit the journal has for this request."""
        self.arrive(request)
        name = request.request_id
        self._hits[name] = hit
        return self._restorer.match(name, self._writes.tracks[name], hit), False

    def allocate(self, request: Any, blocks: list[int], external: int) -> None:
        """The request has its blocks."""
        name = request.request_id
        self._given.extend(blocks[self._hits.get(name, 0) // self._block_tokens :])
        self._restorer.allocate(name, blocks, external)

    def build(self, output: Any) -> StepMetadata:
        """The step is decided: what it loads, overwrites and writes."""
        self._step += 1
        scheduled = list(output.num_scheduled_tokens)
        loads = self._restorer.take_step(scheduled)
        self._learn()
        self._losses.try_again()
        given, self._given = self._given + compat.overwritten_blocks(output), []
        result = self._writes.step(
            compat.scheduled_requests(output, hits=self._hits, loaded=loads.keys),
            step=self._step,
            given=given,
        )
        for name in scheduled:
            self._hits.pop(name, None)
        for name in self._scribe.take_unnoted():
            reason = "the keys of its blocks could not be written: the journal is full"
            self._losses.lose(name, reason)
        self._write_notes(result)
        tokens = output.total_num_scheduled_tokens
        waiting = sum(not track.is_started for track in self._writes.tracks.values())
        # What is restored costs time in this step too, and the detector must allow for it.
        restored = sum(load.tokens for load in loads.loads)
        self._scribe.announce(self._step, tokens + restored, waiting)
        if not tokens:
            self._restorer.idle()
            self._restorer.settle()
        return StepMetadata(
            step=self._step,
            tokens=tokens,
            writes=result.writes,
            reused=result.reused,
            loads=loads.loads,
        )

    def _learn(self) -> None:
        for news, before_step in self._scribe.take_news():
            if news.is_all:
                self._writes.learn(set(news.come), before_step=before_step)
            else:
                self._writes.learn_news(news.come, news.gone, before_step=before_step)

    def report(self, report: WorkerReport) -> None:
        """What the workers did."""
        for name, mismatches in report.loaded.items():
            self._restorer.confirm(name, mismatches, load_s=report.load_s.get(name, 0.0))
            if mismatches:
                self._losses.lose(name, f"{mismatches} restored pieces were not as committed")
        for name, reason in report.lost.items():
            self._losses.lose(name, reason)
        self._writes.disown(report.differing)
        self._writes.spread(report.has_rows)
        for name, (token, reason) in report.missed.items():
            self._losses.miss(name, token, reason)
        if report.append_ns:
            seconds = report.append_ns / 1e9
            facts = {"event": "appended", "seconds": seconds, "graph_steps": report.graph_steps}
            self._scribe.event(facts)
        if report.step:
            self._scribe.done(report.step)
        if report.off is not None:
            raise RecoveryError(f"a worker protects nothing any more: {report.off}")

    def finish(self, request: Any) -> None:
        """The request has ended; one that a router owns is ended by the router, which may be
        resuming it elsewhere.
        """
        name = request.request_id
        self._restorer.leave(name)
        self._hits.pop(name, None)
        self._losses.forget(name)
        track = self._writes.tracks.get(name)
        self._write_notes(self._writes.finish(name, step=self._step))
        if track is not None and track.is_started and not track.identity.is_routed:
            self._scribe.end(
                track.identity.key, incarnation=track.incarnation, tokens=track.covered
            )

    def forget_cache(self) -> None:
        """The engine's cache was emptied, perhaps for other weights under the same name: nothing
        from before may be met again.
        """
        self._seed["epoch"] = f"{os.getpid()}-{time.monotonic_ns()}"
        self._writes.forget_blocks(model_hash(seed_bytes(self._seed)))
        reason = (
            "the engine's cache was reset, perhaps for other weights: no other engine can go on "
            "with what it computes from here"
        )
        logger.warning("Concordia: %s", reason)
        self._scribe.event({"event": "unprotected", "request": "*", "reason": reason})

    def shut(self, reason: str) -> None:
        """The guest door has shut: everybody here is unprotected, and no step that was announced
        may look unfinished for ever.
        """
        self._scribe.rest()
        reason = f"protection is off: {reason}"
        for name, track in list(self._writes.tracks.items()):
            self._losses.say(name, track.identity, reason)
        self._scribe.event({"event": "unprotected", "request": "*", "reason": reason})

    def close(self) -> None:
        """The engine ends."""
        self._opened.close()

    # --- leaves

    def _identify(self, request: Any) -> tuple[Identity, dict[str, Any]]:
        """Who the request is, and what beside the model determines its KV; who has no name that can
        be used is served without protection.
        """
        own = self._own_name(request.request_id)
        identity = nobody = Identity(name=own, is_disabled=True)
        try:
            identity = parse_identity(request.kv_transfer_params, fallback=own)
            self._roll.enter(identity)
            return identity, compat.request_seed_parts(request, self._adapters)
        except UsageError as error:
            # not the name that it gave: that is another's, or none
            identity, reason = nobody, str(error)
        except RecoveryError as error:
            identity, reason = replace(identity, is_disabled=True), str(error)
        self._losses.say(request.request_id, identity, reason)
        return identity, {"only": own}

    def _own_name(self, request: str) -> str:
        """A name that no other engine gives: clients number their requests from 0."""
        return f"{self._settings.replica:x}.{os.getpid():x}:{request}"

    def _learn_at_start(self) -> None:
        """Know the journal's keys before the first request comes; without them prefixes are
        computed, not restored.
        """
        try:
            self._scribe.refresh()
        except (ConcordiaError, OSError) as error:
            logger.warning("Concordia does not know the journal's blocks yet: %s", error)

    def _write_notes(self, result: StepWrites) -> None:
        for note in result.notes:
            self._scribe.note_keys(note, step=self._step)
        for name, reason in result.lost:
            self._losses.lose(name, reason)


def _layout_hash(board: segment.Board, *, replica: int, world: int) -> int:
    """The layout that this engine's workers opened their streams with; they do so before the
    scheduler exists.
    """
    found = []
    for control in board.in_use():
        identity = control.identity()
        is_rank = identity.writer_kind == abi.WRITER_RANK and control.state == abi.STREAM_OPEN
        if is_rank and identity.replica == replica and identity.world == world:
            found.append((_is_ours(identity.writer_pid), identity.stream, identity.layout_hash))
    if not found:
        raise RecoveryError("no worker of this engine has a stream in the journal")
    return max(found)[2]


def _is_ours(pid: int) -> bool:
    """Whether this process or a child of it."""
    if pid == os.getpid():
        return True
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[1]) == os.getpid()
