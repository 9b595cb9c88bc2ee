"""How an engine ends, floor 6.

Owns: the steps of an end: out of sight, sealed, killed, given back, buried. Promises: nothing of a
replica is used again before all its processes are confirmed dead; what takes long to die is killed
again until it is dead or the server stops; a journal's owner that does not answer is said, and
holds up no end. Called by the replica set and its keeper, on threads of theirs, and may block. It
does not decide who ends, and nothing here is on the way to the next engine but `seal` and `strike`,
which need not wait for each other.
"""

from __future__ import annotations

import logging
import subprocess
from typing import Protocol

from concordia import config
from concordia.errors import ConcordiaError, ReplicaError
from concordia.serving.replica import Replica, State
from concordia.serving.roster import Roster
from concordia.serving.watch import Watch

log = logging.getLogger(__name__)


class Seals(Protocol):
    """What is asked of the journal's owner; None stands for a server without protection."""

    def register_replica(self, replica: int, *, session_id: int) -> None: ...
    def seal_replica(self, replica: int) -> dict[int, int]: ...
    def release_replica(self, replica: int) -> bool: ...


class Fencer:
    """`end` does it all; a failover takes the steps one by one, with the next engine between
    them.
    """

    def __init__(self, roster: Roster, watch: Watch, journal: Seals | None) -> None:
        self._roster = roster
        self._watch = watch
        self._journal = journal

    def register(self, replica: Replica) -> None:
        """Tell the journal's owner whom to kill and to seal when we die ourselves."""
        if self._journal is None:
            return
        try:
            self._journal.register_replica(replica.incarnation, session_id=replica.session_id)
        except (ConcordiaError, OSError) as error:
            log.error("%s is not known to the journal's owner: %s", replica.name, error)

    def end(self, replica: Replica) -> None:
        """End a replica, and remove what it leaves."""
        if replica.state is not State.DEAD:
            self.seal(replica)
        if self.confirm(replica):
            self.bury(replica)

    def hide(self, replica: Replica) -> None:
        """Nobody looks at it any more: what is done to its processes has them for itself."""
        self._watch.remove(replica)

    def seal(self, replica: Replica) -> bool:
        """Nothing more will be read of the replica; False when the owner did not do it."""
        self.hide(replica)
        if self._journal is None:
            return True
        try:
            self._journal.seal_replica(replica.incarnation)
        except (ConcordiaError, OSError) as error:
            log.error("%s could not be sealed, its requests start over: %s", replica.name, error)
            return False
        return True

    def strike(self, replica: Replica) -> None:
        """Kill what can be killed at once; `confirm` sees to the rest."""
        try:
            replica.strike()
        except OSError as error:
            log.error("%s: %s", replica.name, error)

    def confirm(self, replica: Replica) -> bool:
        """Kill what is left of it, see it dead, and give its part of the journal back; False when
        the server stops before.
        """
        while replica.state is not State.DEAD:
            try:
                replica.fence()
            except ReplicaError as error:
                # On starved cores a killed process takes its time to give gigabytes back. Until
                # then its place is taken.
                log.error("%s: %s", replica.name, error)
                if self._roster.is_closed:
                    return False
                continue
            # of this process, as when it has too many files open: that passes
            except OSError as error:
                log.error("%s: %s", replica.name, error)
                if not self._roster.wait_unless_closed(config.FENCE_RETRY_S):
                    return False
                continue
            self._release(replica)
            self._roster.notify()
        return True

    def bury(self, replica: Replica) -> None:
        """Remove what a dead replica left."""
        try:
            removed = replica.bury()
        except (ConcordiaError, OSError, subprocess.TimeoutExpired) as error:
            log.error("%s left something: %s", replica.name, error)
            return
        if removed:
            log.info("%s: removed shared memory %s", replica.name, ", ".join(removed))

    def _release(self, replica: Replica) -> None:
        if self._journal is None:
            return
        try:
            self._journal.release_replica(replica.incarnation)
        except (ConcordiaError, OSError) as error:
            log.error("%s could not be released: %s", replica.name, error)
