"""Whether a rank's tokens are rows of their blocks, found out by its first steps.

Owns: the probe of one rank's KV layout, and what is said of it. Promises: until it is proven, and
for ever where it is disproven or was given up, tokens are no rows and whole blocks are saved, which
is said once; looking only enqueues, on the engine's thread. Called by the worker side. It knows no
records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from concordia.integrations.vllm.appends import Batch, Event
from concordia.integrations.vllm.door import logger
from concordia.integrations.vllm.layout import Layout, Probe, Proof
from concordia.integrations.vllm.step_writes import Write


class LayoutProof:
    """The proof of one rank."""

    def __init__(
        self,
        layout: Layout,
        *,
        rank: int,
        say: Callable[[dict[str, Any]], None],
        is_given_up: bool,
    ) -> None:
        self._probe = Probe(layout)
        self._rank, self._say = rank, say
        if is_given_up:
            self._probe.proof, self._probe.reason = Proof.GIVEN_UP, "set so"
        if self._probe.proof is Proof.GIVEN_UP:
            self._say_blocks()

    @property
    def has_rows(self) -> bool:
        """Whether a token may be saved by itself."""
        return self._probe.proof is Proof.PROVEN

    def arm(self, writes: Iterable[Write]) -> None:
        """Nothing of this step is written yet: keep what one token of it is to be compared with."""
        if self._probe.proof is not Proof.UNKNOWN:
            return
        for write in writes:
            if write.tail is not None and write.tail[1] - write.tail[0] == 1:
                self._probe.arm(write.tail[0], write.tail[2])
                return

    def judge(self, batch: Batch, record: Callable[[], Event | None]) -> None:
        """The step is launched: compare, on the thread that submits its batch where there is one,
        behind an event that `record` makes.
        """
        probe = self._probe
        if not probe.is_armed:
            return
        pairs, token = probe.capture(), probe.token

        def judge() -> None:
            if probe.judge(pairs, token) in {Proof.DISPROVEN, Proof.GIVEN_UP}:
                self._say_blocks()
            elif probe.proof is Proof.PROVEN:
                logger.info("Concordia: the KV layout of rank %d is proven", self._rank)

        event = record()  # after the copies that `capture` queued
        if event is None:
            judge()
        else:
            batch.event, batch.before = event, judge

    def _say_blocks(self) -> None:
        """Loud, because whole blocks cost more than rows."""
        reason = f"KV layout {self._probe.proof.name.lower()}: {self._probe.reason}"
        logger.warning(
            "Concordia saves whole KV blocks on rank %d: %s. Nothing is lost by it but speed.",
            self._rank,
            reason,
        )
        self._say({"event": "whole-blocks", "rank": self._rank, "reason": reason})
