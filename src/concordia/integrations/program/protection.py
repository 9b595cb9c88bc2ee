"""The protection of one program: its folder, its journal and its agent, floor 7.

Owns: everything that is there before the program starts and goes after it has ended. Promises: the
files are private and lie in memory; a program that is killed leaves what resumes it, one that ends
well leaves nothing; a series has one run at a time; a failure to start is an error before the
program is, one later costs the protection alone. Called by the launcher around the program: `open`,
then `environment` for the program's, then `end` with its exit status. It does not start the
program.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import concordia
from concordia import config
from concordia.errors import EnvironmentRefused, UsageError, WaitTimeout
from concordia.integrations.program.agent import FINISH, LEAVE
from concordia.integrations.program.policy import Policy
from concordia.integrations.program.program_pages import Board, create_reads, create_stage
from concordia.integrations.program.resume import Resumed, write_restore
from concordia.journal.checkpoints import series_key
from concordia.journal.client import JournalClient
from concordia.journal.spawn import spawn_owner

_SHARED: Path = Path("/dev/shm")
_STACK_FILE = "stack"
_ADDR_NO_RANDOMIZE = 0x0040000  # of personality(2); some containers refuse it


class Protection:
    """One run of a program under a policy that protects something."""

    def __init__(self, policy: Policy, folder: Path, resumed: Resumed | None, *, lock: int) -> None:
        self.policy, self.folder, self.resumed, self._lock = policy, folder, resumed, lock
        self._stack = os.open(folder / _STACK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        paths = [str(Path(concordia.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        for name in ("CONCORDIA_RUN", "CONCORDIA_PROTECT", "LD_PRELOAD"):
            environment.pop(name, None)
        self._agent = subprocess.Popen(
            [sys.executable, "-m", "concordia.integrations.program.agent", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            pass_fds=(lock,),  # until the agent ends, too: it still commits when this is killed
            start_new_session=True,  # a signal to the program's group is not meant for it
        )
        self._await_ready()

    @classmethod
    def open(cls, policy: Policy) -> Self:
        """Everything up to the program's start: a journal, what it is resumed from, the agent."""
        spawn_owner(policy.journal, size_bytes=policy.journal_bytes, linger_s=policy.linger_s)
        reads = reads_path(policy)
        lock = _locked(reads, policy.series)
        folder = Path(tempfile.mkdtemp(prefix="concordia-program-", dir=_SHARED))
        try:
            digest = policy_digest(policy)
            with JournalClient.connect(policy.journal) as client:
                resumed = write_restore(
                    client, series_key(policy.series), policy=digest, reads=reads, folder=folder
                )
            before = (reads, resumed.reads_bytes) if resumed else (None, 0)
            create_reads(reads, policy.reads_bytes, of=before[0], end=before[1])
            (folder / "reads").symlink_to(reads)
            Board.create(folder / "board", policy.stage_bytes)
            create_stage(folder / "stage", policy.stage_bytes)
            (folder / "policy").write_text(policy.lines())
            facts: dict[str, Any] = {
                "journal": str(policy.journal),
                "series": policy.series,
                "policy": digest,
                "stage_bytes": policy.stage_bytes,
                "commit_s": config.PROGRAM_COMMIT_S,
            }
            (folder / "facts").write_text(json.dumps(facts))
            return cls(policy, folder, resumed, lock=lock)
        except BaseException:
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def environment(self) -> dict[str, str]:
        """What the program's environment needs more."""
        found = {"CONCORDIA_PROTECT": str(self.folder)}
        # sets of strings have the same order in every run
        found |= {"PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0")}
        if any(rule.stack for rule in self.policy.regions):
            bootstrap = str(Path(__file__).parent / "bootstrap")
            paths = [bootstrap, os.environ.get("PYTHONPATH", "")]
            found["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
            found["CONCORDIA_STACK_PATH"] = str(self.folder / _STACK_FILE)
        return found

    @staticmethod
    def keep_addresses() -> None:
        """Let the program, which this process starts next, have the same addresses in every run,
        where that is allowed: its GPU memory may hold some.
        """
        ctypes.CDLL(None).personality(ctypes.c_ulong(_ADDR_NO_RANDOMIZE))

    def end(self, status: int) -> dict[str, Any]:
        """The program has ended: 0 means that it is done, and nothing of it is kept. What was
        reported of its regions last.
        """
        assert self._agent.stdin is not None
        try:
            self._agent.stdin.write(FINISH if status == 0 else LEAVE)
            self._agent.stdin.close()
            self._agent.wait(config.PROGRAM_END_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._agent.kill()
            self._agent.wait()
        report = self._report()
        is_finished = status == 0 and self._agent.returncode == 0
        if is_finished:
            reads_path(self.policy).unlink(missing_ok=True)
        elif status == 0:  # what the journal still has cannot be resumed without the log
            print(
                f"concordia: the checkpoints of {self.policy.series} are still there, because the"
                " agent did not finish: the next start goes on from them",
                file=sys.stderr,
            )
        self.close()
        return report

    def close(self) -> None:
        """Whatever happened: no process and no folder stays."""
        if self._agent.poll() is None:
            self._agent.kill()
            self._agent.wait()
        for pipe in (self._agent.stdin, self._agent.stdout):
            if pipe is not None:
                pipe.close()
        if self._stack >= 0:
            os.close(self._stack)
            os.close(self._lock)
            self._stack = -1
        shutil.rmtree(self.folder, ignore_errors=True)

    def _report(self) -> dict[str, Any]:
        path = self.folder / "report"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        board = Board(self.folder / "board", self.policy.stage_bytes)
        found["lost"] = board.reason
        board.close()
        return found

    def _await_ready(self) -> None:
        assert self._agent.stdout is not None
        ready, _, _ = select.select([self._agent.stdout], [], [], config.OWNER_START_S)
        said = self._agent.stdout.readline() if ready else b""
        if said == b"ready\n":
            return
        self._agent.kill()
        self._agent.wait()
        if ready:
            raise EnvironmentRefused("the program has no agent: what it said is above")
        raise WaitTimeout(f"no agent after {config.OWNER_START_S} s")


def _locked(reads: Path, series: str) -> int:
    """A descriptor that holds the series; raises UsageError when another run does."""
    reads.parent.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(reads.with_name(f"{series}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + config.PROGRAM_LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(lock)
                raise UsageError(
                    f"another run has series {series}: end it, or name another in the policy"
                ) from None
        time.sleep(config.OWNER_POLL_S)


def reads_path(policy: Policy) -> Path:
    """Where a series' log of reads lies: it outlives the program, as its journal does."""
    place = policy.journal
    return place.with_name(f"{place.name}.reads") / policy.series


def policy_digest(policy: Policy) -> str:
    """Names what decides at which points a program is saved, and what of it."""
    what = replace(
        policy, audit_every=0, stage_bytes=0, reads_bytes=0, trust_arguments=(), trust_maps=()
    )
    return hashlib.sha256(what.lines().encode()).hexdigest()[:16]
