"""A process's line to the owner of a journal, floor 3.

Owns: one connection, and the mappings of the streams opened through it. Promises: thread-safe;
every wait has a bound; a broken line is mended once per request (the owner may have been restarted:
streams and mappings stay valid); every request may be repeated without harm. Called by router,
replica, connector and tools. It does not start owners: owner.spawn_owner does.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from concordia import config
from concordia.device.memory import JournalTarget
from concordia.errors import JournalError, JournalRefused, WaitTimeout
from concordia.journal import segment
from concordia.journal.checkpoints import Checkpoint
from concordia.journal.coverage import Cut, Piece
from concordia.journal.desk import Line
from concordia.journal.folder import Folder
from concordia.journal.key_changes import KeyNews
from concordia.journal.segment import Board, Pool

__all__ = ["Checkpoint", "Cut", "JournalClient", "Piece", "StreamAttachment"]


class StreamAttachment:
    """A stream that this process writes, and the memory that its executor needs for it."""

    def __init__(
        self,
        client: JournalClient,
        slot: int,
        stream: int,
        pool: Pool,
        board: Board,
        *,
        node: int | None = None,
    ) -> None:
        self.slot = slot
        self.stream = stream
        self.pool = pool
        self.board = board
        self.target = JournalTarget(
            pool_address=pool.mapping.address,
            pool_bytes=pool.mapping.size,
            segment_bytes=pool.segment_bytes,
            control_address=board.control(slot).address,
            node=node,
        )
        self._client = client

    def close(self) -> None:
        """Say that nothing more will be written; call it when the executor is closed, not
        before.
        """
        self._client.close_stream(self)


class JournalClient:
    """Requests to the owner."""

    def __init__(self, journal: Path, *, timeout_s: float) -> None:
        self.journal = journal
        self._home = Folder(journal)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._line: Line | None = None
        self._mapped: tuple[Pool, Board] | None = None
        self._attached: set[StreamAttachment] = set()  # their executors write through our mappings
        self._is_closed = False
        self._pid = os.getpid()

    @classmethod
    def connect(cls, journal: Path, *, timeout_s: float = 5.0) -> JournalClient:
        """A line to the living owner; raises JournalRefused when there is none within the bound."""
        client = cls(journal, timeout_s=timeout_s)
        client._home.check()
        with client._lock:
            client._line = client._dial()
        return client

    def __enter__(self) -> JournalClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up and unmap; streams that were opened keep the mappings and stay open until
        closed.
        """
        with self._lock:
            self._is_closed = True
            self._let_go()

    # --- writers

    def open_stream(
        self,
        *,
        writer_kind: int,
        rank: int,
        world: int,
        replica: int,
        layout_hash: int,
        label: str,
        node: int | None = None,
        is_sole: bool = False,
    ) -> StreamAttachment:
        """A stream of this process's own, with segments near the memory `node` where there are
        several; raises JournalError when the replica was sealed, and with `is_sole` while another
        stream of this label (at most LINE_BYTES of UTF-8) is open.
        """
        answer = self._ask(
            "open_stream",
            nonce=secrets.token_hex(16),
            writer_kind=writer_kind,
            rank=rank,
            world=world,
            replica=replica,
            layout_hash=layout_hash,
            label=label,
            node=node,
            is_sole=is_sole,
        )
        pool, board = self.map(writable=True)
        attachment = StreamAttachment(
            self, answer["slot"], answer["stream"], pool, board, node=answer["node"]
        )
        with self._lock:
            self._attached.add(attachment)
        return attachment

    def close_stream(self, attachment: StreamAttachment) -> None:
        """The writer has ended; what it committed stays."""
        try:
            self._ask("close_stream", slot=attachment.slot, stream=attachment.stream)
        finally:
            with self._lock:
                self._attached.discard(attachment)
                if self._is_closed:
                    self._let_go()

    def map(self, *, writable: bool = False) -> tuple[Pool, Board]:
        """Pool and board in this process: for writers, and for whoever restores from pool
        offsets.
        """
        with self._lock:
            if self._mapped is None:
                self._mapped = segment.attach(self._home, writable=True)
            return self._mapped

    # --- replicas

    def register_replica(self, replica: int, *, session_id: int) -> None:
        """When this process ends, the owner seals the replica and kills its session."""
        self._ask("register_replica", replica=replica, session_id=session_id)

    def release_replica(self, replica: int) -> bool:
        """The replica's processes have ended. True when the owner sees that too; else it sees to
        it.
        """
        return bool(self._ask("release_replica", replica=replica))

    def seal_replica(self, replica: int) -> dict[int, int]:
        """Nothing beyond this point will be read of the replica: stream to number of records."""
        answer: dict[str, int] = self._ask("seal_replica", replica=replica)
        return {int(stream): count for stream, count in answer.items()}

    # --- what is there

    def cut(
        self,
        key: int,
        *,
        tokens_known: int,
        layout_hash: int,
        world: int,
        bounds: Mapping[int, int] | None = None,
    ) -> Cut:
        """What may be restored of a request, from sealed streams; at most tokens_known - 1 tokens.

        `bounds`: router incarnation to the tokens that were known when it was superseded, that is
        when the next router incarnation was submitted. What an incarnation computed beyond its
        bound, or beyond that of a later one, is not used. Without them only what the records prove
        is used of older ones; Cuts.longest has the rule.
        """
        return Cut.from_json(
            self._ask(
                "cut",
                key=key,
                tokens_known=tokens_known,
                layout_hash=layout_hash,
                world=world,
                bounds={str(incarnation): tokens for incarnation, tokens in (bounds or {}).items()},
            )
        )

    def checkpoint(self, key: int, *, rank: int = 0) -> Checkpoint:
        """The newest complete checkpoint of a series of page regions."""
        return Checkpoint.from_json(self._ask("checkpoint", key=key, rank=rank))

    def match_prefix(self, keys: Sequence[int], *, layout_hash: int, world: int) -> Cut:
        """The longest run of these blocks that every rank has, of whatever request."""
        return Cut.from_json(
            self._ask("match_prefix", keys=list(keys), layout_hash=layout_hash, world=world)
        )

    def key_news(self, *, layout_hash: int, world: int, after: int = 0) -> KeyNews:
        """Keys of blocks that every rank has: what changed of them since an answer with this
        cursor; all of them for 0, or when the owner does not know any more.
        """
        return KeyNews.from_json(
            self._ask("key_news", layout_hash=layout_hash, world=world, after=after)
        )

    def committed(self, key: int) -> int:
        """Tokens that every rank has committed of the newest incarnation."""
        return int(self._ask("committed", key=key))

    def committed_all(self, keys: Sequence[int]) -> list[int]:
        """The same of many requests, in one question."""
        return [int(count) for count in self._ask("committed_all", keys=list(keys))]

    def finish(self, key: int) -> None:
        """The request has ended."""
        self._ask("finish", key=key)

    def events(self, after: int = 0) -> tuple[int, list[dict[str, Any]]]:
        """Events since a cursor, and the next cursor. After an owner's restart all come again."""
        cursor, found = self._ask("events", after=after)
        return cursor, found

    def stats(self) -> dict[str, Any]:
        """Counters of the owner and its streams."""
        return dict(self._ask("stats"))

    def shutdown(self) -> None:
        """The owner removes the journal and ends."""
        self._ask("shutdown")

    # --- helpers

    def _ask(self, operation: str, **arguments: Any) -> Any:
        if os.getpid() != self._pid:
            raise JournalError("a line to the owner does not survive fork; connect again")
        with self._lock:
            for attempt in range(2):
                if self._line is None:
                    self._line = self._dial()
                try:
                    return self._line.ask(operation, arguments)
                except TimeoutError as error:
                    self._hang_up()
                    raise WaitTimeout(
                        f"the owner of {self.journal} did not answer {operation} in "
                        f"{self._timeout_s} s"
                    ) from error
                except OSError as error:
                    self._hang_up()
                    if attempt:
                        raise JournalError(
                            f"the owner of {self.journal} broke off during {operation}: {error}"
                        ) from error
        raise AssertionError("the loop returns or raises")

    def _let_go(self) -> None:
        self._hang_up()
        if self._mapped is not None and not self._attached:
            for mapped in self._mapped:
                mapped.close()
            self._mapped = None

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def _dial(self) -> Line:
        """Connect, again and again until the bound: a new owner may be about to listen."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                return Line(self._home.socket, self._timeout_s)
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise JournalRefused(
                        f"no owner answers for the journal {self.journal}: {error}"
                    ) from error
            threading.Event().wait(config.OWNER_POLL_S)
