"""The cache of everything compiled, floor 2.

Owns: the cache folder, its bound and its files. Promises: a file is complete or not there
(temporary file, fsync, rename, fsync of the folder); nothing of another user's is ever loaded.
Called by whoever compiles: compiler, cuda, and what builds native/. It imports nothing that takes
time to load, because a launcher waits for it; it compiles nothing, and a name is its caller's.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from concordia import config
from concordia.errors import EnvironmentRefused
from concordia.paths import Paths


class KernelCache:
    """Compiled files by the name of what they were made from."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Paths.default().kernel_cache
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.folder.stat()
        except OSError as error:
            raise EnvironmentRefused(
                f"no folder for compiled code: {error}; set CONCORDIA_CACHE"
            ) from error
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
            raise EnvironmentRefused(
                f"{self.folder}: compiled code is only loaded from a folder that nobody else "
                "can write"
            )

    def get(self, key: str, suffix: str, build: Callable[[Path], None]) -> Path:
        """The file, made by `build(temporary path)` when it is not there. Two builders may race:
        both make the same.
        """
        path = self.folder / f"{key}{suffix}"
        if path.exists():
            return path
        import tempfile  # most starts find it

        descriptor, name = tempfile.mkstemp(
            suffix=f"{suffix}.part", prefix=f"{os.getpid()}-", dir=self.folder
        )
        os.close(descriptor)
        temporary = Path(name)
        try:
            build(temporary)
            _sync(temporary)
            temporary.rename(path)
            _sync(self.folder)
        finally:
            temporary.unlink(missing_ok=True)
        self._evict()
        return path

    def _evict(self) -> None:
        """Drop the oldest beyond the limit, and what a killed compilation left."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                if path.suffix != ".part":
                    found.append((path.stat().st_mtime, path))
                elif not _is_alive(path.name.partition("-")[0]):
                    path.unlink()
        found.sort()
        for _, path in found[: max(0, len(found) - config.KERNEL_CACHE_FILES_MAX)]:
            path.unlink(missing_ok=True)


def _is_alive(pid: str) -> bool:
    return pid.isdigit() and Path("/proc", pid).exists()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
