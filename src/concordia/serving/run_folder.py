"""The folder of one running server, by its port, floor 6.

Owns: where a server's control socket and its engines' folders lie, and who may claim them. Promises: the folder is this user's alone; one
living server per port (flock); what a server that was killed left is removed when its port is claimed again. Called by the service and
by the commands that look for a server. It does not listen on anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import stat
from dataclasses import dataclass

from concordia.errors import UsageError

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
        """The folder of the server on this port; raises UsageError when another lives or the base is not ours alone."""
        _make_private(base)
        path = base / str(port)
        path.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UsageError(
                f"a Concordia server for port {port} runs already (concordia status --port {port})"
            ) from None
        for left in path.iterdir():
            if left.name != _LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        return cls(path, lock)

    def release(self) -> None:
        """Remove the folder; the lock goes last."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()  # when this was the last server


def default_base() -> pathlib.Path:
    """Where servers of this user have their folders. Short: Unix sockets have names of at most 107 bytes."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return pathlib.Path(runtime) / "concordia"
    return pathlib.Path(f"/tmp/concordia-{os.getuid()}")


def find_control(base: pathlib.Path, port: int | None) -> pathlib.Path:
    """The control socket of a living server; the only one there is when no port is named. Raises UsageError."""
    living = {
        int(path.name): path / _CONTROL
        for path in (base.iterdir() if base.is_dir() else ())
        if path.name.isdecimal() and _is_locked(path / _LOCK)
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


def _is_locked(path: pathlib.Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _make_private(base: pathlib.Path) -> None:
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = base.lstat()
    except OSError as error:
        raise UsageError(f"cannot use {base} as --run-dir: {error}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UsageError(
            f"{base} must be a folder that only this user may enter; name another --run-dir"
        )
