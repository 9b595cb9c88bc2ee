"""The folder of one `concordia run`, floor 7.

Owns: where runs have their folders, what lies in one, and which are removed. Promises: a folder is
this user's alone; it stays after the program, so that its modules can be asked for, until newer
runs or time take its place; one whose launcher lives is never removed. Called by launch and by
whoever asks about a run. The shim finds it by CONCORDIA_RUN and writes `modules/` itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from concordia import config
from concordia.errors import UsageError
from concordia.instrument.rewriter_socket import NAME
from concordia.paths import default_base
from concordia.private_folder import is_locked, make_private

VARIABLE: Final = "CONCORDIA_RUN"
_RUNS: Final = "runs"
_ABOUT: Final = "about.json"
_LOCK: Final = "lock"
_SHOWN_MAX: Final = 64  # characters of a path that is too long
_SEPARATORS: Final = ":;"  # of LD_LIBRARY_PATH, where nothing quotes them


class ProgramRun:
    """A run's folder; `close` keeps it and lets others remove it."""

    __slots__ = ("_lock", "path")

    def __init__(self, path: Path, lock: int = -1) -> None:
        self.path = path
        self._lock = lock

    @property
    def modules(self) -> Path:
        """A log for each process that loaded images."""
        return self.path / "modules"

    @property
    def socket(self) -> Path:
        return self.path / NAME

    def settle(self, settings: Mapping[str, object]) -> None:
        """Write what the shim reads when a process starts: a name and a value on each line."""
        lines = []
        for name, value in settings.items():
            text = str(value)
            if "\n" in text:
                raise UsageError(f"{name}: {text!r} has a line break in it; use another path")
            lines.append(f"{name}={text}\n")
        text = "".join(lines)
        if len(text.encode()) > config.RUN_SETTINGS_BYTES_MAX:
            raise UsageError(
                f"{len(text.encode())} bytes of settings, and a program reads "
                f"{config.RUN_SETTINGS_BYTES_MAX}: shorten images.opaque, or the paths"
            )
        self._write("settings", text)

    def settings(self) -> dict[str, str]:
        """The same, read."""
        try:
            text = (self.path / "settings").read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            return {}
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def tell(self, **facts: Any) -> None:
        """Add to what is known of the run: its command, its start and end."""
        self._write(_ABOUT, json.dumps({**self.about(), **facts}))

    def about(self) -> dict[str, Any]:
        """What is known of the run; empty when that was damaged."""
        try:
            found = json.loads((self.path / _ABOUT).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all: programs start while it is written."""
        part = self.path / f"{name}.part"
        part.write_text(text, "utf-8")
        part.chmod(0o600)
        part.rename(self.path / name)


def make_run(base: Path | None = None) -> ProgramRun:
    """A new folder; raises UsageError."""
    # absolute: a program may change its working folder before it starts others
    runs = (base or default_base()).absolute() / _RUNS
    path = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    # the stand-in for an assembler finds the folder by its own path, which has no links
    for found in (path, path.resolve()):
        check_length(found, "name a shorter --run-dir")
    if any(mark in str(path) for mark in _SEPARATORS):
        raise UsageError(f"{path} would be cut at its : or ; by the loader; name another --run-dir")
    for folder in (runs.parent, runs):
        make_private(folder, "name another --run-dir")
    try:
        path.mkdir(mode=0o700)
        (path / "modules").mkdir(mode=0o700)
    except OSError as error:
        raise UsageError(f"no folder for this run: {error}; name another --run-dir") from None
    return ProgramRun(path, _locked(path))


def check_length(folder: Path, advice: str) -> None:
    """Raises UsageError for a folder that no program would use, which would run without hooks."""
    size = len(os.fsencode(folder))
    if size > config.RUN_PATH_BYTES_MAX:
        shown = f"{str(folder)[:_SHOWN_MAX]}..."
        raise UsageError(
            f"{shown} has {size} bytes, and a program uses {config.RUN_PATH_BYTES_MAX}; {advice}"
        )


def find_run(given: Path | None = None, base: Path | None = None) -> ProgramRun:
    """The run in this folder or of this name, else the last one; raises UsageError."""
    runs = (base or default_base()) / _RUNS
    if given is not None:
        for path in (given, runs / given):
            if (path / "modules").is_dir():
                return ProgramRun(path)
        raise UsageError(f"{given} is no run; those of this user lie in {runs}")
    found = [path for path in _folders(runs) if (path / "modules").is_dir()]
    if not found:
        raise UsageError(f"no run in {runs}: start one with `concordia run -- PROGRAM`")
    return ProgramRun(found[-1])


def remove_old(runs: Path) -> None:
    """Remove runs that ended too long ago, or whose place newer ones take: the oldest few of them.
    Called once a new one's program runs, whose signals wait meanwhile.
    """
    folders, removed = _folders(runs), 0
    for index, path in enumerate(folders):
        is_old = time.time() - _age_stamp(path) > config.RUN_KEPT_S
        if (is_old or index < len(folders) - config.RUNS_KEPT) and not is_alive(path):
            import shutil  # no program waits for it

            shutil.rmtree(path, ignore_errors=True)
            removed += 1
            if removed == config.RUNS_REMOVED_MAX:
                return


def is_alive(path: Path) -> bool:
    """Whether the launcher of this run lives."""
    return is_locked(path / _LOCK)


def processes(run: ProgramRun) -> Iterator[tuple[int, Path]]:
    """Pid and log of every process that had something to say."""
    with contextlib.suppress(OSError):
        for path in sorted(run.modules.iterdir()):
            if path.suffix == ".log" and path.stem.isdecimal():
                yield int(path.stem), path


def _locked(path: Path) -> int:
    """The new run's lock, or nothing of it; raises UsageError."""
    lock = -1
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        import shutil  # most starts remove nothing

        if lock >= 0:
            os.close(lock)
        shutil.rmtree(path, ignore_errors=True)
        raise UsageError(f"no lock in {path}: {error.strerror}; name another --run-dir") from None
    return lock


def _folders(runs: Path) -> list[Path]:
    """Oldest first."""
    try:
        found = [path for path in runs.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return []
    return sorted(found, key=lambda path: (_age_stamp(path), path.name))


def _age_stamp(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
