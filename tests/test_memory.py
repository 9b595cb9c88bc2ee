"""Mappings: files and anonymous memory.

Invariants: bytes written through one mapping are read through another; a file has all its blocks and is private; a size that is not there is
refused; memory goes with `close` and never before; no mapping is in a core dump, and a locked one is locked, or says that it is not.
"""

import ctypes
import gc
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from concordia.device.memory import Buffer, Mapping, SharedFile
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


def flags_of(mapping: Mapping) -> set[str]:
    """What the kernel says of the mapping, in the two letters of /proc/self/smaps."""
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(word, 16) for word in head.split("-"))
            is_ours = first <= mapping.address < last
        elif is_ours and head == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError("the kernel does not know the mapping")


def test_mapping_is_in_no_core_dump_when_it_is_made(tmp_path: Path) -> None:
    made = [Buffer(8192), SharedFile.create(tmp_path / "pool", 8192), SharedFile.open(tmp_path / "pool")]
    for mapping in made:
        assert "dd" in flags_of(mapping)
        mapping.close()


def test_mapping_is_locked_when_the_limit_allows_it(tmp_path: Path) -> None:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < 8192:
        pytest.skip("RLIMIT_MEMLOCK is below 8 KiB")
    mapping = SharedFile.create(tmp_path / "pool", 8192)
    assert mapping.lock()
    assert "lo" in flags_of(mapping)
    mapping.close()


def test_mapping_says_that_it_is_not_locked_when_nothing_may_be() -> None:
    mapping = Buffer(1 << 20)
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        if os.getuid() == 0:
            os.setuid(65534)  # root may lock without a limit
        os._exit(int(mapping.lock()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    mapping.close()
