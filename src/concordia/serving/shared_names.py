"""The shared-memory names that a process tree leaves behind, floor 6.

Owns: which files under /dev/shm the processes of one tree had mapped or open, and their removal.
Promises: only files that the tree used are removed, and only when no living process uses them;
folders (the journal is one) are never touched. Called by ProcessTree. Names are noted while
processes live, by inode: a dead one no longer says, and a semaphore is mapped under a name that it
soon loses. What is noted can be kept in a file, for whoever cleans up after us when we are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Final

SHARED_MEMORY: Final = pathlib.Path("/dev/shm")
_PREFIX: Final = f"{SHARED_MEMORY}/"


class SharedNames:
    """What one tree used under /dev/shm."""

    def __init__(self, file: pathlib.Path | None = None) -> None:
        self._file = file
        self._inodes: set[int] = set()

    @staticmethod
    def load(file: pathlib.Path) -> SharedNames:
        """What was noted in this file; nothing when it is missing, damaged or older than the
        machine's last start.
        """
        names = SharedNames()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(file.read_text(encoding="ascii"))
            if kept["boot"] == _boot():
                names._inodes = {int(inode) for inode in kept["inodes"]}
        return names

    def note(self, pids: Iterable[int], *, is_thorough: bool = False) -> None:
        """Remember what these processes map; `is_thorough` adds what they have opened and not
        mapped yet.
        """
        before = len(self._inodes)
        for pid in pids:
            self._inodes |= _mapped(pid)
            if is_thorough:
                self._inodes |= _opened(pid)
        if self._file is not None and len(self._inodes) != before:
            text = json.dumps({"boot": _boot(), "inodes": sorted(self._inodes)})
            with contextlib.suppress(OSError):  # the folder may be on its way out
                self._file.write_text(text, encoding="ascii")

    def exist(self) -> bool:
        """Whether a file that was noted is still there."""
        return any(
            entry.inode() in self._inodes and entry.is_file() for entry in os.scandir(SHARED_MEMORY)
        )

    def remove(self, living: Iterable[int]) -> list[str]:
        """Unlink what was noted and none of the living processes maps; returns the names."""
        if not self._inodes:
            return []
        device = SHARED_MEMORY.stat().st_dev
        found: dict[int, str] = {}
        for entry in os.scandir(SHARED_MEMORY):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                is_ours = status.st_dev == device and status.st_uid == os.getuid()
                if is_ours and status.st_ino in self._inodes and entry.is_file():
                    found[status.st_ino] = entry.name
        if not found:
            return []
        in_use = set().union(*(_mapped(pid) for pid in living))
        removed = [name for inode, name in found.items() if inode not in in_use]
        for name in removed:
            (SHARED_MEMORY / name).unlink(missing_ok=True)
        return removed


def living_pids() -> list[int]:
    """Every process that can be seen."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _boot() -> str:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


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
