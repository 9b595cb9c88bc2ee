"""One engine: a vLLM process tree, from its start to its confirmed end, floor 6.

Owns: how the processes of one engine are started, when they are ready, their states and allowed
moves, their folder. Promises: an engine is a session of its own that dies with this
process; it listens on loopback with a key of its own; all its files lie in its folder; after
`fence` no process of it lives; after `bury` no file, socket or shared-memory name of it is left.
Called by the replica set. It does not decide when to start, promote or fence.
"""

from __future__ import annotations

import contextlib
import enum
import http.client
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Final

from concordia import config
from concordia.errors import ReplicaError, UsageError
from concordia.serving.engine_log import EngineLog
from concordia.serving.engine_spec import LOOPBACK, EngineSpec
from concordia.serving.process_tree import ProcessTree
from concordia.serving.resources import Share
from concordia.serving.run_folder import NAMES_FILE
from concordia.serving.shared_names import SharedNames

# Runs before vLLM: the engine dies when we do (the owner ends the rest of its session), and may
# start at low priority.
_LAUNCHER: Final = """
import ctypes, os, sys
parent, nice, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(parent):
    os._exit(1)
os.nice(int(nice))
os.execv(command[0], command)
"""


class State(enum.Enum):
    """The life of a replica; the value is what `concordia status` shows."""

    STARTING = "starting"
    STANDBY = "standby"  # loaded and idle
    READY = "ready"  # serving
    FENCING = "fencing"  # being killed; nothing more is believed of it
    DEAD = "dead"  # confirmed


MOVES: Final[Mapping[State, frozenset[State]]] = {
    State.STARTING: frozenset({State.STANDBY, State.FENCING}),
    State.STANDBY: frozenset({State.READY, State.FENCING}),
    State.READY: frozenset({State.FENCING}),
    State.FENCING: frozenset({State.DEAD}),
    State.DEAD: frozenset(),
}


