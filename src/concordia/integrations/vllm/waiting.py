"""A request between its arrival and its first step, and what is said of how it starts.

Owns: `Waiting` and the words of its event. Promises: tokens are called restored only where their
records were applied now, or fill the engine's own blocks since before; what is neither is computed,
and the numbers add up to the tokens known. Called by the restorer. It decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from concordia.integrations.vllm.track import Track
from concordia.recovery.restore import RestorePlan


@dataclass(slots=True)
class Waiting:
    """One request."""

    track: Track
    came: float
    is_undecided: bool
    bound: float | None = None  # of holding it back, once the engine would take it
    hit: int = 0
    offered: RestorePlan | None = None
    is_hit_own: bool = False  # whether the hit holds what the request's records have
    reason: str = ""
    lookup_s: float = 0.0


def start_facts(waiting: Waiting, *, is_loaded: bool, now: float) -> dict[str, Any]:
    """The event of a request that starts from records, or cold although it asked for them."""
    identity, plan = waiting.track.identity, waiting.offered if is_loaded else None
    known = len(waiting.track.tokens)
    # The engine's own hit was not compared with anything now; it counts only where its blocks were
    # filled from these records before.
    restored = 0 if plan is None else max(0, min(plan.tokens, known - 1) - waiting.hit)
    level, reason = "cold", waiting.reason or "no more was committed"
    if plan is not None:
        is_whole = waiting.hit + restored == known - 1 and plan.incarnation > 0
        level = "partial" if plan.incarnation else "prefix"
        if is_whole and waiting.is_hit_own:
            level = "state-exact"
        elif is_whole:
            reason = (
                f"{waiting.hit} tokens are the engine's own, computed by itself or filled "
                "from other records"
            )
    facts: dict[str, Any] = {
        "event": "restored" if identity.is_restore else "prefix-restored",
        "request": identity.name,
        "incarnation": identity.incarnation,
        "level": level,
        "restored_tokens": restored,
        "own_tokens": waiting.hit,
        "recomputed_tokens": known - waiting.hit - restored,
        "hash_mismatches": 0,
        "cohort": identity.cohort.name if identity.cohort else None,
        "restore_ms": round(1000 * waiting.lookup_s, 1),
        "waited_ms": round(1000 * (now - waiting.came), 1),
    }
    if waiting.reason or level != "state-exact":
        facts["reason"] = reason
    return facts
