"""A program and its rewriter, as child processes, floor 7.

Owns: starting both, the socket between them, signals on their way to the program, and the end of
both. Promises: the program has the signal mask, the terminal and the process group that it would
have without us, does not wait for the rewriter to start, and is watched whatever else fails; a
signal from the terminal reaches it once (the kernel sends it), one sent to us is passed on; a
rewriter that dies is started once more, and until it is there, questions wait; when none comes any
more, they are told so at once; none is left behind. Called by launch. It knows no shim, and imports
nothing that starts a thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from concordia import config
from concordia.errors import UsageError
from concordia.instrument.rewriter_socket import HANDED, listen

# What may be meant for the program. SIGTSTP is not taken: who stops the one stops the other, and
# the shell sees it.
_PASSED: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_ENDING: Final = _PASSED[:4]
_TAKEN: Final = (*_PASSED, signal.SIGCHLD)
# By the interpreter when it starts, and children inherit that: a program in a pipe whose reader has
# gone would run on.
IGNORED_HERE: Final = (signal.SIGPIPE, signal.SIGXFSZ)


@contextlib.contextmanager
def before_threads() -> Iterator[None]:
    """What is imported meanwhile may start threads: they never take a signal from the one that
    waits for it.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Supervisor:
    """Starts and watches; `rewriter` is its command, or empty; `path` is where it is asked."""

    def __init__(
        self,
        rewriter: Sequence[str] = (),
        rewriter_environment: Mapping[str, str] | None = None,
        path: Path | None = None,
    ) -> None:
        self.rewriter = rewriter
        self.rewriter_environment = rewriter_environment or {}
        self.path = path or Path()
        self.rewriter_deaths = 0
        self.rewriter_error = ""  # why none could be started
        self._listener: socket.socket | None = None
        self._rewriter_pid = 0
        self._mask: frozenset[int] = frozenset()  # that the program gets

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        when_started: Callable[[], None] = lambda: None,
        when_ended: Callable[[], None] = lambda: None,
    ) -> int:
        """Run the program to its end; its wait status. `when_started` runs beside it, and signals
        wait meanwhile; what it raises comes after the program's end. `when_ended` runs after that,
        with the rewriter still there.
        """
        self._mask = frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN))
        try:
            if self.rewriter:
                self._listener = listen(self.path)
            # what came so far came when there was no program that could have seen it
            early = signal.sigtimedwait(_ENDING, 0)
            if early is not None:
                return early.si_signo  # as a wait status: ended by this signal
            pid = self._spawn(command, environment)
            self._start_rewriter()  # behind it: the two would share a core when they begin
            try:
                when_started()
            finally:
                status = self._watch(pid)
            when_ended()
            return status
        finally:
            self._end_rewriter()
            self._close_listener()
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _spawn(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        try:
            return os.posix_spawnp(
                command[0],
                list(command),
                dict(environment),
                setsigmask=self._mask,
                setsigdef=IGNORED_HERE,
            )
        except OSError as error:
            raise UsageError(f"{command[0]} cannot be started: {error.strerror}") from None

    def _start_rewriter(self) -> None:
        """It takes half a second until it accepts, and the program's questions wait for it on our
        socket, not the program. Where none comes any more, there is no socket.
        """
        if self._listener is None or self.rewriter_deaths >= config.REWRITER_STARTS_MAX:
            self._close_listener()
            return
        try:
            # A session of its own: the terminal's signals are for the program.
            self._rewriter_pid = os.posix_spawnp(
                self.rewriter[0],
                [*self.rewriter, "--listener", str(HANDED)],
                dict(self.rewriter_environment),
                setsigmask=self._mask,
                setsid=True,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, self._listener.fileno(), HANDED),
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                ],
            )
        except OSError as error:  # the program runs already, and goes on without
            self.rewriter_error = f"{self.rewriter[0]} cannot be started: {error.strerror}"
            self._close_listener()

    def _close_listener(self) -> None:
        """Whoever still waits on it is told; so the name goes first."""
        if self._listener is not None:
            self.path.unlink(missing_ok=True)
            self._listener.close()
            self._listener = None

    def _watch(self, pid: int) -> int:
        while True:
            # bounded: a thread that was started since may have taken the signal
            seen = signal.sigtimedwait(_TAKEN, config.WAIT_LOOK_S)
            if seen is None or seen.si_signo == signal.SIGCHLD:
                status = self._reap(pid)
                if status is not None:
                    return status
            elif seen.si_code <= 0:  # sent by a process; what the kernel sends, both of us get
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, seen.si_signo)

    def _reap(self, pid: int) -> int | None:
        """The program's wait status once it has ended. Several ends may make one signal."""
        found, status = os.waitpid(pid, os.WNOHANG)
        if found == pid:
            return status
        if self._rewriter_pid and os.waitpid(self._rewriter_pid, os.WNOHANG)[0]:
            self._rewriter_pid = 0
            self.rewriter_deaths += 1
            self._start_rewriter()
        return None

    def _end_rewriter(self) -> None:
        pid, self._rewriter_pid = self._rewriter_pid, 0
        if not pid:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        if not _has_ended(pid, config.RUN_END_S):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def end_as(status: int) -> int:
    """The exit code for this wait status. Does not return when a signal ended the program: then it
    ends us, too, for a shell to see.
    """
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    sys.stdout.flush()
    sys.stderr.flush()
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the program has left its own
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    return 128 + number


def _has_ended(pid: int, bound_s: float) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        deadline = time.monotonic() + bound_s
        while not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if time.monotonic() >= deadline:
                return False
        os.waitpid(pid, 0)
        return True
    finally:
        os.close(descriptor)
