"""A `concordia serve` child process, for those who test or measure from outside.

Owns: start, readiness, status and end of one server. Promises: whatever happens in the `with`
block, the server and all it started are gone after it, or `close` raises naming what is left.
Called by the demo, the soak, the benchmarks and engine tests.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final

import psutil

from concordia.errors import ReplicaError

STOP_TIMEOUT_S: Final = 60.0  # a drain ends within its own bound of 30 s


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """One running server; `url` is its OpenAI base."""

    def __init__(self, model: pathlib.Path, arguments: Sequence[str], *, log: pathlib.Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        own, separator, engine = _split(arguments)
        command = [
            *(sys.executable, "-m", "concordia.cli", "serve", str(model)),
            *("--host", "127.0.0.1", "--port", str(self.port), *own, *separator, *engine),
        ]
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ}
            )

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def wait_ready(self, *, timeout_s: float, standbys: int = 0) -> None:
        """Return once a replica serves and `standbys` wait; raises ReplicaError at the bound or
        when the server ends.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ReplicaError(
                    f"server ended with {self.process.returncode}; last lines:\n{self.tail()}"
                )
            states = [r["state"] for r in (self.status() or {}).get("replicas", [])]
            if states.count("ready") >= 1 and states.count("standby") >= standbys:
                return
            time.sleep(0.2)
        raise ReplicaError(f"server not ready after {timeout_s:.0f} s; last lines:\n{self.tail()}")

    def status(self) -> dict[str, Any] | None:
        """What `concordia status --json` says, or None while nobody answers."""
        done = subprocess.run(
            [sys.executable, "-m", "concordia.cli", "status", "--json", "--port", str(self.port)],
            capture_output=True,
            timeout=30,
            check=False,
        )
        if done.returncode != 0:
            return None
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def active(self) -> dict[str, Any]:
        """The one replica that serves, as the status has it; raises ReplicaError when it is none or
        not the only one.
        """
        replicas = (self.status() or {}).get("replicas", [])
        active: list[dict[str, Any]] = [r for r in replicas if r["state"] == "ready"]
        if len(active) != 1:
            raise ReplicaError(f"{len(active)} replicas serve, want one")
        return active[0]

    def tail(self, lines: int = 15) -> str:
        """The last lines that the server printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def close(self) -> int:
        """SIGTERM, bounded wait, SIGKILL of what is left; returns the exit code."""
        tree = [self.process.pid]
        if self.process.poll() is None:
            tree += [c.pid for c in psutil.Process(self.process.pid).children(recursive=True)]
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                for pid in reversed(tree):
                    if psutil.pid_exists(pid):
                        os.kill(pid, signal.SIGKILL)
                self.process.wait(10)
        return int(self.process.returncode)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    if "--" not in arguments:
        return list(arguments), [], []
    at = list(arguments).index("--")
    return list(arguments[:at]), ["--"], list(arguments[at + 1 :])
