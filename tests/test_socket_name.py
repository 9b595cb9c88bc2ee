"""socket_name.py: a socket whose path is longer than an address is bound and found.

Invariants: the name is short whatever the path is, and means the same socket; no descriptor is left; a folder that is not there is an OSError.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from concordia.socket_name import short_name


def test_socket_is_bound_and_found_when_its_path_is_longer_than_an_address(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 30) / "one.sock"
    path.parent.mkdir()
    before = os.listdir("/proc/self/fd")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        with pytest.raises(OSError, match="too long"):
            listener.bind(str(path))
        with short_name(path) as name:
            listener.bind(name)
        listener.listen(1)
        assert path.is_socket()
        with short_name(path) as name:
            assert len(name) < 108
            caller.connect(name)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_error_is_the_system_s_when_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), short_name(tmp_path / "none" / "one.sock"):
        pass
