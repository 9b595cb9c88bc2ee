"""The shared-memory names that a process tree leaves behind, floor 6.

Owns: which files under /dev/shm the processes of one tree had mapped or open, and their removal. Promises: only files that the tree used are
removed, and only when no living process uses them; folders (the journal is one) are never touched. Called by ProcessTree. Names are
noted while processes live, by inode: a dead one no longer says, and a semaphore is mapped under a name that it soon loses.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable
from typing import Final

SHARED_MEMORY: Final = pathlib.Path("/dev/shm")
_PREFIX: Final = f"{SHARED_MEMORY}/"


class SharedNames:
    """What one tree used under /dev/shm."""

    def __init__(self) -> None:
        self._inodes: set[int] = set()

    def note(self, pids: Iterable[int], *, is_thorough: bool = False) -> None:
        """Remember what these processes map; `is_thorough` adds what they have opened and not mapped yet."""
        for pid in pids:
            self._inodes |= _mapped(pid)
            if is_thorough:
                self._inodes |= _opened(pid)

    def remove(self, living: Iterable[int]) -> list[str]:
        """Unlink what was noted and none of the living processes maps; returns the names."""
        device = SHARED_MEMORY.stat().st_dev
        found: dict[int, str] = {}
        for entry in os.scandir(SHARED_MEMORY):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if status.st_dev == device and status.st_ino in self._inodes and entry.is_file():
                    found[status.st_ino] = entry.name
        if not found:
            return []
        in_use = set().union(*(_mapped(pid) for pid in living))
        removed = [name for inode, name in found.items() if inode not in in_use]
        for name in removed:
            (SHARED_MEMORY / name).unlink(missing_ok=True)
        return removed


def _mapped(pid: int) -> set[int]:
    """Inodes of files under /dev/shm that a process maps."""
    found = set()
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
            for line in file:
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(_PREFIX):
                    found.add(int(fields[4]))
    except OSError:
        return found
    return found


def _opened(pid: int) -> set[int]:
    """Inodes of files under /dev/shm that a process has open."""
    found: set[int] = set()
    folder = f"/proc/{pid}/fd"
    try:
        numbers = os.listdir(folder)
    except OSError:
        return found
    for number in numbers:
        with contextlib.suppress(OSError):
            if os.readlink(f"{folder}/{number}").startswith(_PREFIX):
                found.add(os.stat(f"{folder}/{number}").st_ino)
    return found