class Replica:
    """One engine; making one starts its processes and returns at once.

    Make it on a thread that lives as long as the server: the kernel ends a child with the thread
    that started it.
    """

    def __init__(
        self, spec: EngineSpec, *, name: str, slot: int, share: Share, nice: int = 0
    ) -> None:
        self.spec = spec
        self.name = name
        self.slot = slot
        self.share = share
        self.incarnation = time.time_ns()
        self._reserved = _reserve_port()
        self.port = int(self._reserved.getsockname()[1])
        self.base_url = f"http://{LOOPBACK}:{self.port}"
        self.started_ns = time.monotonic_ns()
        self.ready_s: float | None = None
        self.requests_in_flight = 0
        self._state = State.STARTING
        self._state_lock = threading.Lock()
        self._fence_lock = threading.Lock()
        self._is_buried = False
        self.folder = spec.make_folder(name)
        self.log = EngineLog(spec.log_path(name, self.incarnation))
        command = spec.command(port=self.port, incarnation=self.incarnation, share=share)
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(nice)]
        with self.log.path.open("wb") as sink:
            self.process = subprocess.Popen(
                [*launcher, *command],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=spec.variables(name, incarnation=self.incarnation, share=share),
                start_new_session=True,
            )
        names = SharedNames(self.folder / NAMES_FILE)
        self.tree = ProcessTree(self.process.pid, str(self.incarnation), names)

    @property
    def state(self) -> State:
        return self._state

    @property
    def session_id(self) -> int:
        return self.process.pid

    @property
    def layout(self) -> str:
        """Replicas of one server all have the same model and flags, hence one layout."""
        return self.spec.model

    def move(self, target: State) -> bool:
        """Go to another state; False when the table does not allow it from here."""
        with self._state_lock:
            if target not in MOVES[self._state]:
                return False
            self._state = target
            return True

    def wait_ready(self, *, timeout_s: float) -> None:
        """Return once the engine answers and has run once; raises ReplicaError with its own words
        when it ends or is late.
        """
        deadline = time.monotonic() + timeout_s
        look_at = 0.0
        ended = select.poll()
        descriptor = os.pidfd_open(self.process.pid)
        ended.register(descriptor, select.POLLIN)
        try:
            while time.monotonic() < deadline:
                if ended.poll(1000 * config.START_POLL_S):
                    raise self._start_error()
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + config.TREE_PERIOD_S
                    self.tree.refresh()
                    self.tree.record_shared_names()
                if self.state is not State.STARTING:
                    raise ReplicaError(f"{self.name} was ended while it started")
                if self.health(timeout_s=config.API_PERIOD_S) == 200:
                    self._run_once(deadline)
                    self.ready_s = (time.monotonic_ns() - self.started_ns) / 1e9
                    return
        finally:
            os.close(descriptor)
        words = self.log.last_words()
        raise ReplicaError(f"{self.name} is not ready after {timeout_s:.0f} s: {words}")

    def health(self, *, timeout_s: float) -> int:
        """HTTP status of the engine's /health; 0 when nobody answers."""
        line = http.client.HTTPConnection(LOOPBACK, self.port, timeout=timeout_s)
        try:
            line.request("GET", "/health")
            return line.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            line.close()

    def is_listening(self) -> bool:
        """Whether anybody accepts connections on the engine's port; a live server never refuses."""
        try:
            socket.create_connection((LOOPBACK, self.port), timeout=config.API_PERIOD_S).close()
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # late, which is not the same
        return True

    def strike(self) -> None:
        """Send SIGKILL to every process of the engine; `fence` sees them dead."""
        self.move(State.FENCING)
        self.tree.refresh()
        self.tree.strike(spare=[p.pid for p in self.tree.helpers()])

    def fence(self, *, timeout_s: float = config.KILL_S) -> None:
        """Kill every process of the engine and see it dead; raises ReplicaError naming who is left.
        May be repeated.
        """
        self.move(State.FENCING)
        with self._fence_lock:
            if self.state is State.DEAD:
                return
            if self.ready_s is None:
                self.tree.freeze()
            self.tree.refresh()
            self.set_priority(0)  # to die takes processor time, too
            self.tree.record_shared_names()
            self.tree.kill(timeout_s=timeout_s, spare=[p.pid for p in self.tree.helpers()])
            self.move(State.DEAD)

    def bury(self) -> list[str]:
        """Remove what a fenced engine left; returns the shared-memory names that had to be
        removed.
        """
        with self._fence_lock:
            if self._is_buried or self.state is not State.DEAD:
                return []
            self.tree.wait_helpers(timeout_s=config.HELPERS_S)
            removed = self.tree.remove_shared_names()
            self.process.wait(config.KILL_S)
            self.tree.close()
            self._reserved.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            self._is_buried = True
            return removed

    def set_priority(self, nice: int) -> None:
        """Change the priority of all threads; without the right to raise it again, it stays."""
        for process in self.tree.members:
            with contextlib.suppress(OSError):
                for thread in os.listdir(f"/proc/{process.pid}/task"):
                    os.setpriority(os.PRIO_PROCESS, int(thread), nice)

    def move_cores(self, moves: Mapping[int, int]) -> None:
        """Threads that are bound to one core go to another one."""
        for process in self.tree.members:
            with contextlib.suppress(OSError):
                for thread in os.listdir(f"/proc/{process.pid}/task"):
                    bound = os.sched_getaffinity(int(thread))
                    if len(bound) == 1 and (core := next(iter(bound))) in moves:
                        os.sched_setaffinity(int(thread), {moves[core]})

    def _start_error(self) -> ReplicaError | UsageError:
        # Looked at, not collected: as long as the leader is a zombie, its number is not given to
        # another.
        end = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        code = None if end is None else end.si_status
        words = self.log.last_words()
        if code == 2:  # argparse
            return UsageError(f"vLLM refuses its flags: {words}")
        return ReplicaError(f"{self.name} ended while it started (code {code}): {words}")

    def _run_once(self, deadline: float) -> None:
        """A first request, so that whatever is done lazily is done before somebody waits for it."""
        # With log-probabilities: an engine that compiles does so for what ranks them at the first
        # request that wants some.
        body = {
            "prompt": [1] * config.WARM_UP_TOKENS,
            "max_tokens": 2,
            "temperature": 0,
            "logprobs": 1,
        }
        names = self.spec.served_names or (self.spec.model,)
        line = http.client.HTTPConnection(
            LOOPBACK, self.port, timeout=max(1.0, deadline - time.monotonic())
        )
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {self.spec.api_key}",
        }
        try:
            line.request(
                "POST", "/v1/completions", json.dumps({"model": names[0], **body}), headers
            )
            status = line.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            raise ReplicaError(
                f"{self.name} failed at its first request: {error}; {self.log.last_words()}"
            ) from error
        finally:
            line.close()
        if status >= 500:
            raise ReplicaError(
                f"{self.name} answered its first request with {status}: {self.log.last_words()}"
            )


def _reserve_port() -> socket.socket:
    """A bound socket that never listens: nobody else is given its port, and a server that reuses
    addresses may listen there.
    """
    reserved = socket.socket()
    reserved.bind((LOOPBACK, 0))
    # Only now: the kernel gives one free port to any number of sockets that ask for it with this
    # option.
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return reserved
