"""Work in a process of its own, floor 3.

Owns: the fork, the bound, and that a child never outlives who started it. Promises: whatever the
work does (a crash, an endless loop) ends the child alone. Called by ptx_check and rewrite_job. The
rewriter has one thread, so a fork is safe there; the offline command may have idle threads of its
libraries, and a child that waits for one ends at the bound. It does not know the work.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Final

FAILED: Final = 1  # the work raised
_PR_SET_PDEATHSIG: Final = 1  # of linux/prctl.h


def die_with_parent(parent: int) -> None:
    """End this process when its parent does, which has this pid; at once when it has gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(FAILED)  # it died before that was set


def tell_unfinished(what: str) -> None:
    """On the way out of a process that ends here: the kind and place of an error that nobody
    expected, in one line.
    """
    kind, error, trace = sys.exc_info()
    if kind is None:
        return
    place = traceback.extract_tb(trace)[-1]
    told = " ".join(f"{kind.__name__}: {error}".split())
    with contextlib.suppress(OSError, ValueError):
        print(f"{what}: {told} ({place.filename}:{place.lineno})", file=sys.stderr, flush=True)


def exit_code_of(work: Callable[[], int], bound_s: float) -> int | None:
    """What the work returns, FAILED when it raised, the negative number of the signal that ended
    it, or None when it was not done in time.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = FAILED
        try:
            die_with_parent(parent)
            code = work()
        finally:
            tell_unfinished("work in a child")
            os._exit(code)  # nothing of the parent's is run on the way out
    ended = os.pidfd_open(pid)
    try:
        in_time = bool(select.select([ended], [], [], bound_s)[0])
        if not in_time:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(ended)
    return os.waitstatus_to_exitcode(status) if in_time else None
