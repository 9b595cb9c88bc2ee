"""Which KV a request may start from, and when it may start.

Owns: look-ups, cohorts and the loads of the coming step. Promises: a token is offered to the engine
only after every byte behind it was hashed; members of a cohort are offered theirs in the same
scheduling pass; whoever waits has a bound, and at the bound starts cold; each request that asked to
be restored is told of in one event. Called by the scheduler side, on the scheduler's thread. It
never asks the journal itself: look-ups do, on theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from concordia import config
from concordia.errors import RecoveryError
from concordia.integrations.vllm.cohort import Cohorts
from concordia.integrations.vllm.cohort_times import CohortTimes
from concordia.integrations.vllm.door import logger
from concordia.integrations.vllm.filled import Filled
from concordia.integrations.vllm.load import Load, PieceRef
from concordia.integrations.vllm.lookup import Lookups
from concordia.integrations.vllm.questions import Source, cut_question, prefix_question
from concordia.integrations.vllm.track import Track
from concordia.integrations.vllm.waiting import Waiting, start_facts


@dataclass(slots=True)
class StepLoads:
    """What the coming step loads; keys of the blocks that are filled, by request and block
    index.
    """

    loads: list[Load] = field(default_factory=list)
    keys: dict[str, dict[int, int]] = field(default_factory=dict)


class Restorer:
    """All requests that have not been scheduled yet, or wait to be scheduled again."""

    def __init__(
        self,
        source: Source,
        *,
        say: Callable[[dict[str, Any]], None],
        is_known: Callable[[int], bool],
        is_kept: Callable[[int, int], bool],
        is_prefix_restored: bool,
    ) -> None:
        self._source = source
        self._say = say
        self._is_known = is_known
        self._is_prefix_restored = is_prefix_restored
        self._filled = Filled(is_kept, block_tokens=source.block_tokens)
        self._lookups = Lookups()
        self._cohorts = Cohorts()
        self._times = CohortTimes(self._say_times)
        self._waiting: dict[str, Waiting] = {}
        self._step = StepLoads()
        self._unsaid: dict[str, dict[str, Any]] = {}  # restored, not yet confirmed by every rank

    def arrive(self, request: str, track: Track) -> None:
        """A request has come: start looking for its KV, take its place in its cohort."""
        now = time.monotonic()
        identity = track.identity
        waiting = Waiting(track, now, is_undecided=identity.is_restore)
        self._waiting[request] = waiting
        if identity.is_restore:
            known = min(identity.tokens_known or len(track.tokens), len(track.tokens))
            self._lookups.ask(
                request, cut_question(self._source, track, known), wait_s=config.RESTORE_WAIT_S
            )
        elif identity.cohort is not None:
            # Asked now, not when the cohort opens: the answers come one by one, and its members
            # must start in one step.
            self._ask_prefix(request, track, 0, bound=now + config.RESTORE_WAIT_S)
            waiting.is_undecided = self._lookups.is_asked(request)
        if identity.is_restore and identity.cohort is not None and identity.cohort.is_recovery:
            self._times.come(request, identity.cohort.name, now=now)
        self._cohorts.join(request, identity.cohort, now=now)
        if not waiting.is_undecided:
            self._cohorts.decide(request)
        self.settle()

    def match(self, request: str, track: Track, hit: int) -> int | None:
        """Tokens that the engine may take from us beyond its own `hit`; None: ask again."""
        waiting = self._waiting.get(request)
        if waiting is None:  # preempted: it comes back like any request with these tokens
            waiting = self._waiting[request] = Waiting(track, time.monotonic(), is_undecided=False)
        waiting.hit = hit
        if waiting.bound is None:
            waiting.bound = time.monotonic() + config.RESTORE_WAIT_S
        if not self._cohorts.may_enter(request):
            return None
        if not self._lookups.is_asked(request):
            self._ask_prefix(request, track, hit, bound=waiting.bound)
            if not self._lookups.is_asked(request):
                return 0
        answer = self._lookups.answer(request)
        if answer is None:
            return None
        if answer.plan is not None and not answer.plan.is_current(self._source.pool):
            # the journal moved it while the request waited for room
            self._lookups.ask_again(request)
            return None
        waiting.offered, waiting.reason, waiting.lookup_s = (
            answer.plan,
            answer.reason,
            answer.took_s,
        )
        if answer.plan is None:
            return 0
        return max(0, min(answer.plan.tokens, len(track.tokens) - 1) - hit)

    def allocate(self, request: str, blocks: list[int], external: int) -> None:
        """The engine has taken our offer (external > 0) or not, and the request has its blocks."""
        waiting = self._waiting.get(request)
        if waiting is None or external == 0:
            return
        plan = waiting.offered
        if plan is None or waiting.hit + external > plan.tokens:
            raise RecoveryError(f"{request} was given {external} tokens that were not offered")
        size = self._source.block_tokens
        first = waiting.hit // size
        end = waiting.hit + external
        waiting.is_hit_own = self._filled.covers(plan, blocks, end=first)
        pieces = {
            rank: tuple(
                PieceRef(
                    p.kind,
                    p.token_start,
                    p.token_end,
                    p.pool_offset,
                    p.payload_bytes,
                    p.payload_hash,
                )
                for p in found
                if p.token_start >= first * size and p.token_start < end
            )
            for rank, found in plan.pieces.items()
        }
        self._step.loads.append(Load(request, tuple(blocks), first, pieces))
        keys = plan.block_keys[: end // size]
        self._filled.note(plan, blocks, first=first, end=end // size)
        self._step.keys[request] = {i: key for i, key in enumerate(keys) if key and i >= first}

    def take_step(self, scheduled: list[str]) -> StepLoads:
        """The loads of the step that was just scheduled, and the end of waiting for its
        requests.
        """
        step, self._step = self._step, StepLoads()
        self._filled.settle()
        loaded = {load.request for load in step.loads}
        for request in scheduled:
            waiting = self._waiting.pop(request, None)
            if waiting is not None:
                is_loaded = request in loaded
                answer = self._lookups.answer(request)
                self._times.enter(request, answer, is_loaded=is_loaded, now=time.monotonic())
                self._tell(request, waiting, is_loaded=is_loaded)
                self._cohorts.end(request)
                self._lookups.forget(request)
        self.settle()
        return step

    def confirm(self, request: str, mismatches: int, *, load_s: float = 0.0) -> None:
        """Every rank has the bytes in place, or says how many pieces differ; the slowest took
        `load_s`.
        """
        self._times.confirm(request, load_s=load_s)
        facts = self._unsaid.pop(request, None)
        if facts is not None:
            facts["hash_mismatches"] = mismatches
            facts["restore_ms"] = round(facts["restore_ms"] + 1000 * load_s, 1)
            if mismatches:
                facts.update(event="restore-failed", level="none")
            self._say(facts)

    def leave(self, request: str) -> None:
        """The request has ended."""
        self._waiting.pop(request, None)
        self._unsaid.pop(request, None)
        self._times.leave(request)
        self._lookups.forget(request)
        self._cohorts.forget(request)

    def settle(self) -> None:
        """Between two scheduling passes: see who is decided, open and dismiss cohorts."""
        for request, waiting in self._waiting.items():
            if waiting.is_undecided and self._lookups.answer(request) is not None:
                waiting.is_undecided = False
                self._cohorts.decide(request)
        for cohort in self._cohorts.settle(now=time.monotonic()):
            logger.warning(
                "Concordia: cohort %s goes on with %d of %d members, %d decided", cohort.name,
                len(cohort.members), cohort.size, len(cohort.decided),
            )  # fmt: skip
            self._say(
                {
                    "event": "cohort-late",
                    "cohort": cohort.name,
                    "size": cohort.size,
                    "members": len(cohort.members),
                }
            )

    def idle(self) -> None:
        """The engine has nothing to run: if it waits for us, give our threads a moment."""
        if self._lookups.is_waiting or self._cohorts.is_waiting:
            self._lookups.wait(config.IDLE_STEP_WAIT_S)

    def close(self) -> None:
        self._lookups.close()

    def _ask_prefix(self, request: str, track: Track, hit: int, *, bound: float) -> None:
        """Ask for a prefix that the journal is known to have, if that is more than the engine has
        itself.
        """
        size = self._source.block_tokens
        identity = track.identity
        # restore was switched off for it
        is_replay = identity.incarnation > 1 and not identity.is_restore
        if not self._is_prefix_restored or track.chain is None or identity.is_disabled or is_replay:
            return
        track.chain.extend(track.tokens, limit=len(track.tokens) - 1)
        count = 0
        for key in track.chain.keys[: (len(track.tokens) - 1) // size]:
            if not self._is_known(key):
                break
            count += 1
        if count * size <= hit:
            return
        question = prefix_question(self._source, track.chain.keys[:count], track.model_hash)
        # A closed cohort is asked for to get the same tokens again, and a prefix that is computed
        # instead may round differently.
        wait_s = config.LOOKUP_WAIT_S if identity.cohort is None else config.RESTORE_WAIT_S
        left_s = bound - time.monotonic()  # a cohort may have held it back already
        if left_s > 0:
            self._lookups.ask(request, question, wait_s=min(wait_s, left_s))

    def _say_times(self, facts: dict[str, Any]) -> None:
        words = ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in facts["phases"].items())
        logger.info(
            "Concordia restored %d requests, %.2f GB, of cohort %s: %s (of one request at most: %s "
            "ms for its places, %s ms to verify%s)",
            *(facts["loaded"], facts["bytes"] / 1e9, facts["cohort"], words),
            *(round(1000 * facts[name]) for name in ("cut_s_max", "verify_s_max")),
            "" if facts["is_mapped"] else "; the pool was not mapped yet",
        )
        self._say(facts)

    def _tell(self, request: str, waiting: Waiting, *, is_loaded: bool) -> None:
        identity = waiting.track.identity
        if not identity.is_restore and not is_loaded:
            if waiting.reason:
                self._say(
                    {"event": "prefix-missed", "request": identity.name, "reason": waiting.reason}
                )
            return
        facts = start_facts(waiting, is_loaded=is_loaded, now=time.monotonic())
        if is_loaded:
            self._unsaid[request] = facts
        else:
            logger.warning(
                "Concordia: %s starts cold: %s",
                identity.name,
                waiting.reason or "nothing to restore",
            )
            self._say(facts)
