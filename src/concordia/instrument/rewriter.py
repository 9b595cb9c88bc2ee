"""The process that rewrites images for the programs of one `concordia run`, floor 3.

Owns: its command line, its signals, its end. Promises: it ends with the launcher, with the run
folder or by SIGTERM, and leaves nothing behind; what is wrong with its arguments is one line, exit
code 2. Started by the launcher as `python -m concordia.instrument.rewriter`. The work is the
desk's (rewrite_desk).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import select
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from concordia import config
from concordia.errors import ConcordiaError
from concordia.instrument.cache import ImageCache
from concordia.instrument.options import Options
from concordia.instrument.rewrite_desk import RewriteDesk
from concordia.instrument.rewriter_socket import NAME, handed
from concordia.paths import Paths
from concordia.private_folder import check_private


def main(arguments: list[str]) -> int:
    """Serve until the launcher ends or SIGTERM comes."""
    asked = _parser().parse_args(arguments)
    options = Options.parse(asked.options)
    check_private(asked.run, "--run names a run folder")
    _raise_descriptors()
    desk = RewriteDesk(
        asked.run,
        ImageCache(asked.cache, options.key()),
        options,
        workers=asked.workers,
        listener=None if asked.listener is None else handed(asked.listener),
    )
    waker, woken = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    # A launcher may have blocked signals and ignored the ends of children, and both are inherited.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGTERM, lambda *_: desk.stop())
    # of the terminal, for the program; it may still load images until it ends
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    desk.stop_when_readable(woken.fileno())
    has_gone = True
    try:
        launcher = os.pidfd_open(asked.launcher)
        desk.stop_when_readable(launcher)
        desk.serve()
        has_gone = bool(select.select([launcher], [], [], 0)[0])
    except ProcessLookupError:
        pass  # the launcher had gone before we were here
    finally:
        desk.close()
        if has_gone:  # nobody else removes the name of its listener now
            desk.path.unlink(missing_ok=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m concordia.instrument.rewriter",
        description="Rewrites GPU images for the programs of one `concordia run`, which starts it. "
        f"Programs ask over {NAME} in the run folder and find the result in the cache.",
        epilog="It ends when the launcher ends, when the run folder has gone, or by SIGTERM.",
    )
    parser.add_argument("--run", type=Path, required=True, help="the run folder (0700, yours)")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Paths.default().image_cache,
        help="folder of rewritten images (default: %(default)s)",
    )
    parser.add_argument(
        "--options", default="{}", help='JSON, such as {"arch": 90, "exit": true, "deny": []}'
    )
    parser.add_argument(
        "--launcher",
        type=int,
        default=os.getppid(),
        metavar="PID",
        help="process whose end ends this one (default: the parent)",
    )
    parser.add_argument(
        "--listener",
        type=int,
        metavar="FD",
        help="descriptor on which the launcher listens already (default: listen in the run folder)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        choices=range(1, 65),
        default=config.REWRITE_WORKERS,
        metavar="N",
        help="images at the same time (default: %(default)s)",
    )
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help says more\n")


def _raise_descriptors() -> None:
    """Room for every client and every image that waits, where the system grants it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = config.REWRITE_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
    wanted = min(wanted, config.REWRITE_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _open_streams() -> None:
    """A program may be started without output, and no image's memory must get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


if __name__ == "__main__":
    _open_streams()
    try:
        code = main(sys.argv[1:])
    except ConcordiaError as failure:
        print(f"rewriter: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
    # a launcher waits for this end, and to take an interpreter down is the longest part of it
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
