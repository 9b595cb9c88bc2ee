"""The journal of a server, floor 6.

Owns: the journal's owner, the line to it and the router's own stream, from before the first engine
to after the last. Promises: while it is open somebody keeps an owner alive; at the end the owner is
told to go and seen gone, and what does not go is said; a router whose records cannot be kept serves
without them, loudly. Called by the service. It reads and writes no record.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Callable, Iterator

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.errors import ConcordiaError
from concordia.journal.client import JournalClient
from concordia.journal.place import Place
from concordia.recovery.fault import Fault
from concordia.serving.owner_keeper import OwnerKeeper
from concordia.serving.recorder import Recorder

log = logging.getLogger(__name__)


class Protection:
    """Made by `open`; engines may use the journal while it lasts."""

    def __init__(self, keeper: OwnerKeeper, client: JournalClient) -> None:
        self.client = client
        self._keeper = keeper

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, journal: pathlib.Path, *, size_bytes: int, place: Place | None = None
    ) -> Iterator[Protection]:
        """An owner for this journal, new or adopted, and a line to it. Raises what either says."""
        keeper = OwnerKeeper(journal, size_bytes=size_bytes, place=place)
        try:
            opened = cls(keeper, JournalClient.connect(journal))
        except BaseException:
            keeper.abandon()
            raise
        try:
            yield opened
        finally:
            opened._end()

    @property
    def owner_pid(self) -> int:
        return self._keeper.pid

    def subscribe(self, callback: Callable[[Fault], None]) -> None:
        """Be told when the owner dies, on a thread of the keeper."""
        self._keeper.subscribe(callback)

    @contextlib.contextmanager
    def recorder(self) -> Iterator[Recorder]:
        """What the router writes its records with, in a stream of its own; blocks while that is
        opened.
        """
        with contextlib.ExitStack() as stack:
            appender = None
            try:
                attachment = self.client.open_stream(
                    writer_kind=abi.WRITER_ROUTER,
                    rank=0,
                    world=1,
                    replica=0,
                    layout_hash=0,
                    label="router",
                )
                stack.callback(attachment.close)
                appender = stack.enter_context(Checkpointer.open("host", attachment.target))
            except ConcordiaError as error:
                log.error("the router's own records are not kept: %s", error)
            yield stack.enter_context(Recorder(self.client, appender))

    def _end(self) -> None:
        self._keeper.stop()
        try:
            self.client.shutdown()
        except ConcordiaError as error:
            log.error("the journal's owner did not end: %s", error)
        self.client.close()
        if not self._keeper.collect(timeout_s=config.KILL_S):
            log.error("the journal's owner (%d) still runs", self.owner_pid)
