"""How long an executor stays on a GPU, floor 2.

Owns: the residency policies and their names. Promises: a policy is numbers and two answers, nothing
that runs; whichever is chosen, a driver call that nobody foresaw is late by the lease at most. Used
by residency.py, and by whoever opens a runtime, by name. Does not choose: runtime/residency_choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from concordia import config
from concordia.errors import UsageError

AUTO: Final = "auto"


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to stay: for `lease_ns` at most, and out after `idle_ns` of silence."""

    name: str
    lease_ns: int
    idle_ns: int
    # sent in again whenever it is out: only `park` keeps it out
    stays: bool = False
    # also runs as launches in streams of the framework, which the host does not see begin: one is
    # inside at a time, and only a launch that had its turn proves that the others are out
    takes_turns: bool = False

    @property
    def parks_for_driver(self) -> bool:
        """Whether our own driver calls that wait for the whole GPU park it first."""
        return self.stays or self.takes_turns


POLICIES: Final = {
    policy.name: policy
    for policy in (
        Policy("leased", config.LEASE_NS, config.IDLE_NS),
        Policy("resident", config.RESIDENT_LEASE_NS, config.RESIDENT_LEASE_NS, stays=True),
        Policy("stream", config.STREAM_LEASE_NS, 0, takes_turns=True),
    )
}
DEFAULT: Final = "leased"


def policy_of(name: str) -> Policy:
    """The policy of this name; raises UsageError."""
    if name not in POLICIES:
        raise UsageError(f"unknown residency {name!r}: use {', '.join(POLICIES)} or {AUTO}")
    return POLICIES[name]
