"""The replicas that a router has registered, and what happens to them when it dies, floor 3.

Owns: registrations (kept on the board, so that an owner to come knows them) and the fences under
way. Promises: a replica that was sealed never opens a stream again; its segments serve others only
after every process of its session is known to be gone; when its router dies, it is sealed first,
then killed. Called by the owner. It does not watch processes: the owner's selector tells it who
died.
"""

from __future__ import annotations

import os
import time

from concordia import abi, config
from concordia.errors import JournalError
from concordia.journal import fence
from concordia.journal.segment import Registration
from concordia.journal.streams import Streams


class Replicas:
    """All registered replicas."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._entries: dict[int, tuple[int, Registration]] = {}  # by replica: index on the board
        self._fenced: set[int] = set()
        self._fences: dict[int, fence.Fence] = {}
        self._late: dict[int, float] = {}  # fences that take long: when to look next
        self._begun: dict[int, float] = {}
        for index, entry in streams.board.registrations().items():
            self._entries[entry.replica] = index, entry
            if entry.fenced:
                self._fenced.add(entry.replica)

    def register(self, replica: int, *, session: int, router_pid: int) -> None:
        """This session ends when that router does. Again for the same replica: the newest rules."""
        if replica <= 0 or session <= 1 or session == os.getsid(0):
            raise JournalError(f"replica {replica} with session {session} cannot be registered")
        taken = {index for index, _ in self._entries.values()}
        free = next((i for i in range(abi.REPLICA_CAPACITY) if i not in taken), None)
        index = self._entries[replica][0] if replica in self._entries else free
        if index is None:
            raise JournalError(f"{abi.REPLICA_CAPACITY} replicas are registered already")
        leader, router = fence.find_process(session), fence.find_process(router_pid)
        entry = Registration(
            replica,
            session,
            leader.start if leader else 0,
            router_pid,
            router.start if router else 0,
            int(replica in self._fenced),
        )
        self._entries[replica] = index, entry
        self._streams.board.write_registration(index, entry)

    def routers(self) -> set[tuple[int, int]]:
        """Pid and start of every router that has a replica here."""
        return {(entry.router_pid, entry.router_start) for _, entry in self._entries.values()}

    def is_registered(self, replica: int) -> bool:
        return replica in self._entries

    def check_may_write(self, replica: int) -> None:
        """Raise JournalError for a replica that was sealed: it is a zombie."""
        if replica in self._fenced:
            raise JournalError(f"replica {replica} was sealed; it must not write any more")

    def seal(self, replica: int) -> dict[int, int]:
        """Fix what may be read of this replica, for ever: stream to number of records."""
        if replica:
            self._fenced.add(replica)
        if replica in self._entries:
            index, entry = self._entries[replica]
            entry = entry._replace(fenced=1)
            self._entries[replica] = index, entry
            self._streams.board.write_registration(index, entry)
        return {s.identity.stream: self._streams.seal(s) for s in self._streams.of_replica(replica)}

    def release(self, replica: int) -> bool:
        """Give its segments free once its processes are gone; True when they are so already.

        Whoever calls has ended the session; we look for ourselves, because a writer that still
        lived would write into records of others.
        """
        self.seal(replica)
        if replica in self._entries:
            entry = self._entries[replica][1]
            if replica not in self._fences:
                self._begun[replica] = time.monotonic()
                self._fences[replica] = fence.Fence(
                    entry.session, session_start=entry.session_start
                )
            self.step()
            return replica not in self._fences
        for stream in self._streams.of_replica(replica):
            identity = stream.identity
            if not stream.is_released and fence.is_alive(
                identity.writer_pid, identity.writer_start
            ):
                raise JournalError(f"replica {replica}: its writer {identity.writer_pid} lives")
        self._finish(replica)
        return True

    def release_fenced(self) -> list[int]:
        """Go on with what an owner before us had begun: a sealed replica never writes again, so it
        may end.
        """
        found = [replica for replica, (_, entry) in self._entries.items() if entry.fenced]
        for replica in found:
            self.release(replica)
        return found

    def router_died(self, router_pid: int, router_start: int, *, now: float) -> list[int]:
        """Seal and kill the replicas of this router; its requests will not be resumed."""
        orphans = [
            replica
            for replica, (_, entry) in self._entries.items()
            if (entry.router_pid, entry.router_start) == (router_pid, router_start)
        ]
        for replica in orphans:
            self.seal(replica)
            self._streams.index.abandon(replica, now=now)
        for replica in orphans:
            self.release(replica)
        return orphans

    def step(self) -> None:
        """Push the fences under way; release what is gone. Looks rarely once one takes very
        long.
        """
        now = time.monotonic()
        for replica, running in list(self._fences.items()):
            if now < self._late.get(replica, 0.0):
                continue
            if running.step():
                running.close()
                del self._fences[replica], self._begun[replica]
                self._late.pop(replica, None)
                self._finish(replica)
            elif now - self._begun[replica] >= config.FENCE_WAIT_S:
                if replica not in self._late:
                    reason = (
                        f"session {running.session} lives {config.FENCE_WAIT_S} s after SIGKILL"
                    )
                    self._streams.index.events.note(
                        {"event": "unfenced", "replica": replica, "reason": reason}
                    )
                self._late[replica] = now + config.FENCE_WAIT_S / 10

    @property
    def is_fencing(self) -> bool:
        return bool(self._fences)

    def _finish(self, replica: int) -> None:
        if replica in self._entries:
            index, _ = self._entries.pop(replica)
            self._streams.board.write_registration(index, None)
        for stream in self._streams.of_replica(replica):
            self._streams.release(stream)
