"""What became of the state of answers that were resumed.

Owns: the counting of what a failover restored, recomputed and could not restore. Promises: an
answer is settled once, by what the connector said of its last incarnation; where nobody says
anything all of it counts as computed again. Called by the router. Keeps no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from concordia.serving.flight import Flight
from concordia.serving.metrics import Metrics
from concordia.serving.recorder import Recorder


class Settlement:
    """Of one router; `restores` is False in a control that replays by prefill."""

    def __init__(self, recorder: Recorder | None, metrics: Metrics, *, restores: bool) -> None:
        self._recorder = recorder
        self._metrics = metrics
        self._restores = restores

    async def settle(self, flights: Sequence[Flight]) -> None:
        """Find out which level each resumed flight reached."""
        for flight in flights:
            if not flight.failovers:
                continue
            # its report and its end both ask, and the answer takes a while
            async with flight.account.settling:
                if not flight.account.is_settled:
                    await self._settle(flight)

    async def close(self, flight: Flight) -> None:
        """Count the level of an answer that has ended."""
        await self.settle([flight])
        self._metrics.level(flight.account.level)

    async def count_uncommitted(self, flights: Sequence[Flight]) -> None:
        """Count what the journal cannot give back: tokens known, minus the last, minus what was
        committed.
        """
        if self._recorder is None or not self._restores:
            return
        counts = await self._recorder.committed(flights)
        for flight, committed in zip(flights, counts, strict=True):
            if flight.request.allows_restore:
                missing = flight.tokens_known - 1 - committed
                self._metrics.count("uncommitted_tokens", max(0, missing))

    async def _settle(self, flight: Flight) -> None:
        outcome = None
        if self._recorder is not None and self._restores and flight.request.allows_restore:
            outcome = await self._recorder.outcome(flight)
        flight.account.settle(outcome)
        if outcome is None:  # no connector speaks of it, so nobody else counts it
            self._metrics.count("recomputed_tokens", flight.account.recomputed_tokens)
