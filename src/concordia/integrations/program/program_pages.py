"""What the shim and the agent see both: board, stage and log of reads, floor 7.

Owns: these files, in the form of native/protect.h and native/reads.c. Promises: what is made here
is private to the user; a post is read only after its number,
and answered only once; whatever the shim wrote is bounded before it is used. Called by
protection.py, which makes them, and agent.py. It does not say what the bytes mean.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt

from concordia import config
from concordia.device.memory import Mapping
from concordia.errors import Corruption, EnvironmentRefused

MARK_BYTES: Final = 1 << 16  # of a page that is marked, as native/protect.h has it
BOARD_MAGIC: Final = 0x4452414F42434E43
READS_MAGIC: Final = 0x5344414552434E43
BOARD_VERSION: Final = 1
READS_VERSION: Final = 1
READS_HEADER_BYTES: Final = 4096

_REGIONS_AT: Final = 4096
_MARKS_AT: Final = _REGIONS_AT + 128 * config.PROGRAM_REGIONS_MAX
_WORDS: Final = (
    *("posted", "taken", "lost", "word", "ordinal", "reads_bytes", "digest", "generation"),
    *("region_count", "is_audited", "points", "fired", "coalesced", "swallowed", "answered"),
    *("missed_pages", "audits", "unjoined"),
)
HEADER: Final = np.dtype(
    [
        *(("magic", "<u8"), ("version", "<u4"), ("owner", "<u4")),
        *((name, "<u8") for name in _WORDS),
        *(("reserved", "<u8", (12,)), ("reason", "S256")),
    ]
)
REGION: Final = np.dtype(
    [
        *(("name", "S64"), ("bytes", "<u8"), ("stage_offset", "<u8"), ("pages", "<u8")),
        *(("pages_marked", "<u8"), ("posts", "<u8"), ("address", "<u8")),
        ("reserved", "<u8", (2,)),
    ]
)
assert HEADER.fields is not None
assert HEADER.fields["reason"][1] == 256
assert REGION.itemsize == 128


@dataclass(frozen=True, slots=True)
class StagedRegion:
    """One region of a post."""

    name: str
    bytes: int
    stage_offset: int
    pages: int  # of MARK_BYTES
    pages_marked: int  # in all posts so far
    posts: int
    address: int


@dataclass(frozen=True, slots=True)
class Post:
    """A point of the program, whose bytes lie in the stage until it is answered."""

    number: int
    ordinal: int
    digest: int
    reads_bytes: int
    generation: int
    regions: tuple[StagedRegion, ...]

    @property
    def used_bytes(self) -> int:
        """Of the stage."""
        ends = (one.stage_offset + one.pages * MARK_BYTES for one in self.regions)
        return max(ends, default=0)


class Board:
    """The page of words, and the marks behind it."""

    def __init__(self, path: Path, stage_bytes: int) -> None:
        self.stage_bytes = stage_bytes
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _MARKS_AT + -(-stage_bytes // MARK_BYTES))
        self._header = np.frombuffer(self._map, HEADER, 1)
        self._rows = np.frombuffer(self._map, REGION, config.PROGRAM_REGIONS_MAX, _REGIONS_AT)
        self.marks: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, offset=_MARKS_AT)

    @staticmethod
    def create(path: Path, stage_bytes: int) -> None:
        """Empty, for a shim to claim."""
        header = np.zeros(1, HEADER)
        header["magic"], header["version"] = BOARD_MAGIC, BOARD_VERSION
        _make(path, _MARKS_AT + -(-stage_bytes // MARK_BYTES), header.tobytes())

    def word(self, name: str) -> int:
        """One of them, as it is now."""
        return int(self._header[name][0])

    @property
    def reason(self) -> str:
        """Why protection ended; empty while it has not."""
        said = self._header["reason"][0].decode(errors="replace") if self.word("lost") else ""
        return str(said)

    def post(self) -> Post | None:
        """The one that waits for an answer. Raises Corruption for what cannot be one."""
        number = self.word("posted")
        if number == self.word("taken"):
            return None
        count = self.word("region_count")
        if count > config.PROGRAM_REGIONS_MAX:
            raise Corruption(f"the program's board says {count} regions")
        rows = [self._region(self._rows[i]) for i in range(count)]
        return Post(
            number,
            ordinal=self.word("ordinal"),
            digest=self.word("digest"),
            reads_bytes=self.word("reads_bytes"),
            generation=self.word("generation"),
            regions=tuple(rows),
        )

    def regions(self) -> tuple[StagedRegion, ...]:
        """Those of the newest post."""
        count = min(self.word("region_count"), config.PROGRAM_REGIONS_MAX)
        return tuple(self._region(self._rows[i]) for i in range(count))

    def answer(self, post: Post) -> None:
        """The stage may change again."""
        self._header["taken"][0] = post.number

    def lose(self, reason: str) -> None:
        """Protection is over: the shim lets go of what it holds."""
        self._header["reason"][0] = reason.encode()[:255]
        self._header["lost"][0] = 1

    def close(self) -> None:
        """Unmapped once nothing looks at it."""
        del self._header, self._rows, self.marks
        self._map.close()

    def _region(self, row: Any) -> StagedRegion:
        found = StagedRegion(
            row["name"].decode(errors="replace"),
            *(int(row[name]) for name in ("bytes", "stage_offset", "pages")),
            *(int(row[name]) for name in ("pages_marked", "posts", "address")),
        )
        end = found.stage_offset + found.pages * MARK_BYTES
        if end > self.stage_bytes or found.bytes > found.pages * MARK_BYTES:
            raise Corruption(f"region {found.name} of the program's board leaves its stage")
        return found


def create_stage(path: Path, size: int) -> None:
    """Empty: the shim takes room for a region before it is used, so that a full file system is an
    error there and not the end of the program.
    """
    _make(path, size, b"", room=0)


def map_stage(path: Path, size: int) -> Mapping:
    """The stage as an executor on the host reads it."""
    with open(path, "r+b") as file:
        return Mapping(mmap.mmap(file.fileno(), size), size)


def create_reads(path: Path, size: int, *, of: Path | None = None, end: int = 0) -> None:
    """A log of reads: empty, or with what another, which may be the one that lies there, has below
    `end`. It is a new file in any case: a program of before may still write to its own.
    """
    start = np.array([READS_MAGIC, READS_VERSION], "<u8").tobytes()
    if of is not None:
        with open(of, "rb") as file:
            start = file.read(end)
    staged = path.with_name(f"{path.name}.new")
    staged.unlink(missing_ok=True)
    _make(staged, max(READS_HEADER_BYTES + size, end), start)
    staged.replace(path)


class Reads:
    """A log of reads, and the CRC32C of its beginning, which only grows."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._end, self._crc = READS_HEADER_BYTES, 0

    def crc_until(self, end: int) -> int:
        """Of everything below `end`; raises Corruption when it is not there."""
        if not self._end <= end <= len(self._map):
            raise Corruption(f"the log of reads has {len(self._map)} bytes, not {end}")
        while self._end < end:
            part = self._map[self._end : min(end, self._end + (1 << 20))]
            self._crc = google_crc32c.extend(self._crc, part)
            self._end += len(part)
        return self._crc

    def close(self) -> None:
        """Unmap it."""
        self._map.close()


def _make(path: Path, size: int, start: bytes, *, room: int | None = None) -> None:
    """A private file; `room` is what of it is allocated, by default all: whoever maps it may write
    it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
        if room is None:
            os.posix_fallocate(descriptor, 0, size)
        os.pwrite(descriptor, start, 0)
    except OSError as error:
        raise EnvironmentRefused(f"no room for {size} bytes at {path}: {error}") from error
    finally:
        os.close(descriptor)
