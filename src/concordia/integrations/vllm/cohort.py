"""Requests that resume together.

Owns: the cohorts of one engine and the question "may this request be scheduled now?". Promises: the answer changes only in `settle`, that
is between two scheduling passes, so that a pass never takes half a cohort; nobody waits longer than the cohort's deadline, which never
exceeds RESTORE_WAIT_S. Called by the scheduler side. Does not know what is restored or how.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from concordia import config
from concordia.integrations.vllm.identity import CohortTicket


class State(enum.Enum):
    """FORMING -> OPEN -> gone. A cohort is OPEN once its members may be scheduled, and gone once they all were."""

    FORMING = 1
    OPEN = 2


@dataclass(slots=True)
class Cohort:
    """One cohort: who has come, whose state is decided (restored, cold or fresh) and who has entered a step."""

    name: str
    size: int
    deadline: float
    state: State = State.FORMING
    members: set[str] = field(default_factory=set)
    decided: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)  # entered a step, or left before
    is_late: bool = False

    @property
    def is_complete(self) -> bool:
        return len(self.members) >= self.size and self.members <= self.decided | self.ended


class Cohorts:
    """All cohorts that have not gone yet, oldest first."""

    def __init__(self) -> None:
        self._cohorts: dict[str, Cohort] = {}
        self._gone: deque[str] = deque(maxlen=config.COHORTS_REMEMBERED)  # dismissed: who comes later enters alone
        self._of: dict[str, str] = {}

    def join(self, request: str, ticket: CohortTicket, *, now: float) -> None:
        """The request has come; the first member starts the clock."""
        cohort = self._cohorts.get(ticket.name)
        if cohort is None:
            if ticket.name in self._gone:
                return
            cohort = Cohort(ticket.name, ticket.size, now + ticket.deadline_s)
            self._cohorts[ticket.name] = cohort
        cohort.members.add(request)
        self._of[request] = ticket.name

    def decide(self, request: str) -> None:
        """What the request starts from is known."""
        cohort = self._cohort(request)
        if cohort is not None:
            cohort.decided.add(request)

    def end(self, request: str) -> None:
        """The request has entered a step, or will never enter one."""
        cohort = self._cohort(request)
        if cohort is not None:
            cohort.ended.add(request)

    def forget(self, request: str) -> None:
        """The request is gone from the engine."""
        self.end(request)
        self._of.pop(request, None)

    def may_enter(self, request: str) -> bool:
        """True when nothing that this request belongs to, or must let go first, is still waiting."""
        first = next(iter(self._cohorts.values()), None)
        if first is None:
            return True
        return self._of.get(request) == first.name and first.state is State.OPEN

    def settle(self, *, now: float) -> list[Cohort]:
        """Open and dismiss cohorts; to be called between two scheduling passes. Returns those that went late."""
        late: list[Cohort] = []
        for cohort in list(self._cohorts.values()):
            if cohort.state is State.FORMING and (cohort.is_complete or now >= cohort.deadline):
                cohort.state = State.OPEN
                cohort.is_late = not cohort.is_complete
                if cohort.is_late:
                    late.append(cohort)
            is_in = cohort.members <= cohort.ended and len(cohort.members) >= cohort.size
            if is_in or now >= cohort.deadline:
                # Past the deadline its members stand in the queue like everybody else.
                del self._cohorts[cohort.name]
                self._gone.append(cohort.name)
        return late

    @property
    def is_waiting(self) -> bool:
        """True while some cohort holds the others back."""
        return bool(self._cohorts)

    def of(self, request: str) -> Cohort | None:
        """The cohort of this request while it has not gone."""
        return self._cohort(request)

    def _cohort(self, request: str) -> Cohort | None:
        return self._cohorts.get(self._of.get(request, ""))
