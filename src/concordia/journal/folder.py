"""The folder of a journal: what lies in it, who may open it, how large it may be, floor 3.

Owns: the names of the files, the checks of owner and permissions, the arithmetic of free memory.
Promises: a folder or file of another user, or one that group or world may touch, is refused and
never changed; a size that does not fit is refused or reduced before the first byte is written.
Called by segment, owner and client. It does not map or read any file.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from concordia import config
from concordia.errors import JournalRefused

_PRIVATE: Final = 0o077  # bits that group and world must not have
_UNLIMITED: Final = 1 << 60  # cgroup v1 says "no limit" with a number near 2**63


@dataclass(frozen=True, slots=True)
class Folder:
    """Paths of one journal."""

    path: Path

    @property
    def pool(self) -> Path:
        return self.path / "pool"

    @property
    def board(self) -> Path:
        return self.path / "board"

    @property
    def socket(self) -> Path:
        return self.path / "owner.sock"

    @property
    def lock(self) -> Path:
        return self.path / "owner.lock"

    @property
    def log(self) -> Path:
        return self.path / "owner.log"

    def make(self) -> None:
        """Create the folder for this user alone, or accept it if it is so already."""
        try:
            self.path.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            pass
        except OSError as error:
            raise JournalRefused(f"cannot create the journal {self.path}: {error}") from error
        self.check()

    def check(self) -> None:
        """Raise JournalRefused unless the folder is this user's alone."""
        found = _private_stat(self.path)
        if not stat.S_ISDIR(found.st_mode):
            raise JournalRefused(f"{self.path} is not a folder; name another --journal-dir")

    def clear(self) -> None:
        """Unlink what holds data or answers; what is not there is no error."""
        if self.pool.is_symlink() and self.pool.is_file():
            _unlink_private(self.pool.readlink())  # one that we made, on hugetlbfs for instance
        for file in (self.socket, self.pool, self.board):
            file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Unlink everything; the lock goes last, because until then nobody else can begin."""
        self.clear()
        self.log.unlink(missing_ok=True)
        self.lock.unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except OSError:
            return  # a file that is not ours lies there


def check_file(path: Path) -> os.stat_result:
    """The state of a file that only this user may touch; raises JournalRefused otherwise."""
    return _private_stat(path)


def free_bytes(path: Path) -> int:
    """What can still be allocated under `path`: the file system, the machine and the cgroup
    agree.
    """
    found = os.statvfs(path)
    return min(found.f_bavail * found.f_frsize, memory_free_bytes())


def memory_free_bytes() -> int:
    """What the machine and every cgroup above this process would still give."""
    return max(0, min([*_cgroup_free(), *_memory_available(), _UNLIMITED]))


def choose_segment_bytes(size_bytes: int) -> int:
    """A segment of a journal of that size: a power of two, SEGMENTS_WANTED of them where the limits
    allow.
    """
    fitting = (
        1 << max(0, size_bytes // config.SEGMENTS_WANTED).bit_length() - 1 if size_bytes else 0
    )
    return max(config.SEGMENT_BYTES_MIN, min(fitting, config.SEGMENT_BYTES_MAX))


def fit_size(
    path: Path,
    wanted_bytes: int | None,
    segment_bytes: int | None,
    *,
    own_bytes: int | None = None,
) -> int:
    """Bytes of the pool: min(wanted, half of what is free), whole segments; raises when too few
    fit. Of `own_bytes` that are there for the journal alone all may be taken.

    Without `segment_bytes` they are those that choose_segment_bytes gives for what fits, and for
    the size that comes back, too.
    """
    free = free_bytes(path) if own_bytes is None else 2 * own_bytes
    wanted = config.JOURNAL_BYTES_DEFAULT if wanted_bytes is None else wanted_bytes
    room = min(wanted, free // 2)
    size = choose_segment_bytes(room) if segment_bytes is None else segment_bytes
    if size < config.SEGMENT_BYTES_MIN or size % 4096:
        raise JournalRefused(
            f"segment size {size} must be a multiple of 4096 and at least "
            f"{config.SEGMENT_BYTES_MIN}"
        )
    count = room // size
    if count < config.SEGMENT_COUNT_MIN:
        least = config.SEGMENT_COUNT_MIN * size
        raise JournalRefused(
            f"a journal in {path} needs at least {least >> 20} MiB, and may take half of the "
            f"{free >> 20} MiB that are free; wanted were {wanted >> 20} MiB. Give /dev/shm more "
            "room "
            f"(docker run --shm-size), raise --journal-size or name another --journal-dir"
        )
    return count * size


def _unlink_private(path: Path) -> None:
    """Unlink a file of ours; one that is not as we made it was put in its place by somebody."""
    try:
        _private_stat(path)
    except JournalRefused:
        return
    path.unlink()


def _private_stat(path: Path) -> os.stat_result:
    try:
        found = path.lstat()
    except FileNotFoundError as error:
        raise JournalRefused(f"there is no journal at {path}") from error
    except OSError as error:
        raise JournalRefused(f"cannot look at {path}: {error}") from error
    if stat.S_ISLNK(found.st_mode):
        raise JournalRefused(f"{path} is a symbolic link; a journal must be named directly")
    if found.st_uid != os.getuid():
        raise JournalRefused(f"{path} belongs to user {found.st_uid}, not to {os.getuid()}")
    if found.st_mode & _PRIVATE and not stat.S_ISCHR(found.st_mode):
        raise JournalRefused(
            f"{path} has mode {stat.S_IMODE(found.st_mode):04o}: group or world may touch it. "
            f"It holds users' prompts; make it private (chmod go-rwx) or remove it"
        )
    return found


def _memory_available() -> list[int]:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return []
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return [int(line.split()[1]) * 1024]
    return []


def _cgroup_free() -> list[int]:
    """Room under every memory limit from this process's cgroup up to the root; v2, then v1."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        here = root / name.lstrip("/")
        for group in (here, *here.parents):
            rooms += _group_free(group, limit, usage)
            if group == root:
                break
    return rooms


def _group_free(group: Path, limit: str, usage: str) -> list[int]:
    try:
        limit_text = (group / limit).read_text(encoding="ascii").strip()
        if limit_text == "max" or int(limit_text) > _UNLIMITED:
            return []
        return [int(limit_text) - int((group / usage).read_text(encoding="ascii"))]
    except (OSError, ValueError):
        return []  # the root group has no limit file
