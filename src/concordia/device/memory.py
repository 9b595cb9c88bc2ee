"""Memory that outlives a process or that two sides see, floor 2.

Owns: mapped files and anonymous buffers, with addresses. Promises: a mapping of a file has all its
pages from the start; every mapping keeps out of core dumps, and out of swap where `lock` says so;
nothing is unmapped but by `close`, so that a thread or a kernel that still runs never loses its
memory to garbage collection. Called by runtime/, checkpoint/, journal/. Does not know what lies in
the bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from concordia import abi
from concordia.errors import EnvironmentRefused, JournalRefused

PAGE_BYTES: Final = mmap.PAGESIZE
_MADV_POPULATE_READ: Final = 22  # of Linux 5.14; Python's mmap does not name them
_MADV_POPULATE_WRITE: Final = 23


@dataclass(frozen=True, slots=True)
class JournalTarget:
    """What an executor needs of the journal: addresses of this process's mappings of the pool and
    of one StreamControl.
    """

    pool_address: int
    pool_bytes: int
    segment_bytes: int
    control_address: int
    node: int | None = None  # where the pool's pages must lie once they are registered

    def check(self) -> None:
        """Refuse a stream that cannot be written: an executor trusts these numbers."""
        if (
            self.segment_bytes < abi.LEAF_BYTES
            or self.segment_bytes % abi.LEAF_BYTES
            or self.pool_bytes < self.segment_bytes
        ):
            raise JournalRefused(
                f"pool and segment of {(self.pool_bytes, self.segment_bytes)} bytes: segments are "
                "whole leaves, and at least one fits the pool"
            )
        if self.pool_address % abi.LINE_BYTES or self.control_address % abi.LINE_BYTES:
            raise JournalRefused("pool and control page must start on a line")


class Mapping:
    """Bytes with an address, mapped until `close`."""

    def __init__(self, mapped: mmap.mmap, size: int) -> None:
        # contents are users' prompts, and what was computed of them
        mapped.madvise(mmap.MADV_DONTDUMP)
        self._mapped = mapped
        self.size = size
        self.view = memoryview(mapped)[:size]
        self.address = int(np.frombuffer(self.view, dtype=np.uint8).ctypes.data)
        # Without this, unreachable would mean unmapped, under a thread that Python does not know.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapped))
        self._is_open = True

    def lock(self) -> bool:
        """Keep every page out of swap for as long as this process has the mapping; False where that
        is not allowed.
        """
        done: int = ctypes.CDLL(None).mlock(
            ctypes.c_void_p(self.address), ctypes.c_size_t(self.size)
        )
        return done == 0

    def populate(self, offset: int, size: int) -> bool:
        """Map pages that are there now, so that nobody faults on them later, outside the
        interpreter's lock; False where the kernel cannot.
        """
        done: int = ctypes.CDLL(None).madvise(
            ctypes.c_void_p(self.address + offset),
            ctypes.c_size_t(min(size, self.size - offset)),
            _MADV_POPULATE_READ,
        )
        return done == 0

    def close(self) -> None:
        """Unmap; where somebody still holds a view of it, the mapping goes with the last view."""
        if not self._is_open:
            return
        self._is_open = False
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(self._mapped))
        try:
            self.view.release()
            self._mapped.close()
        except BufferError:
            return


class Buffer(Mapping):
    """Anonymous zeroed memory of this process."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        super().__init__(mmap.mmap(-1, _whole_pages(size), flags=flags), size)


class SharedFile(Mapping):
    """A file mapped by several processes."""

    @classmethod
    def create(
        cls, path: Path, size: int, *, place: Callable[[int], None] | None = None
    ) -> SharedFile:
        """Make the file, private to this user, with all its blocks allocated: a sparse one ends in
        SIGBUS when memory runs out. `place` gets the address before any page is there.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            room = os.fstatvfs(descriptor)
            # before memory is filled with it in vain; hugetlbfs has no blocks and says so later
            if room.f_blocks and size > room.f_bavail * room.f_frsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(descriptor, size)
            _populate(descriptor, size, place)
            os.posix_fallocate(descriptor, 0, size)
            return cls._of(descriptor, size, is_writable=True)
        except EnvironmentRefused:  # of its place
            os.unlink(path)
            raise
        except OSError as error:
            os.unlink(path)
            raise EnvironmentRefused(f"no room for {size} bytes at {path}: {error}") from error
        finally:
            os.close(descriptor)

    @classmethod
    def open(cls, path: Path, size: int | None = None, *, writable: bool = False) -> SharedFile:
        """Map an existing file; `size` is what it must have at least."""
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            state = os.fstat(descriptor)
            # A device (devdax) has no size of its own: mmap refuses what it cannot hold.
            found = size or 0 if stat.S_ISCHR(state.st_mode) else state.st_size
            wanted = found if size is None else size
            if found < wanted or wanted == 0:
                raise EnvironmentRefused(f"{path} has {found} bytes, {wanted} are wanted")
            return cls._of(descriptor, wanted, is_writable=writable)
        finally:
            os.close(descriptor)

    @classmethod
    def _of(cls, descriptor: int, size: int, *, is_writable: bool) -> SharedFile:
        rights = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=rights)
        return cls(mapped, size)


def _populate(descriptor: int, size: int, place: Callable[[int], None] | None) -> None:
    """Let pages come where they shall, and as huge ones where the file system offers them: of those
    a GiB is mapped in 5 ms, of small ones in 60, by every process anew. Whatever is refused here
    is left to the allocation that follows, which says why.
    """
    with mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED) as mapped:
        held = np.frombuffer(mapped, np.uint8)
        address = int(held.ctypes.data)
        del held  # or the mapping could not be closed
        if place is not None:
            place(address)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_POPULATE_WRITE
        )


def _whole_pages(size: int) -> int:
    return (size + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
