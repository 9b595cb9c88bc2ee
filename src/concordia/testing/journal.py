"""A small journal without an owner process, for tests of what lies above and inside it.

Owns: `SmallJournal`: pool, board and streams in one process, with Python writers. Promises: files
lie in the folder given and nowhere else; rounds of the owner happen when a test asks for them,
never by time. Called by tests of the journal, restore and tools.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Final

from concordia import abi
from concordia.journal import fence
from concordia.journal.cleaner import Cleaner
from concordia.journal.control import Identity
from concordia.journal.folder import Folder
from concordia.journal.segment import Board, Pool
from concordia.journal.stream_state import Stream
from concordia.journal.streams import Streams
from concordia.journal.survey import survey
from concordia.journal.writer import StreamWriter

_KEY_ENTRY: Final = struct.Struct("<IIQQ")


def key_payload(keys: dict[int, int]) -> bytes:
    """The payload of a KIND_BLOCK_KEY record: block index to key."""
    low = (1 << 64) - 1
    return b"".join(_KEY_ENTRY.pack(index, 0, key & low, key >> 64) for index, key in keys.items())


class SmallJournal:
    """Pool, board, streams and cleaner."""

    def __init__(self, path: Path, *, segments: int = 16, segment_bytes: int = 1 << 16) -> None:
        self.home = Folder(path)
        self.home.make()
        size = segments * segment_bytes
        self.pool = Pool.create(self.home.pool, size=size, segment_bytes=segment_bytes)
        self.board = Board.create(
            self.home.board, segment_bytes=segment_bytes, segment_count=segments
        )
        self.streams = Streams(self.pool, self.board)
        self.streams.free.extend(range(segments))
        self.cleaner = Cleaner(self.streams)

    def __enter__(self) -> SmallJournal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pool.close()
        self.board.close()
        self.home.remove()

    def open(
        self,
        *,
        writer_kind: int = abi.WRITER_RANK,
        rank: int = 0,
        world: int = 1,
        replica: int = 1,
        layout_hash: int = 1,
    ) -> tuple[Stream, StreamWriter]:
        """A stream that this process writes."""
        process = fence.find_process(os.getpid())
        identity = Identity(
            0,
            writer_kind,
            rank,
            world,
            os.getpid(),
            process.start if process else 0,
            replica,
            layout_hash,
        )
        stream = self.streams.open(identity, f"rank {rank} of replica {replica}")
        return stream, self.writer(stream)

    def writer(self, stream: Stream) -> StreamWriter:
        """The Python writer of a stream, at its beginning."""
        return StreamWriter(
            self.pool.view,
            stream.control,
            segment_bytes=self.pool.segment_bytes,
            stream=stream.identity.stream,
        )

    def round(self, *, clean: bool = True) -> None:
        """What an owner does at every poll."""
        self.streams.scan_all()
        self.streams.lend_all()
        if clean:
            self.cleaner.step()

    def adopted(self) -> Streams:
        """The same journal as a new owner finds it; from now on it is the owner."""
        self.streams = Streams(self.pool, self.board)
        self.streams.adopt(survey(self.pool, self.board))
        self.cleaner = Cleaner(self.streams)
        return self.streams
