"""Requests that resume together.

Owns: the cohorts of one engine and the question "may this request be scheduled now?". Promises: the
answer changes only in `settle`, that is between two scheduling passes, so that a pass never takes
half a cohort; a recovery's cohort goes first and holds the others back, a client's only itself; a
member waits no longer than its cohort's deadline, and nobody longer than RESTORE_WAIT_S after it
came, whatever comes meanwhile. A client's name may come again: its next cohort begins when all
members of the last have come or its deadline has passed. Called by the scheduler side. Does not
know what is restored or how.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from concordia import config
from concordia.integrations.vllm.identity import CohortTicket


class State(enum.Enum):
    """FORMING -> OPEN -> gone. A cohort is OPEN once its members may be scheduled, and gone once
    they all were.
    """

    FORMING = 1
    OPEN = 2


@dataclass(slots=True)
class Cohort:
    """One cohort: who has come, whose state is decided (restored, cold or fresh) and who has
    entered a step.
    """

    name: str
    size: int
    deadline: float
    is_recovery: bool
    state: State = State.FORMING
    members: set[str] = field(default_factory=set)
    decided: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)  # entered a step, or left before
    is_late: bool = False

    @property
    def is_full(self) -> bool:
        return len(self.members) >= self.size

    @property
    def is_complete(self) -> bool:
        return self.is_full and self.members <= self.decided | self.ended


class Cohorts:
    """All cohorts that have not gone yet, oldest first."""

    def __init__(self) -> None:
        self._cohorts: list[Cohort] = []
        # recoveries: who comes later enters alone
        self._gone: deque[str] = deque(maxlen=config.COHORTS_REMEMBERED)
        self._of: dict[str, Cohort] = {}
        self._bounds: dict[str, float] = {}  # when a request enters, whoever else is waiting
        self._now = float("-inf")  # of the last `settle`

    def join(self, request: str, ticket: CohortTicket | None, *, now: float) -> None:
        """The request has come, alone or with a cohort; the first member starts the cohort's
        clock.
        """
        self._bounds[request] = now + config.RESTORE_WAIT_S
        if ticket is None or ticket.name in self._gone:
            return
        cohort = self._open_to(ticket)
        if cohort is None:
            cohort = Cohort(
                ticket.name, ticket.size, now + ticket.deadline_s, is_recovery=ticket.is_recovery
            )
            self._cohorts.append(cohort)
        cohort.members.add(request)
        self._of[request] = cohort
        self._bounds[request] = min(cohort.deadline, now + config.RESTORE_WAIT_S)

    def decide(self, request: str) -> None:
        """What the request starts from is known."""
        cohort = self._of.get(request)
        if cohort is not None:
            cohort.decided.add(request)

    def end(self, request: str) -> None:
        """The request has entered a step, or will never enter one."""
        cohort = self._of.get(request)
        if cohort is not None:
            cohort.ended.add(request)

    def forget(self, request: str) -> None:
        """The request is gone from the engine."""
        self.end(request)
        self._of.pop(request, None)
        self._bounds.pop(request, None)

    def may_enter(self, request: str) -> bool:
        """True when nothing that this request belongs to, or must let go first, is still waiting,
        or its own bound has passed.
        """
        if self._now >= self._bounds.get(request, float("inf")):
            return True
        own = self._of.get(request)
        first = next((cohort for cohort in self._cohorts if cohort.is_recovery), None)
        if first is not None and first is not own:
            return False
        return own is None or own.state is not State.FORMING

    def settle(self, *, now: float) -> list[Cohort]:
        """Open and dismiss cohorts; to be called between two scheduling passes. Returns those that
        went late.
        """
        self._now = now
        late: list[Cohort] = []
        for cohort in list(self._cohorts):
            if cohort.state is State.FORMING and (cohort.is_complete or now >= cohort.deadline):
                cohort.state = State.OPEN
                cohort.is_late = not cohort.is_complete
                if cohort.is_late:
                    late.append(cohort)
            is_in = cohort.is_full and cohort.members <= cohort.ended
            if is_in or now >= cohort.deadline:
                # Past the deadline its members stand in the queue like everybody else, and nobody
                # is asked to go before them.
                self._dismiss(cohort)
        return late

    @property
    def is_waiting(self) -> bool:
        """True while some cohort waits, or holds the others back."""
        return bool(self._cohorts)

    def _open_to(self, ticket: CohortTicket) -> Cohort | None:
        """The cohort that this member is of. The router names each recovery once; a client's that
        has all its members is not its next.
        """
        found = (cohort for cohort in self._cohorts if cohort.name == ticket.name)
        return next((cohort for cohort in found if cohort.is_recovery or not cohort.is_full), None)

    def _dismiss(self, cohort: Cohort) -> None:
        self._cohorts.remove(cohort)
        for request in cohort.members:
            if self._of.get(request) is cohort:
                del self._of[request]
        if cohort.is_recovery:
            self._gone.append(cohort.name)
