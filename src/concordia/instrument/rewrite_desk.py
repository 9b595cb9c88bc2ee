"""Who asks for which image, and who waits for it, floor 3.

Owns: the queue and the waiting programs; the listener is a launcher's, or its own where nobody
handed it one (rewriter_socket). Promises: only this user is served; every request is answered
within a bound, with "later" when the work goes on behind it; an image that is asked for twice is
rewritten once; whatever an image does ends one child process and never this one. Called by
rewriter, which is a process of one thread. It does not rewrite: a child does (rewrite_job).
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument.cache import ImageCache
from concordia.instrument.options import Options
from concordia.instrument.request import (
    REQUEST_BYTES,
    Request,
    Status,
    check_memory,
    pack_reply,
)
from concordia.instrument.rewrite import rewrite as rewrite_image
from concordia.instrument.rewrite_job import Rewrite, RewriteJob
from concordia.instrument.rewriter_socket import NAME, listen

_PEER: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_DESCRIPTORS_MAX: Final = 4  # of a message, so that one too many is seen and closed
_CUT: Final = socket.MSG_TRUNC | socket.MSG_CTRUNC
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LOOK_S: Final = 2.0  # how often the run folder is looked for


_Work = tuple[str, bool]  # the key of an image, and whether it is for an assembler


class RewriteDesk:
    """Listens, queues, answers. One thread."""

    def __init__(
        self,
        run: Path,
        cache: ImageCache,
        options: Options,
        *,
        rewrite: Rewrite = rewrite_image,
        workers: int = config.REWRITE_WORKERS,
        answer_s: float = config.REWRITE_ANSWER_S,
        listener: socket.socket | None = None,
    ) -> None:
        self.path = run / NAME
        self._cache = cache
        self._options = options
        self._assembler_options = options.replaced(assembler=True)
        self._assembler_cache = ImageCache(cache.root, self._assembler_options.key())
        self._rewrite = rewrite
        self._workers = workers
        self._answer_s = answer_s
        self._jobs: dict[_Work, RewriteJob] = {}  # waiting and running
        self._queue: deque[RewriteJob] = deque()
        self._waiters: dict[socket.socket, tuple[_Work, float]] = {}  # and when to say "later"
        self._refused: set[_Work] = set()
        self._peers: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._is_stopped = False
        self._is_trim_due = True  # something was stored, or nobody has looked yet
        self._is_name_ours = listener is None  # else the next rewriter listens under it
        self._listener = listener or listen(self.path)
        self._accepts_at: float | None = None  # while nobody is accepted: until when
        self._watch(self._listener.fileno(), self._accept)

    def stop(self) -> None:
        """Serve no more; safe in a signal handler that wakes the loop."""
        self._is_stopped = True

    def stop_when_readable(self, descriptor: int) -> None:
        """Stop when this says so: the end of a process, a signal's wake-up."""
        self._watch(descriptor, self.stop)

    def serve(self) -> None:
        """Until `stop`, or until the run folder has gone."""
        looked_at = 0.0  # what killed rewriters left goes at once
        while not self._is_stopped:
            for key, _ in self._selector.select(self._pause_s()):
                key.data()
            now = time.monotonic()
            if self._accepts_at is not None and self._accepts_at <= now:
                self._accepts_at = None
                self._watch(self._listener.fileno(), self._accept)
            self._expire(now)
            self._start_jobs()
            if now - looked_at > _LOOK_S:
                looked_at = now
                self._is_stopped |= not self.path.exists()
                self._trim()

    def close(self) -> None:
        """End what runs, tell nobody, leave no file of its own."""
        if self._is_name_ours:
            self.path.unlink(missing_ok=True)
        for job in self._jobs.values():
            if job.is_running:
                job.kill()
                job.finish()
                self._is_trim_due = True  # of what it was writing
            else:
                job.close()
        for peer in self._peers:
            peer.close()
        self._listener.close()
        self._selector.close()
        self._trim()

    def _watch(self, descriptor: int, ready: Callable[[], None]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, ready)

    def _pause_s(self) -> float:
        """Until the next bound that somebody waits for."""
        now = time.monotonic()
        bounds = [now + _LOOK_S, *(bound for _, bound in self._waiters.values())]
        bounds += [job.ends_at for job in self._jobs.values() if job.is_running]
        bounds += [self._accepts_at] if self._accepts_at is not None else []
        return max(0.0, min(bounds) - now)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:  # it stays readable: look again when some may be free
                self._selector.unregister(self._listener.fileno())
                self._accepts_at = time.monotonic() + config.REWRITE_ACCEPT_PAUSE_S
            return  # else it has gone again
        raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        _, uid, _ = _PEER.unpack(raw)
        if uid != os.getuid() or len(self._peers) >= config.REWRITE_CLIENTS_MAX:
            peer.close()
            return
        peer.setblocking(False)
        self._peers.add(peer)
        self._watch(peer.fileno(), lambda: self._read(peer))

    def _read(self, peer: socket.socket) -> None:
        """One request. Whoever breaks the form of one is not served further."""
        try:
            data, descriptors, flags, _ = socket.recv_fds(
                peer, REQUEST_BYTES + 1, _DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, descriptors, flags = b"", [], 0
        try:
            if peer in self._waiters or len(descriptors) != 1 or flags & _CUT:
                raise ImageRefused("one request at a time, with one memory file")
            request = Request.parse(data)
        except ImageRefused:
            for descriptor in descriptors:
                os.close(descriptor)
            self._drop(peer)
            return
        self._take(peer, request, descriptors[0])

    def _take(self, peer: socket.socket, request: Request, memory: int) -> None:
        """Join the work on this image, or begin it."""
        status, work = None, _work(request)
        if work in self._refused:
            status = Status.REFUSED
        elif work not in self._jobs and len(self._jobs) >= config.REWRITE_JOBS_MAX:
            status = Status.LATER
        else:
            try:
                check_memory(memory, request.image_bytes)
            except ImageRefused as error:
                _say(request, str(error))
                status = Status.REFUSED
        if status is None and work not in self._jobs:
            job = RewriteJob(request, memory)
            self._jobs[work] = job
            self._queue.append(job)
        else:
            os.close(memory)
        if status is None:
            self._waiters[peer] = (work, time.monotonic() + self._answer_s)
        else:
            self._answer(peer, status)

    def _start_jobs(self) -> None:
        running = sum(job.is_running for job in self._jobs.values())
        while self._queue and running < self._workers:
            job = self._queue.popleft()
            try:
                if job.request.is_for_assembler:
                    job.start(self._assembler_cache, self._assembler_options, self._rewrite)
                else:
                    job.start(self._cache, self._options, self._rewrite)
            except OSError as error:  # no process to be had now: nothing is known of the image
                _say(job.request, str(error))
                self._end(job, Status.LATER)
                continue
            running += 1
            self._watch(job.pidfd, lambda job=job: self._finish(job))  # type: ignore[misc]

    def _finish(self, job: RewriteJob) -> None:
        """Its process has ended."""
        self._selector.unregister(job.pidfd)
        status = job.finish()
        self._is_trim_due = True
        if status is Status.REFUSED and len(self._refused) < config.REWRITE_REFUSED_MAX:
            self._refused.add(_work(job.request))
        self._end(job, status)

    def _trim(self) -> None:
        if self._is_trim_due:
            self._is_trim_due = False
            with contextlib.suppress(OSError):
                self._cache.trim()

    def _end(self, job: RewriteJob, status: Status) -> None:
        job.close()
        done = _work(job.request)
        del self._jobs[done]
        for peer in [p for p, (work, _) in self._waiters.items() if work == done]:
            self._answer(peer, status)

    def _expire(self, now: float) -> None:
        """Tell who waited long enough, and kill what worked long enough."""
        for peer in [p for p, (_, bound) in self._waiters.items() if bound <= now]:
            self._answer(peer, Status.LATER)
        for job in self._jobs.values():
            if job.is_running and job.ends_at <= now:
                _say(job.request, f"not done after {config.REWRITE_S} s")
                job.kill()  # its end comes through the selector, once
                job.ends_at = now + config.KILL_S

    def _answer(self, peer: socket.socket, status: Status) -> None:
        self._waiters.pop(peer, None)
        try:
            peer.send(pack_reply(status))
        except OSError:
            self._drop(peer)

    def _drop(self, peer: socket.socket) -> None:
        if peer in self._peers:
            self._peers.discard(peer)
            self._waiters.pop(peer, None)
            self._selector.unregister(peer.fileno())
            peer.close()


def _work(request: Request) -> _Work:
    return request.key, request.is_for_assembler


def _say(request: Request, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"rewriter: {request.key}: {text}", file=sys.stderr, flush=True)
