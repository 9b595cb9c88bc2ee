"""One process, as the kernel tells of it, floor 6.

Owns: the reading of /proc. Promises: a process that is not there, or is going, is an answer (None,
nothing), never an error; only a list of all of them that cannot be had is an OSError; pid and start
time together are one process and no later one that was given its number. Called by ProcessTree, the
watch and whoever changes priorities. It sends no signal and waits for nobody.
"""

from __future__ import annotations

import os
import pathlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from concordia.recovery.detector import ThreadTimes

_CAP_SYS_NICE: Final = 23
_PF_EXITING: Final = 0x4  # of the kernel's task flags
_DEAD: Final = frozenset("ZXx")


@dataclass(frozen=True, slots=True)
class Process:
    """One process as /proc/PID/stat shows it; pid and start time together name it for good."""

    pid: int
    name: str
    state: str
    parent: int
    session: int
    start: int
    flags: int = 0

    @property
    def is_alive(self) -> bool:
        return self.state not in _DEAD

    @property
    def is_ending(self) -> bool:
        """Dead, or on its way: giving back a large memory takes a while before the kernel calls it
        dead.
        """
        return self.state in _DEAD or bool(self.flags & _PF_EXITING)


def read_process(pid: int) -> Process | None:
    """What /proc says of a process, or None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            raw = file.read(1024)
    except OSError:
        return None
    close = raw.rfind(b")")  # the name may hold spaces and parentheses
    if close < 0:
        return None
    fields = raw[close + 2 :].split()
    name = raw[raw.find(b"(") + 1 : close].decode("utf-8", "replace")
    parent, session, flags, start = (int(fields[at]) for at in (1, 3, 6, 19))
    return Process(pid, name, fields[0].decode(), parent, session, start, flags)


def read_thread_times(pid: int) -> ThreadTimes:
    """Nanoseconds that each thread of a process ran, and waited for a core."""
    times: dict[int, tuple[int, int]] = {}
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return times
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/schedstat", "rb", buffering=0) as file:
                run, wait, _ = file.read(128).split()
        except (OSError, ValueError):
            continue
        times[int(thread)] = (int(run), int(wait))
    return times


def list_processes() -> Iterator[Process]:
    """All that there are; raises OSError where they cannot be listed."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            process = read_process(int(name))
            if process is not None:
                yield process


def read_environment(pid: int) -> list[bytes]:
    """Its variables as it was started with them, `NAME=value` each."""
    try:
        return pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def read_command(pid: int) -> bytes:
    """Its command line, words ended by zeros."""
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def can_raise_priority() -> bool:
    """Whether a priority that we lowered could be given back."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    if soft == resource.RLIM_INFINITY or soft >= 20:
        return True
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    mask = next((x.split()[1] for x in status.splitlines() if x.startswith("CapEff:")), "0")
    return bool(int(mask, 16) >> _CAP_SYS_NICE & 1)
