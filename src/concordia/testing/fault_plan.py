"""Faults on purpose: which process of a replica is hit, how, and when.

Owns: the finding of targets in a replica's process tree and the hitting. Promises: a signal goes
only to a process of the session named; what was hit and when (monotonic nanoseconds) is returned.
Called by the demo, the soak and fault tests; a user may import it to rehearse failures. Does not
judge what happens next.
"""

from __future__ import annotations

import os
import pathlib
import signal
import time
from dataclasses import dataclass
from enum import Enum
from typing import Final

import psutil

from concordia.errors import UsageError

RAISE_FILE_ENV: Final = "CONCORDIA_TEST_RAISE_FILE"


class Target(Enum):
    """A process of a serving replica; RANK_LAST is the highest tensor-parallel rank."""

    API = "api"
    ENGINE_CORE = "engine-core"
    RANK_LAST = "rank-last"


@dataclass(frozen=True, slots=True)
class Hit:
    """A fault that was injected."""

    kind: str
    target: str
    pid: int
    stamp_ns: int


def session_processes(session_id: int) -> list[psutil.Process]:
    """Every live process of a session, the leader first."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return sorted(found, key=lambda p: (p.pid != session_id, p.pid))


def find_target(session_id: int, target: Target) -> int:
    """Process id of `target` in the replica's session; raises UsageError when there is none."""
    processes = session_processes(session_id)
    if target is Target.API:
        return session_id
    name = "EngineCore" if target is Target.ENGINE_CORE else "Worker"
    titles = []
    for process in processes:
        try:
            titles.append((process.pid, process.name() + " " + " ".join(process.cmdline())))
        except psutil.NoSuchProcess:
            continue
    matching: list[int] = [pid for pid, title in titles if f"VLLM::{name}" in title]
    if not matching and target is Target.RANK_LAST:  # one rank lives inside the engine core
        return find_target(session_id, Target.ENGINE_CORE)
    if not matching:
        raise UsageError(f"no {target.value} process in session {session_id}: {titles}")
    return max(matching)


def hit(session_id: int, target: Target, number: signal.Signals) -> Hit:
    """Send a signal to `target` and say when."""
    pid = find_target(session_id, target)
    stamp = time.monotonic_ns()
    os.kill(pid, number)
    return Hit(number.name, target.value, pid, stamp)


def make_forward_raise(trigger: pathlib.Path, session_id: int) -> Hit:
    """Let the next forward of the replica with that session raise (it must run with
    RaisingProcessor).
    """
    stamp = time.monotonic_ns()
    partial = trigger.with_suffix(".partial")
    partial.write_text(str(session_id), encoding="utf-8")
    partial.rename(trigger)
    return Hit("RAISE", "forward", session_id, stamp)
