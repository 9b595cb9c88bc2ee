"""What the journal's events say.

Owns: the events that were taken, and the outcome of each resumed request that they tell of.
Promises: an event is taken once, also when an owner that was started anew tells everything again;
what somebody has less of than they may believe is a line in the log; the event loop never waits for
the journal. Called by the recorder. It counts nothing: `on_event` may.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from concordia import config
from concordia.errors import ConcordiaError
from concordia.serving.need import Level

# What connectors call it. "prefix": blocks that other requests with the same tokens had written.
_LEVELS: Final = {
    "state-exact": Level.STATE_EXACT,
    "partial": Level.PARTLY_RESTORED,
    "prefix": Level.PARTLY_RESTORED,
}
# Why an engine or the owner protects a request no more, in few words: a label has few values, and
# the sentence is in the log. By what the sentence has in it; the first that fits.
_CAUSES: Final = (
    ("engine-off", ("protection is off",)),
    ("journal-full", ("the journal had no room", "the journal is full", "no segment was free")),
    (
        "ring-full",
        (
            "appends are unfinished",
            "slots of the ring are taken",
            "needed before they could be saved",
        ),
    ),
    ("bytes-differ", ("not as committed", "not what was committed")),
    ("cache-reset", ("the engine's cache was reset",)),
    ("adapter", ("adapter",)),
    ("name-used-again", ("was here before",)),
    ("too-large", ("does not fit",)),
    ("bad-request", ("concordia.", "kv_transfer_params.")),
    (
        "layout",
        (
            "KV cache",
            "parallel",
            "spread over ranks",
            "calculate_kv_scales",
            "speculative decoding",
            "blocks known for",
        ),
    ),
)
CAUSES: Final = (*(cause for cause, _ in _CAUSES), "other")
log = logging.getLogger(__name__)


class EventSource(Protocol):
    """The owner, as journal.client asks it; blocks for at most a second or so."""

    def events(self, after: int = 0) -> tuple[int, list[dict[str, Any]]]: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a connector says of one resumed request."""

    level: Level
    restored_tokens: int
    recomputed_tokens: int
    hash_mismatches: int


class JournalEvents:
    """`on_event` is called on the event loop with each event."""

    def __init__(self, source: EventSource) -> None:
        self.on_event: Callable[[Mapping[str, Any]], None] | None = None
        self._source = source
        self._cursor = 0
        self._polling = asyncio.Lock()
        self._outcomes: OrderedDict[tuple[str, int], Outcome] = OrderedDict()
        self._seen: OrderedDict[str, None] = OrderedDict()  # records of events that were taken

    async def poll(self) -> None:
        """Take the events that are new since the last poll."""
        async with self._polling:
            try:
                cursor, events = await asyncio.to_thread(self._source.events, self._cursor)
            except (ConcordiaError, OSError) as error:
                log.warning("the journal's events cannot be read: %s", error)
                return
            self._cursor = cursor
        for event in events:
            record = str(event.get("record", ""))
            if record and record in self._seen:
                continue  # an owner that was started anew tells everything again
            self._seen[record] = None
            self._note(event)
            if self.on_event is not None:
                self.on_event(event)
        while len(self._seen) > config.OUTCOMES_KEPT_MAX:
            self._seen.popitem(last=False)

    async def outcome(self, request: str, incarnation: int) -> Outcome | None:
        """What the connector says of this incarnation of a request; None when it says nothing
        within a bound.
        """
        name = (request, incarnation)
        bound = time.monotonic() + config.OUTCOME_WAIT_S
        while (found := self._outcomes.get(name)) is None and time.monotonic() < bound:
            # What the connector said may still be on its way through the journal.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(config.OUTCOME_WAIT_S):
                    await self.poll()
            if name not in self._outcomes:
                await asyncio.sleep(config.RECORD_PERIOD_S)
        return found

    def _note(self, event: Mapping[str, Any]) -> None:
        if (loss := describe_loss(event)) is not None:
            log.warning("%s", loss)
        outcome = read_outcome(event)
        if outcome is None:
            return
        name = (str(event.get("request")), int(event.get("incarnation", 0)))
        self._outcomes[name] = outcome
        while len(self._outcomes) > config.OUTCOMES_KEPT_MAX:
            self._outcomes.popitem(last=False)


def read_outcome(event: Mapping[str, Any]) -> Outcome | None:
    """The outcome that an event of a resumed request states; None for any other event."""
    if event.get("event") not in ("restored", "restore-failed"):
        return None
    level = _LEVELS.get(str(event.get("level")), Level.RE_PREFILL)
    return Outcome(
        level,
        0 if level is Level.RE_PREFILL else int(event.get("restored_tokens", 0)),
        int(event.get("recomputed_tokens", 0)),
        int(event.get("hash_mismatches", 0)),
    )


def cause_of(reason: str) -> str:
    """The cause, one of CAUSES, that an event's sentence names."""
    return next(
        (cause for cause, parts in _CAUSES if any(part in reason for part in parts)), CAUSES[-1]
    )


def describe_loss(event: Mapping[str, Any]) -> str | None:
    """One line for an event by which somebody has less than they may believe; None for any
    other.
    """
    name, request = event.get("event"), event.get("request") or event.get("key")
    reason = event.get("reason") or "no reason given"
    if name == "unprotected":
        return f"unprotected: {request}: {reason}"
    if name in ("restored", "restore-failed") and event.get("level") != "state-exact":
        restored, recomputed = event.get("restored_tokens", 0), event.get("recomputed_tokens", 0)
        return (
            f"not restored whole: {request}: {restored} tokens restored, {recomputed} recomputed: "
            f"{reason}"
        )
    if name == "whole-blocks":
        return f"rank {event.get('rank')} saves whole KV blocks, which costs more: {reason}"
    if name == "prefix-missed":
        return f"prefix computed anew: {request}: {reason}"
    if name == "corruption":
        return f"corruption in the journal: {dict(event)}"
    return None
