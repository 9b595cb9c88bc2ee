"""Which engines a server has, and the places that they take, floor 6.

Owns: the list of replicas, the places for them (each with its share of the machine), and the lock
under which the set is changed. Promises: a replica has its place from its start to its confirmed
end; who waits on `changed` is woken whenever a replica was loaded or has ended, or the server
stops. Used by the replica set and what it consists of. It starts, watches and ends nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from concordia.serving.replica import Replica, State
from concordia.serving.resources import Share


@dataclass(frozen=True, slots=True)
class Place:
    """Where the next engine goes; it is spare when there are as many others as shall serve."""

    slot: int
    share: Share
    is_spare: bool


class Roster:
    """One place per share; `replicas` of the engines in them serve, the others wait."""

    def __init__(self, shares: Sequence[Share], *, replicas: int) -> None:
        self.changed = threading.Condition()
        self.is_closed = False  # the server stops: no engine is started, none replaced
        self._shares = shares
        self._replica_count = replicas
        self._replicas: list[Replica] = []

    @property
    def living(self) -> list[Replica]:
        """All that are not confirmed dead."""
        return [r for r in list(self._replicas) if r.state is not State.DEAD]

    @property
    def active(self) -> list[Replica]:
        """Those that serve."""
        return self._in(State.READY)

    @property
    def standbys(self) -> list[Replica]:
        """Those that are loaded and wait, the longest loaded first."""
        return self._in(State.STANDBY)

    @property
    def starting(self) -> list[Replica]:
        return self._in(State.STARTING)

    @property
    def is_served(self) -> bool:
        """Whether as many serve as shall."""
        return len(self.active) >= self._replica_count

    def vacancy(self) -> Place | None:
        """The first free place; None when all are taken."""
        taken = {r.slot for r in self.living}
        slot = next((s for s in range(len(self._shares)) if s not in taken), None)
        if slot is None:
            return None
        return Place(slot, self._shares[slot], len(taken) >= self._replica_count)

    def add(self, replica: Replica) -> None:
        with self.changed:
            self._replicas = [*self.living, replica]

    def promote(self) -> Replica | None:
        """The longest loaded standby serves from now on; None when there is none."""
        return next((r for r in self.standbys if r.move(State.READY)), None)

    def notify(self) -> None:
        """Wake who waits on `changed`."""
        with self.changed:
            self.changed.notify_all()

    def wait_unless_closed(self, pause_s: float) -> bool:
        """Let a moment pass; False when the server stops."""
        with self.changed:
            return not self.changed.wait_for(lambda: self.is_closed, pause_s)

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    def _in(self, state: State) -> list[Replica]:
        return [r for r in list(self._replicas) if r.state is state]
