"""The processes of one replica, from the first to the last, floor 6.

Owns: who belongs to a replica, the killing of all of it, and the shared-memory names that it
leaves. Promises: a process belongs when it is of the leader's session, descends from a member, or
carries the replica's marker (so one that starts a session of its own is found, too, because we are
its subreaper); a signal reaches only the process meant (pidfd); `kill` returns after every member
is confirmed dead, or raises ReplicaError naming who is left; a shared-memory file is removed only
when no living process maps it. Called by Replica and the watch. It does not decide when to kill.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Iterable
from typing import Final

from concordia import config
from concordia.errors import ReplicaError
from concordia.serving.process import (
    Process,
    list_processes,
    read_command,
    read_environment,
    read_process,
)
from concordia.serving.shared_names import SharedNames, living_pids

MARKER_ENV: Final = "CONCORDIA_REPLICA"
_PR_SET_CHILD_SUBREAPER: Final = 36
_RETRY_MS: Final = 2  # between two rounds when there is nothing to wait on


def become_subreaper() -> None:
    """Orphans of our descendants become our children, so that none can leave a tree unseen."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise ReplicaError(f"cannot become subreaper: {os.strerror(ctypes.get_errno())}")


class ProcessTree:
    """A replica's processes; `refresh` finds them, `kill` ends them. Finding may be done from
    several threads, killing from one.
    """

    def __init__(self, leader: int, marker: str, names: SharedNames | None = None) -> None:
        self.leader = leader
        self._lock = threading.Lock()
        self._marker = f"{MARKER_ENV}={marker}".encode()
        self._members: dict[int, Process] = {}
        self._known: dict[int, int] = {}  # every member that ever was: pid -> start
        self._pidfds: dict[int, int] = {}
        self._foreign: set[tuple[int, int]] = set()  # (pid, start) looked at and not ours
        self._names = names or SharedNames()
        self.refresh()

    @property
    def members(self) -> list[Process]:
        """Living members as of the last refresh, the leader first."""
        return sorted(self._members.values(), key=lambda p: (p.pid != self.leader, p.pid))

    def pidfd(self, pid: int) -> int | None:
        """A descriptor that becomes readable when that member ends."""
        return self._pidfds.get(pid)

    def refresh(self) -> list[Process]:
        """Look for members anew; returns those that live."""
        with self._lock:
            self._refresh()
            return self.members

    def _refresh(self) -> None:
        everyone = {p.pid: p for p in list_processes()}
        belongs: set[int] = set()
        for process in everyone.values():
            if self._is_member(process):
                belongs.add(process.pid)
        grown = True
        while grown:  # children of members, then their children; bounded by the number of processes
            found = {p.pid for p in everyone.values() if p.parent in belongs} - belongs
            belongs |= found
            grown = bool(found)
        self._members = {pid: everyone[pid] for pid in belongs if everyone[pid].is_alive}
        self._known.update((p.pid, p.start) for p in self._members.values())
        self._reap(everyone.values())
        for pid in [pid for pid in self._pidfds if pid not in self._members]:
            os.close(self._pidfds.pop(pid))
        for process in list(self._members.values()):
            if process.pid not in self._pidfds:
                self._open(process)

    def record_shared_names(self) -> None:
        """Remember which shared-memory files the members map now."""
        self._names.note(self._members)

    def freeze(self) -> None:
        """Stop every member but the helpers and note all that they use; for trees that were still
        being built.

        A process that is killed between making a shared-memory file and mapping it leaves a name
        that nobody knows.
        """
        deadline = time.monotonic() + config.FREEZE_S
        helpers = {p.pid for p in self.helpers()}
        moving = True
        while moving and time.monotonic() < deadline:
            targets = [p for p in self.refresh() if p.pid not in helpers]
            moving = False
            for process in targets:
                if process.state != "T" and not process.is_ending:
                    self._signal(process.pid, signal.SIGSTOP)
                    moving = True
        self._names.note(self._members, is_thorough=True)

    def kill(self, *, timeout_s: float, spare: Iterable[int] = ()) -> int:
        """SIGKILL every member except `spare` until none lives; returns how many were killed.

        Raises ReplicaError at the bound. A process forked by one that is just dying is found by the
        next round.
        """
        deadline = time.monotonic() + timeout_s
        spared = set(spare)
        killed: set[int] = set()
        while True:
            targets = [p for p in self.refresh() if p.pid not in spared]
            if not targets:
                return len(killed)
            if time.monotonic() >= deadline:
                left = ", ".join(f"{p.name} ({p.pid}, {p.state})" for p in targets)
                raise ReplicaError(f"still alive {timeout_s:.1f} s after SIGKILL: {left}")
            for process in targets:
                self._signal(process.pid, signal.SIGKILL)
                killed.add(process.pid)
            self._wait_gone([p.pid for p in targets], deadline)

    def strike(self, *, spare: Iterable[int] = ()) -> None:
        """Send SIGKILL to every member but `spare`, and wait for none: none runs another
        instruction of its own.
        """
        spared = set(spare)
        for process in self.refresh():
            if process.pid not in spared:
                self._signal(process.pid, signal.SIGKILL)

    def helpers(self) -> list[Process]:
        """Members that only clean up names after the others have ended (Python's resource
        trackers).
        """
        return [p for p in self.members if b"resource_tracker" in read_command(p.pid)]

    def wait_helpers(self, *, timeout_s: float) -> None:
        """Let the trackers remove what the dead processes had registered; bounded, then they are
        killed too.
        """
        deadline = time.monotonic() + timeout_s
        self._wait_gone([p.pid for p in self.helpers()], deadline)
        self.kill(timeout_s=config.KILL_S)

    def remove_shared_names(self) -> list[str]:
        """Unlink the shared-memory files that the tree mapped and nobody living maps; returns their
        names.
        """
        if self._members:
            raise ReplicaError(f"processes still live: {[p.pid for p in self.members]}")
        return self._names.remove(living_pids())

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in self._pidfds.values():
            os.close(descriptor)
        self._pidfds.clear()

    def _is_member(self, process: Process) -> bool:
        if self._known.get(process.pid) == process.start:
            return True
        if self.leader in (process.session, process.pid):
            return True
        if process.parent not in (1, os.getpid()) or (process.pid, process.start) in self._foreign:
            return False
        if self._marker in read_environment(process.pid):
            return True
        self._foreign.add((process.pid, process.start))
        return False

    def _open(self, process: Process) -> None:
        try:
            descriptor = os.pidfd_open(process.pid)
        except OSError:
            return
        again = read_process(process.pid)
        if again is None or again.start != process.start:  # the number was given to another
            os.close(descriptor)
            return
        self._pidfds[process.pid] = descriptor

    def _signal(self, pid: int, number: signal.Signals) -> None:
        descriptor = self._pidfds.get(pid)
        if descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)

    def _wait_gone(self, pids: Iterable[int], deadline: float) -> None:
        waiting = {self._pidfds[pid] for pid in pids if pid in self._pidfds}
        poll = select.poll()
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        if not waiting:
            poll.poll(_RETRY_MS)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(max(1, int(left * 1000))):
                poll.unregister(descriptor)
                waiting.discard(descriptor)

    def _reap(self, processes: Iterable[Process]) -> None:
        """Collect dead members that were handed to us as orphans; the leader belongs to whoever
        started it.
        """
        for process in processes:
            ours = process.session == self.leader or self._known.get(process.pid) == process.start
            orphan = process.parent == os.getpid() and process.pid != self.leader
            if ours and orphan and not process.is_alive:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
