"""serving/process.py: what the kernel tells of a process is read as it is.

Invariants: threads' times grow while they compute; a process counts as ending before it is dead; one that is not there is no error.
"""

from __future__ import annotations

import os
import pathlib
import time
from dataclasses import replace

from concordia.serving.process import (
    read_command,
    read_environment,
    read_process,
    read_thread_times,
)


def test_thread_times_grow_when_a_process_computes() -> None:
    before = read_thread_times(os.getpid())
    total = 0
    wait_until = time.monotonic() + 0.05
    while time.monotonic() < wait_until:
        total += 1
    after = read_thread_times(os.getpid())
    assert sum(after[os.getpid()]) - sum(before[os.getpid()]) > 20_000_000
    assert read_thread_times(2**22 + 1) == {}


def test_process_is_ending_when_the_kernel_says_so_and_before_it_is_dead() -> None:
    own = read_process(os.getpid())
    stat = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert own is not None
    assert own.flags == int(stat[6]) != 0
    assert own.is_alive
    assert not own.is_ending
    assert replace(own, flags=own.flags | 4).is_ending
    assert replace(own, state="Z").is_ending


def test_nothing_is_read_when_there_is_no_such_process() -> None:
    absent = 2**22 + 1  # above what the kernel counts to
    assert read_process(absent) is None
    assert read_command(absent) == b""
    assert read_environment(absent) == []
