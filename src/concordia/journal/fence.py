"""Make sure that an old writer can never write again: end every process of a session, floor 3.

Owns: finding the processes of a session and their descendants, killing them, knowing that they are
gone. Promises: a process is killed through a pidfd whose start time was compared first, so a reused
pid is never hit; gone means that every thread has ended, which a pidfd tells and /proc does not;
`step` never blocks. Called by the owner when a router dies, and by whoever replaces a replica. It
does not seal streams.
"""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path
from typing import NamedTuple

from concordia import config
from concordia.errors import WaitTimeout


class Process(NamedTuple):
    """One line of the process table."""

    pid: int
    parent: int
    session: int
    start: int  # clock ticks after boot: with the pid, a name that is never reused


def find_process(pid: int) -> Process | None:
    """The process of this pid, or None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]))


def open_process(pid: int, start: int | None = None) -> int | None:
    """A pidfd of the process, or None when it is gone or another has its pid now."""
    try:
        descriptor = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        return None
    found = find_process(pid)  # read after the pidfd: what it names cannot change any more
    if found is None or (start is not None and found.start != start):
        os.close(descriptor)
        return None
    return descriptor


def has_ended(descriptor: int) -> bool:
    """Whether every thread of the process behind a pidfd has ended."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(0))


def is_alive(pid: int, start: int | None = None) -> bool:
    """Whether this process runs; with its start time, exactly this one."""
    descriptor = open_process(pid, start)
    if descriptor is None:
        return False
    try:
        return not has_ended(descriptor)
    finally:
        os.close(descriptor)


class Fence:
    """The end of one session; call `step` until it says that nothing is left."""

    def __init__(self, session: int, *, session_start: int) -> None:
        self.session = session
        self.killed: set[tuple[int, int]] = set()
        self._session_start = session_start
        self._open: dict[tuple[int, int], int] = {}  # pidfds of those that were told to end
        self._known: set[int] = {session}

    def step(self) -> bool:
        """Kill what is there now; True once a look at the process table found nobody."""
        for name, descriptor in list(self._open.items()):
            if has_ended(descriptor):
                os.close(self._open.pop(name))
        members = self._members()
        for process in members:
            name = process.pid, process.start
            if name in self._open:
                continue
            opened = open_process(process.pid, process.start)
            if opened is None:
                continue
            if has_ended(opened):  # a zombie that its parent has not collected yet
                os.close(opened)
                continue
            signal.pidfd_send_signal(opened, signal.SIGKILL)
            self._open[name] = opened
            self._known.add(process.pid)
            self.killed.add(name)
        return not self._open

    def wait(self, timeout_s: float = config.FENCE_WAIT_S) -> int:
        """Step until done; the number of processes killed. Raises WaitTimeout at the bound."""
        deadline = time.monotonic() + timeout_s
        while not self.step():
            left = deadline - time.monotonic()
            if left <= 0:
                pids = sorted(pid for pid, _ in self._open)
                raise WaitTimeout(
                    f"session {self.session}: {pids} live {timeout_s} s after SIGKILL"
                )
            poller = select.poll()
            for descriptor in self._open.values():
                poller.register(descriptor, select.POLLIN)
            poller.poll(min(left, 0.1) * 1000)
        return len(self.killed)

    def close(self) -> None:
        """Give the pidfds back."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _members(self) -> list[Process]:
        """Processes of the session, and their descendants in whatever session; never ourselves."""
        leader = find_process(self.session)
        if leader is not None and leader.start != self._session_start:
            return []  # the session is gone for long: its number serves another process
        table = process_table()
        wanted = {
            process.pid
            for process in table
            if process.session == self.session and process.start >= self._session_start
        }
        wanted |= self._known & {pid for pid, _ in self._open}
        size = -1
        while size != len(wanted):
            size = len(wanted)
            wanted |= {process.pid for process in table if process.parent in wanted}
        wanted.discard(os.getpid())
        return [process for process in table if process.pid in wanted]


def process_table() -> list[Process]:
    """Every process that can be seen."""
    found = (find_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [process for process in found if process is not None]
