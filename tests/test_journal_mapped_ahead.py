"""journal/mapped_ahead.py.

Invariants: all pages of a pool that is there are mapped, and none changes; closing ends it at any time, and may be done twice.
"""

from __future__ import annotations

import mmap
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

from concordia import config
from concordia.device.memory import Mapping
from concordia.journal.mapped_ahead import MappedAhead
from waiting import until

SIZE = 48 << 20


@pytest.fixture
def path() -> Iterator[pathlib.Path]:
    found = pathlib.Path("/dev/shm") / f"concordia-ahead-{os.getpid()}"
    np.arange(SIZE // 8, dtype=np.uint64).tofile(found)
    yield found
    found.unlink()


def read_only(path: pathlib.Path) -> Mapping:
    with path.open("rb") as file:
        return Mapping(mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ), SIZE)


def resident_bytes(mapping: Mapping) -> int:
    """Of this mapping, as the kernel counts it."""
    start = f"{mapping.address:x}-"
    lines = iter(pathlib.Path("/proc/self/smaps").read_text("utf-8").splitlines())
    assert any(line.startswith(start) for line in lines)
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))


def test_every_page_is_mapped_and_none_changed_when_it_is_done(path: pathlib.Path) -> None:
    mapping = read_only(path)
    if not mapping.populate(0, mmap.PAGESIZE):
        pytest.skip("this kernel has no MADV_POPULATE_READ (Linux 5.14)")
    assert resident_bytes(mapping) < SIZE // 2
    ahead = MappedAhead(mapping)
    until(lambda: ahead.is_done)
    assert resident_bytes(mapping) == SIZE
    assert np.array_equal(np.frombuffer(mapping.view, np.uint64), np.arange(SIZE // 8, dtype=np.uint64))
    ahead.close()
    ahead.close()
    mapping.close()


def test_it_ends_when_it_is_closed_before_it_is_done(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "MAP_AHEAD_BYTES", 4096)
    mapping = read_only(path)
    ahead = MappedAhead(mapping)
    ahead.close()
    assert not ahead._thread.is_alive()
    mapping.close()


def test_pages_come_as_they_are_touched_when_the_kernel_cannot(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = read_only(path)
    monkeypatch.setattr(mapping, "populate", lambda offset, size: False)
    ahead = MappedAhead(mapping)
    ahead._thread.join(5)
    assert not ahead.is_done
    assert mapping.view[8] == 1
    ahead.close()
    mapping.close()
