"""Mappings: files and anonymous memory.

Invariants: bytes written through one mapping are read through another; a file has all its blocks and is private; a size that is not there is
refused; memory goes with `close` and never before.
"""

import ctypes
import gc
from pathlib import Path

import numpy as np
import pytest

from concordia.device.memory import Buffer, SharedFile
from concordia.errors import EnvironmentRefused


def test_bytes_are_shared_when_a_file_is_mapped_twice(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    written = SharedFile.create(path, 8192)
    written.view[4000:4003] = b"abc"
    read = SharedFile.open(path)
    assert bytes(read.view[4000:4003]) == ctypes.string_at(read.address + 4000, 3) == b"abc"
    assert read.view.readonly
    assert (path.stat().st_mode & 0o777, path.stat().st_blocks * 512 >= 8192) == (0o600, True)
    also = SharedFile.open(path, 4096, writable=True)
    also.view[0] = 7
    assert written.view[0] == 7
    assert also.size == len(also.view) == 4096
    for mapping in (written, read, also):
        mapping.close()
        mapping.close()


def test_file_is_refused_when_it_is_too_small_or_there_is_no_room(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    SharedFile.create(path, 4096).close()
    with pytest.raises(EnvironmentRefused, match="8192 are wanted"):
        SharedFile.open(path, 8192)
    with pytest.raises(EnvironmentRefused, match="no room"):
        SharedFile.create(tmp_path / "huge", 1 << 60)
    assert not (tmp_path / "huge").exists()
    with pytest.raises(FileExistsError):
        SharedFile.create(path, 4096)


def test_memory_stays_when_its_owner_is_forgotten() -> None:
    buffer = Buffer(100)
    assert (len(buffer.view), bytes(buffer.view)) == (100, bytes(100))
    address = buffer.address
    ctypes.memmove(address, b"still here", 10)
    del buffer
    gc.collect()
    assert ctypes.string_at(address, 10) == b"still here"


def test_memory_stays_while_a_view_of_it_lives() -> None:
    buffer = Buffer(4096)
    array = np.frombuffer(buffer.view, np.uint8)
    buffer.close()
    assert not array.any()
