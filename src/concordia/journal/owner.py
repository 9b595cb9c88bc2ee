"""The owner: a small process that owns segments and seals, and outlives router and engines, floor
3.

Owns: the lock of a journal and its loop. Promises: one owner per journal (flock); with nobody
attached for `linger_s` it removes every file and ends; no round of the loop waits for anybody. What
it starts with says estate.py. Run as `python -m concordia.journal.owner` by spawn.spawn_owner. It
never touches CUDA and never reads KV, except to copy records when it cleans.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

from concordia import config
from concordia.errors import ConcordiaError, JournalError
from concordia.journal import fence, privacy
from concordia.journal.cleaner import Cleaner
from concordia.journal.desk import Desk
from concordia.journal.estate import take
from concordia.journal.folder import Folder
from concordia.journal.office import Office
from concordia.journal.owner_log import log_to, say
from concordia.journal.place import Place
from concordia.journal.replicas import Replicas
from concordia.journal.segment import Board, Pool
from concordia.journal.spawn import spawn_owner
from concordia.journal.streams import Streams
from concordia.journal.survey import Survey

__all__ = ["Owner", "spawn_owner"]

_SLOW_ROUND_S: Final = 1.0  # what need not happen at every poll


class Owner:
    """Everything of one journal, and the loop that keeps it going."""

    def __init__(
        self,
        home: Folder,
        pool: Pool,
        board: Board,
        *,
        linger_s: float,
        node: int | None = None,
    ) -> None:
        self.is_stopping = False
        self.node = node  # that the pool promised to lie on, for writers to check
        self.is_locked = privacy.lock(pool.mapping)
        self._home = home
        self._linger_s = linger_s
        self._idle_since = time.monotonic()
        self._slow_at = 0.0
        self._clean_error = ""  # the last that was said, so that it is said once
        self._selector = selectors.DefaultSelector()
        self._watched: dict[tuple[int, int], int] = {}  # pid and start: pidfd
        self.streams = Streams(pool, board)
        self.cleaner = Cleaner(self.streams)
        self.replicas = Replicas(self.streams)
        self.office = Office(self)

    def listen(self) -> None:
        """Begin to answer."""
        self.desk = Desk(self._selector, self._home.socket, self.office.answer)

    def adopt(self, found: Survey) -> None:
        """Go on with a journal whose owner died."""
        self.streams.adopt(found)
        for stream in list(self.streams.by_slot.values()):
            identity = stream.identity
            if not stream.is_released:
                self.watch(identity.writer_pid, identity.writer_start)
        for pid, start in self.replicas.routers():
            self.watch(pid, start)
        released = self.replicas.release_fenced()
        if released:
            say(f"goes on to end the sealed replicas {released}")

    def watch(self, pid: int, start: int) -> None:
        """Learn of the end of this process; at once when it is over already."""
        if (pid, start) in self._watched:
            return
        descriptor = fence.open_process(pid, start)
        if descriptor is None:
            self._process_ended(pid, start)
            return
        self._watched[pid, start] = descriptor

        def ended(_mask: int) -> None:
            self._selector.unregister(descriptor)
            os.close(self._watched.pop((pid, start)))
            self._process_ended(pid, start)

        self._selector.register(descriptor, selectors.EVENT_READ, ended)

    def run(self) -> None:
        """Until nobody is attached for the time of linger, or somebody says stop."""
        while not self.is_stopping:
            for key, mask in self._selector.select(self._pause_s()):
                key.data(mask)
            self.round()

    def round(self) -> None:
        """What has to happen now; every part of it is bounded."""
        now = time.monotonic()
        self.streams.board.beat()
        self.streams.scan_all()
        self.streams.index.settle(now)
        self.streams.lend_all()
        self._clean()
        self.replicas.step()
        if now >= self._slow_at:
            self._slow_at = now + _SLOW_ROUND_S
            self.streams.index.successions.drop_superseded()
            self.streams.give_back_empty()
            self.streams.calm()
            self._unwatch()
            if self._is_attached():
                self._idle_since = now
            elif now - self._idle_since >= self._linger_s:
                self.is_stopping = True

    def close(self) -> None:
        """Remove everything; who still has the files mapped keeps only memory without a name."""
        self.desk.close()
        self._home.clear()

    def _clean(self) -> None:
        """Whatever keeps the cleaner from its work, streams must be read and lent to all the
        same.
        """
        free = len(self.streams.free)
        try:
            self.cleaner.step()
            if len(self.streams.free) > free:
                self.streams.lend_all()  # who writes 40 GB/s has no time for another round
        except ConcordiaError as error:
            if str(error) != self._clean_error:
                self._clean_error = str(error)
                say(f"the cleaner could not go on: {error}")
                self.streams.index.events.note(
                    {"event": "full", "stream": "cleaner", "reason": str(error)}
                )

    def _pause_s(self) -> float:
        open_count = sum(not stream.is_sealed for stream in self.streams.by_slot.values())
        return config.OWNER_POLL_S if open_count or self.replicas.is_fencing else 0.1

    def _unwatch(self) -> None:
        """A process that closed its streams and has no replica need not be waited for."""
        needed = self.replicas.routers()
        for stream in self.streams.by_slot.values():
            if not stream.is_released:
                needed.add((stream.identity.writer_pid, stream.identity.writer_start))
        for name in self._watched.keys() - needed:
            descriptor = self._watched.pop(name)
            self._selector.unregister(descriptor)
            os.close(descriptor)

    def _is_attached(self) -> bool:
        return bool(self.desk.peers or self._watched or self.replicas.is_fencing)

    def _process_ended(self, pid: int, start: int) -> None:
        """A writer or a router is gone."""
        for stream in list(self.streams.by_slot.values()):
            identity = stream.identity
            if (identity.writer_pid, identity.writer_start) == (pid, start):
                self.streams.seal(stream)
                if not self.replicas.is_registered(identity.replica):
                    self.streams.release(stream)
        orphans = self.replicas.router_died(pid, start, now=time.monotonic())
        if orphans:
            say(f"router {pid} died: sealed and ended replicas {orphans}")


def main(arguments: list[str]) -> int:
    """`python -m concordia.journal.owner JOURNAL READY_FD SETTINGS`: become the owner."""
    journal, ready, settings = Path(arguments[0]), int(arguments[1]), json.loads(arguments[2])
    if os.fork():
        os._exit(0)  # so that no parent has to collect us, and no parent's end reaches us
    os.setsid()
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    home = Folder(journal)
    try:
        lock = _lock(home)
        log_to(home)
        owner = _begin(home, settings)
        if not owner.is_locked and privacy.has_swap():
            say(
                "the journal cannot be locked and may be swapped to disk: raise the memlock "
                "limit (ulimit -l)"
            )
        owner.listen()
    except ConcordiaError as error:
        _answer(ready, {"error": type(error).__name__, "message": str(error)})
        return error.exit_code
    signal.signal(signal.SIGTERM, lambda *_: setattr(owner, "is_stopping", True))
    _answer(ready, {"pid": os.getpid()})
    owner.run()
    owner.close()
    home.remove()
    os.close(lock)
    return 0


def _begin(home: Folder, settings: dict[str, Any]) -> Owner:
    """With a new journal, or with the one that is there."""
    place = Place.of(settings)
    estate = take(home, settings, place)
    pool, linger_s = estate.pool, float(settings["linger_s"])
    owner = Owner(home, pool, estate.board, linger_s=linger_s, node=place.node)
    if estate.found is None:
        owner.streams.free.extend(range(pool.segment_count))
    else:
        owner.adopt(estate.found)
    if estate.reclaimed is not None:
        owner.streams.index.events.note(estate.reclaimed)
    return owner


def _lock(home: Folder) -> int:
    home.check()
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(10):
        descriptor = os.open(home.lock, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise JournalError(f"another owner has {home.path}") from error
        try:
            if os.fstat(descriptor).st_ino == home.lock.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass  # the owner before us removed it between our open and our lock
        os.close(descriptor)
    raise JournalError(f"the lock of {home.path} keeps changing")


def _answer(ready: int, value: dict[str, Any]) -> None:
    try:
        os.write(ready, json.dumps(value).encode() + b"\n")
    except BrokenPipeError:
        say("who started us did not wait")
    os.close(ready)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
