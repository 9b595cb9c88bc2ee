"""A folder that only this user may enter, floor 1.

Owns: the check, making one, and whether who has it lives. Promises: a folder of another user, a
link, or one that group or world may enter is refused and never changed; the error says what to name
instead. Called by whatever keeps sockets, code or programs' data in a folder. What lies in it is
its caller's; the journal, which says more of each wrong one, has a check of its own.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from concordia.errors import EnvironmentRefused


def make_private(folder: Path, advice: str) -> None:
    """Make the folder, or find it. Raises EnvironmentRefused, which ends with the advice."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentRefused(f"no folder {folder}: {error.strerror}; {advice}") from None
    check_private(folder, advice)


def check_private(folder: Path, advice: str) -> None:
    """The same of one that is there."""
    try:
        found = folder.lstat()
    except OSError as error:
        raise EnvironmentRefused(f"no folder {folder}: {error.strerror}; {advice}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise EnvironmentRefused(
            f"{folder} must be a folder that only this user may enter; {advice}"
        )


def is_locked(path: Path) -> bool:
    """Whether a process that lives holds this lock file of a folder. Where that cannot be asked
    (no descriptor, no locks left) it is held: who asks would remove what lives.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
