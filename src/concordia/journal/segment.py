"""The pool of segments and the board of streams: the two shared files of a journal, floor 3.

Owns: creating, attaching and mapping `pool` and `board`, and the words of the board's header.
Promises: a pool is allocated before it is used (a sparse file on tmpfs ends in SIGBUS), kept out of
core dumps, and refused when its size is not what the board says. Called by owner, client, detector
and tools. It does not decide who gets a segment.
"""

from __future__ import annotations

import os
import platform
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from concordia import abi
from concordia.device import numa
from concordia.device.memory import SharedFile
from concordia.errors import Corruption, EnvironmentRefused, JournalRefused
from concordia.journal import folder, record
from concordia.journal.control import Control

_PAGE: Final = 4096
_BOARD_BYTES: Final = _PAGE * (1 + abi.STREAM_CAPACITY)
_BOARD_AT: Final = {name: at // 8 for name, at in abi.BOARD_HEADER.offsets().items()}
_REGISTRATION_WORDS: Final = abi.REGISTRATION.size // 8


class Registration(NamedTuple):
    """A replica whose process session ends with its router."""

    replica: int
    session: int
    session_start: int
    router_pid: int
    router_start: int
    fenced: int


class Pool:
    """All segments of a journal, in one mapped file."""

    def __init__(self, path: Path, *, size: int, segment_bytes: int, writable: bool) -> None:
        self.segment_bytes = segment_bytes
        self.segment_count = size // segment_bytes
        self.mapping = SharedFile.open(path, size, writable=writable)
        self.view = self.mapping.view

    @staticmethod
    def create(
        path: Path,
        *,
        size: int,
        segment_bytes: int,
        at: Path | None = None,
        put: Callable[[int], None] | None = None,
    ) -> Pool:
        """Allocate and map a new pool. With `at` it is that device, or a new file there, and `path`
        becomes a link to it: so a link to a file is always to one that we made. `put` gets the
        address before any page is there.
        """
        if at is None or not at.is_char_device():
            _allocate(at or path, size, put)
        if at is not None:
            path.symlink_to(at)
        _check_pool(path, size)
        try:
            pool = Pool(path, size=size, segment_bytes=segment_bytes, writable=True)
        except (OSError, EnvironmentRefused) as error:
            raise JournalRefused(f"cannot map {size >> 20} MiB of {at or path}: {error}") from error
        for segment in range(pool.segment_count):
            pool.mark_free(segment)  # a device still has what it had before
        return pool

    @staticmethod
    def attach(path: Path, *, size: int, segment_bytes: int, writable: bool = False) -> Pool:
        """Map the pool of a journal that exists."""
        _check_pool(path, size)
        return Pool(path, size=size, segment_bytes=segment_bytes, writable=writable)

    def find_nodes(self) -> list[int]:
        """The memory node of each segment; empty where there is only one, or nobody tells."""
        starts = range(
            self.mapping.address, self.mapping.address + self.mapping.size, self.segment_bytes
        )
        if len(numa.find_nodes()) < 2:
            return []
        try:
            return numa.find_page_nodes(starts)
        except EnvironmentRefused:
            return []

    def start(self, segment: int) -> record.SegmentStart | None:
        """The header of a segment, if it is undamaged."""
        return record.parse_segment(self.view, segment, self.segment_bytes)

    def is_marked_free(self, segment: int) -> bool:
        """Whether the owner has taken the segment back since its header was written."""
        at = segment * self.segment_bytes
        return self.view[at : at + 8] == bytes(8)

    def mark_free(self, segment: int) -> None:
        """Clear the magic, so that an owner to come does not take old records for present ones."""
        at = segment * self.segment_bytes
        self.view[at : at + 8].cast("Q")[0] = 0

    def close(self) -> None:
        """Give the mapping back."""
        self.mapping.close()


class Board:
    """The header and all stream controls of a journal, in one mapped file."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.mapping = SharedFile.open(path, _BOARD_BYTES, writable=writable)
        self._words = self.mapping.view[:_PAGE].cast("Q")
        body = np.frombuffer(self.mapping.view, np.uint8)[_PAGE:]
        self.controls: npt.NDArray[np.void] = body.view(abi.STREAM_CONTROL.dtype)
        self._slots = [self._control(slot) for slot in range(abi.STREAM_CAPACITY)]

    @staticmethod
    def create(path: Path, *, segment_bytes: int, segment_count: int) -> Board:
        """A new board without streams."""
        if platform.machine() not in {"x86_64", "AMD64"}:
            raise EnvironmentRefused(
                f"the journal's owner relies on x86-64, not {platform.machine()}"
            )
        _allocate(path, _BOARD_BYTES)
        board = Board(path, writable=True)
        words = board._words
        words[_BOARD_AT["segment_bytes"]] = segment_bytes
        words[_BOARD_AT["segment_count"]] = segment_count
        words[1] = abi.ABI_VERSION | abi.STREAM_CAPACITY << 32
        words[0] = abi.BOARD_MAGIC
        return board

    @staticmethod
    def attach(path: Path, *, writable: bool = False) -> Board:
        """Map the board of a journal that exists; refuses another layout."""
        found = folder.check_file(path)
        if found.st_size != _BOARD_BYTES:
            raise Corruption(f"{path} has {found.st_size} bytes, not {_BOARD_BYTES}")
        board = Board(path, writable=writable)
        magic, words = board._words[0], board._words[1]
        if magic != abi.BOARD_MAGIC or words != abi.ABI_VERSION | abi.STREAM_CAPACITY << 32:
            board.close()
            raise JournalRefused(
                f"{path} is no board of ABI {abi.ABI_VERSION} ({magic:#x} {words:#x})"
            )
        return board

    @property
    def segment_bytes(self) -> int:
        return self._words[_BOARD_AT["segment_bytes"]]

    @property
    def segment_count(self) -> int:
        return self._words[_BOARD_AT["segment_count"]]

    @property
    def owner_pid(self) -> int:
        return self._words[_BOARD_AT["owner_pid"]]

    @property
    def owner_epoch(self) -> int:
        return self._words[_BOARD_AT["owner_epoch"]]

    @property
    def owner_heartbeat_ns(self) -> int:
        return self._words[_BOARD_AT["owner_heartbeat_ns"]]

    def take(self) -> int:
        """Owner: become the owner; returns the new epoch."""
        epoch = self.owner_epoch + 1
        self._words[_BOARD_AT["owner_epoch"]] = epoch
        self._words[_BOARD_AT["owner_pid"]] = os.getpid()
        self.beat()
        return epoch

    def beat(self) -> None:
        """Owner: say that we live."""
        self._words[_BOARD_AT["owner_heartbeat_ns"]] = time.monotonic_ns()

    def control(self, slot: int) -> Control:
        """The words of one stream."""
        return self._slots[slot]

    def in_use(self) -> Iterator[Control]:
        """Every slot that an owner gave away and did not take back."""
        return (
            control
            for control in self._slots
            if control.state != abi.STREAM_FREE or control.word("magic")
        )

    def registrations(self) -> dict[int, Registration]:
        """Registered replicas by the index of their entry."""
        found = {}
        for index in range(abi.REPLICA_CAPACITY):
            entry = Registration(*self._words[self._entry(index)])
            if entry.replica:
                found[index] = entry
        return found

    def write_registration(self, index: int, entry: Registration | None) -> None:
        """Owner: store or clear an entry; the replica word is cleared first and written last."""
        span = self._entry(index)
        self._words[span.start] = 0
        if entry is not None:
            for offset, value in enumerate(entry[1:], start=1):
                self._words[span.start + offset] = value
            self._words[span.start] = entry.replica

    def close(self) -> None:
        """Give the mapping back."""
        self.mapping.close()

    def _entry(self, index: int) -> slice:
        at = _BOARD_AT["registered"] + _REGISTRATION_WORDS * index
        return slice(at, at + _REGISTRATION_WORDS)

    def _control(self, slot: int) -> Control:
        at = _PAGE * (1 + slot)
        return Control(self.mapping.view[at : at + _PAGE], slot, self.mapping.address + at)


def attach(home: folder.Folder, *, writable: bool = False) -> tuple[Pool, Board]:
    """Both files of a journal; raises when one is missing, refused or not what the other says."""
    home.check()
    board = Board.attach(home.board, writable=writable)
    size = board.segment_bytes * board.segment_count
    pool = Pool.attach(home.pool, size=size, segment_bytes=board.segment_bytes, writable=writable)
    return pool, board


def _allocate(path: Path, size: int, put: Callable[[int], None] | None = None) -> None:
    try:
        SharedFile.create(path, size, place=put).close()
    except (OSError, EnvironmentRefused) as error:
        raise JournalRefused(f"cannot allocate {size >> 20} MiB for {path}: {error}") from error


def _check_pool(path: Path, size: int) -> None:
    """A private file of exactly `size` bytes, or a device that this process may open."""
    link = path.is_symlink()  # our folder is private, so a link in it was put there by this user
    found = path.stat() if link else folder.check_file(path)
    if stat.S_ISCHR(found.st_mode):
        return
    if link:
        folder.check_file(path.resolve())
    if size == 0 or found.st_size != size:
        raise Corruption(f"{path} has {found.st_size} bytes; the board says {size}")
