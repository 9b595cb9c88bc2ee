"""The folder of one running server, by its port, floor 6.

Owns: where a server's control socket and its engines' folders lie, and who may claim them.
Promises: the folder is this user's alone; one living server per port (flock); what a server that
was killed left is removed when its port is claimed again. Called by the service and by the commands
that look for a server. It does not listen on anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
from dataclasses import dataclass

from concordia.errors import UsageError
from concordia.private_folder import is_locked, make_private
from concordia.serving.shared_names import SharedNames, living_pids

NAMES_FILE = "names"  # in an engine's folder: the shared memory that it used
_LOCK = "lock"
_CONTROL = "control.sock"


@dataclass(slots=True)
class RunFolder:
    """A claimed folder; `release` gives it back and removes it."""

    path: pathlib.Path
    _lock: int

    @property
    def control(self) -> pathlib.Path:
        return self.path / _CONTROL

    @classmethod
    def claim(cls, base: pathlib.Path, port: int) -> RunFolder:
        """The folder of the server on this port; raises UsageError when another lives or the base
        is not ours alone.
        """
        make_private(base, "name another --run-dir")
        _bury_dead(base)
        path = base / str(port)
        path.mkdir(mode=0o700, exist_ok=True)
        lock = _lock(path)
        if lock is None:
            raise UsageError(
                f"a Concordia server for port {port} runs already (concordia status --port {port})"
            )
        return cls(path, lock)

    def release(self) -> None:
        """Remove the folder; the lock goes last."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()  # when this was the last server


def find_control(base: pathlib.Path, port: int | None) -> pathlib.Path:
    """The control socket of a living server; the only one there is when no port is named. Raises
    UsageError.
    """
    living = {
        int(path.name): path / _CONTROL
        for path in (base.iterdir() if base.is_dir() else ())
        if path.name.isdecimal() and is_locked(path / _LOCK)
    }
    if port is not None:
        if port not in living:
            raise UsageError(f"no Concordia server of this user runs on port {port}")
        return living[port]
    if len(living) != 1:
        ports = ", ".join(str(p) for p in sorted(living))
        raise UsageError(
            f"servers run on ports {ports}: name one with --port"
            if living
            else "no Concordia server of this user runs"
        )
    return next(iter(living.values()))


def _bury_dead(base: pathlib.Path) -> None:
    """Remove what killed servers left; what still has living processes is left for the next
    time.
    """
    for path in base.iterdir():
        if not path.name.isdecimal() or not (path / _LOCK).exists():
            continue
        lock = _lock(path)
        if lock is None:
            continue
        files = list(path.glob(f"*/{NAMES_FILE}"))
        for file in files:
            SharedNames.load(file).remove(living_pids())
        if not any(SharedNames.load(file).exist() for file in files):
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _lock(path: pathlib.Path) -> int | None:
    """The lock of a server's folder, or None while its server lives."""
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None  # somebody is removing the folder
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == (path / _LOCK).stat().st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None
