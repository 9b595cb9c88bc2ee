"""One rewrite in a process of its own, floor 3.

Owns: the child process: its start, its limits, its end. Promises: whatever an image does to a
rewrite (an error, a segmentation fault, an endless loop, all memory) is the end of the child and of
nothing else; a child never outlives the rewriter; the image is the one that its key names. Called
by the rewriter, which has one thread: so a fork is safe here. It decides nothing about when.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from concordia import config
from concordia.errors import ConcordiaError, ImageRefused
from concordia.instrument.cache import ImageCache, image_key
from concordia.instrument.child import die_with_parent, tell_unfinished
from concordia.instrument.options import Options
from concordia.instrument.report import Rewritten
from concordia.instrument.request import Request, Status

Rewrite = Callable[[bytes, Options], Rewritten]
_DONE: Final = 0
_FAILED: Final = 1
_FALSE: Final = 2  # the image is not the one of its key


@dataclass(slots=True)
class RewriteJob:
    """An image that waits for its turn, or is being rewritten."""

    request: Request
    memory: int  # the descriptor of the image; closed at the end
    pid: int = 0
    ends_at: float = 0.0
    pidfd: int = field(default=-1)

    @property
    def is_running(self) -> bool:
        """Whether its process was started."""
        return self.pid != 0

    def start(self, cache: ImageCache, options: Options, rewrite: Rewrite) -> None:
        """Fork. Raises OSError when there is no process to be had."""
        assert not self.is_running
        parent = os.getpid()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _run_child(self, parent, cache, options, rewrite)
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.ends_at = time.monotonic() + config.REWRITE_S

    def kill(self) -> None:
        """End its process, which it does within milliseconds; `finish` says that it has."""
        os.kill(self.pid, signal.SIGKILL)  # not waited for yet: the pid is still its own

    def finish(self) -> Status:
        """Wait for the end of its process, which has come or is about to; what is known then of the
        image that the key names.
        """
        _, status = os.waitpid(self.pid, 0)
        self.close()
        code = os.waitstatus_to_exitcode(status)
        if code == _FALSE:  # somebody else may still come with the image
            return Status.LATER
        return Status.READY if code == _DONE else Status.REFUSED

    def close(self) -> None:
        """Give back what it holds."""
        for descriptor in (self.pidfd, self.memory):
            if descriptor >= 0:
                os.close(descriptor)
        self.pidfd = self.memory = -1


def _run_child(
    job: RewriteJob, parent: int, cache: ImageCache, options: Options, rewrite: Rewrite
) -> None:
    """Rewrite and end; nothing of the parent's is run on the way out."""
    code = _FAILED
    try:
        _limit(parent)
        if cache.load(job.request.key) is None:
            image = _read(job)
            if image_key(image) != job.request.key:
                code = _FALSE
                raise ImageRefused(f"the image has the key {image_key(image)}")
            cache.store(job.request.key, rewrite(image, options))
        code = _DONE
    except (
        ConcordiaError,
        OSError,
        MemoryError,
        ArithmeticError,
        LookupError,
        ValueError,
    ) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        with contextlib.suppress(OSError, ValueError):
            print(f"rewriter: {job.request.key}: {told}", file=sys.stderr, flush=True)
    finally:
        tell_unfinished(f"rewriter: {job.request.key}")
        os._exit(code)


def _limit(parent: int) -> None:
    """Die with the parent, leave no core file, and take no more than a rewrite may."""
    die_with_parent(parent)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    seconds = int(config.REWRITE_S) + 1
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, config.REWRITE_MEMORY_BYTES),
        (resource.RLIMIT_CPU, seconds),
    ):
        _, hard = resource.getrlimit(limit)
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (bound, bound))


def _read(job: RewriteJob) -> bytes:
    with mmap.mmap(job.memory, job.request.image_bytes, prot=mmap.PROT_READ) as mapping:
        return mapping[:]
