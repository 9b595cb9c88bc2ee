"""private_folder.py: a folder is this user's alone, or it is refused as it is.

Invariants: one that is made has mode 0700, whatever the mask; another user's, a link, a file, and one that others may enter are refused in one line that
ends with the advice, and stay as they were; a lock is free only where that could be asked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib

import pytest

from concordia.errors import EnvironmentRefused
from concordia.private_folder import check_private, is_locked, make_private

ADVICE = "name another"


def test_folder_is_private_when_it_is_made_or_found(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "a" / "b"
    mask = os.umask(0)
    try:
        make_private(folder, ADVICE)
    finally:
        os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o700
    make_private(folder, ADVICE)
    check_private(folder, ADVICE)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o710, 0o702])
def test_folder_is_refused_when_others_may_enter(tmp_path: pathlib.Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    for wanted in (make_private, check_private):
        with pytest.raises(EnvironmentRefused, match=r"^\S+ must be a folder that only this user may enter; name another$"):
            wanted(folder, ADVICE)
    assert folder.stat().st_mode & 0o777 == mode


def test_folder_is_refused_when_it_is_another_users_a_link_a_file_or_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, link, file = tmp_path / "mine", tmp_path / "link", tmp_path / "file"
    folder.mkdir(mode=0o700)
    link.symlink_to(folder)
    file.touch(mode=0o600)
    for wanted in (make_private, check_private):
        with pytest.raises(EnvironmentRefused, match="only this user"):
            wanted(link, ADVICE)
    for refused in (lambda: make_private(file, ADVICE), lambda: make_private(file / "below", ADVICE), lambda: check_private(tmp_path / "none", ADVICE)):
        with pytest.raises(EnvironmentRefused, match=r"^no folder .*; name another$"):
            refused()
    with pytest.raises(EnvironmentRefused, match="only this user"):
        check_private(file, ADVICE)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(EnvironmentRefused, match="only this user"):
        make_private(folder, ADVICE)


def test_lock_is_held_when_its_owner_lives_and_free_when_it_has_gone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    assert not is_locked(path / "below")
    with path.open("w") as file:
        assert not is_locked(path)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_locked(path)
        assert not is_locked(path / "below")
    assert not is_locked(path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EWOULDBLOCK])
def test_lock_is_held_when_the_system_has_no_answer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = tmp_path / "lock"
    path.touch()

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert is_locked(path)
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.undo()
    monkeypatch.setattr(os, "open", refuse)
    assert is_locked(path)
