"""serving/replica.py, replica_set.py and what it consists of, watch.py, with real processes that look like vLLM from outside.

Invariants: a death is noticed within 100 ms and a stop within 150 ms; a failed engine is sealed, then dead with all its processes, before
another serves; a standby takes over at once and is itself replaced; what cannot start is given up loudly; nothing is left behind.
"""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from concordia import config
from concordia.errors import ReplicaError, UsageError
from concordia.recovery.fault import Fault, FaultKind
from concordia.serving.engine_flags import EngineFlags
from concordia.serving.engine_spec import EngineSpec
from concordia.serving.process import can_raise_priority, read_process
from concordia.serving.process_tree import become_subreaper
from concordia.serving.replica import MOVES, Replica, State
from concordia.serving.replica_set import ReplicaSet
from concordia.serving.resources import Share
from concordia.serving.shared_names import SHARED_MEMORY
from concordia.serving.watch import Watch

STAND_IN = pathlib.Path(__file__).with_name("stand_in_engine.py")
BOUND_S = 30.0


class Journal:
    """Notes in which order the owner was asked, and who was alive when."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.sessions: dict[int, int] = {}
        self.alive_at_release: list[bool] = []

    def register_replica(self, replica: int, *, session_id: int) -> None:
        self.sessions[replica] = session_id
        self.calls.append(("register", replica))

    def seal_replica(self, replica: int) -> dict[int, int]:
        self.calls.append(("seal", replica))
        return {}

    def release_replica(self, replica: int) -> bool:
        self.alive_at_release.append(is_alive(self.sessions[replica]))
        self.calls.append(("release", replica))
        return True


class Stage:
    """A replica set of stand-ins, with what it told."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.journal = Journal()
        self.faults: list[Fault] = []
        self.set: ReplicaSet | None = None

    def make(self, replicas: int, standbys: int) -> ReplicaSet:
        run = self.folder / "run"
        run.mkdir()
        spec = EngineSpec(
            model="stand-in",
            flags=EngineFlags(()),
            folder=run,
            api_key="key",
            stand_in=(sys.executable, str(STAND_IN), str(self.folder)),
        )
        shares = [Share({}, ()) for _ in range(replicas + standbys)]
        self.set = ReplicaSet(spec, shares, replicas=replicas, journal=self.journal)
        self.set.subscribe(self.faults.append)
        return self.set

    def names(self) -> list[str]:
        """Shared memory of the engines that is still there."""
        names = [p.read_text().lstrip("/") for p in self.folder.glob("shared-*")]
        return [name for name in names if (SHARED_MEMORY / name).exists()]


@pytest.fixture(scope="module", autouse=True)
def subreaper() -> None:
    become_subreaper()


@pytest.fixture
def stage(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    monkeypatch.setattr(config, "STANDBY_DELAY_S", 0.2)
    monkeypatch.setattr(config, "START_PAUSE_S", 0.05)
    monkeypatch.setattr(config, "KEEP_PERIOD_S", 0.2)
    stage = Stage(tmp_path_factory.mktemp("s"))
    yield stage
    if stage.set is not None:
        sessions = list(stage.journal.sessions.values())
        for name in ("mute", "unhealthy"):
            (stage.folder / name).unlink(missing_ok=True)
        stage.set.stop()
        assert [s for s in sessions if is_alive(s)] == []
        assert stage.names() == []
        assert list((stage.folder / "run").iterdir()) == []


def is_alive(pid: int) -> bool:
    process = read_process(pid)
    return process is not None and process.is_alive


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}"
        os.sched_yield()


def crowding() -> float:
    """Runnable processes per core: a bound in milliseconds holds for a machine that has cores to give."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def member(replica: Replica, name: str) -> int:
    return next(p.pid for p in replica.tree.refresh() if p.name.startswith(name))


def test_states_only_move_as_the_table_says_when_asked() -> None:
    assert set(MOVES) == set(State)
    assert MOVES[State.DEAD] == frozenset()
    assert all(State.FENCING in MOVES[s] for s in (State.STARTING, State.STANDBY, State.READY))


@pytest.mark.parametrize(
    ("victim", "number", "kind", "bound_ms"),
    [
        ("VLLM::EngineCor", signal.SIGKILL, FaultKind.PROCESS_DEATH, 100),
        ("VLLM::Worker", signal.SIGKILL, FaultKind.PROCESS_DEATH, 100),
        ("python", signal.SIGKILL, FaultKind.PROCESS_DEATH, 100),
        ("VLLM::Worker", signal.SIGSTOP, FaultKind.PROCESS_STOPPED, 150),
    ],
)
def test_standby_serves_at_once_when_a_process_is_hit(
    stage: Stage, victim: str, number: signal.Signals, kind: FaultKind, bound_ms: float
) -> None:
    replicas = stage.make(1, 1)
    replicas.start(timeout_s=BOUND_S)
    wait_for(lambda: replicas.standbys, "a standby")
    failed, standby = replicas.active[0], replicas.standbys[0]
    wait_for(lambda: (SHARED_MEMORY / stage.names()[0]).exists(), "shared memory")
    helpers = {p.pid for p in failed.tree.helpers()}
    members = [p.pid for p in failed.tree.refresh() if p.pid not in helpers]
    pid = failed.session_id if victim == "python" else member(failed, victim)
    hit_ns = time.monotonic_ns()
    os.kill(pid, number)
    wait_for(lambda: stage.faults, "the fault")
    fault = stage.faults[0]
    promoted = replicas.fail_over(failed, fault)
    replaced_ms = (time.monotonic_ns() - hit_ns) / 1e6
    assert promoted is standby
    assert promoted in replicas.active
    assert failed not in replicas.active
    assert (fault.kind, fault.replica, fault.pid) == (kind, failed.incarnation, pid)
    assert (fault.detected_ns - hit_ns) / 1e6 < bound_ms * crowding()
    assert replaced_ms < 1500 * crowding()
    wait_for(lambda: failed.state is State.DEAD, "its end")
    assert [p for p in members if is_alive(p)] == []
    wait_for(lambda: stage.journal.alive_at_release, "the release")
    ordered = [name for name, replica in stage.journal.calls if replica == failed.incarnation]
    assert ordered == ["register", "seal", "release"]
    assert stage.journal.alive_at_release == [False]
    wait_for(lambda: len(replicas.standbys) == 1, "a new standby")
    wait_for(lambda: not failed.folder.exists(), "the folder gone")
    assert replicas.fail_over(failed, fault) is promoted
    assert len(stage.faults) == 1
    times = replicas.failover_times(failed)
    assert list(times) == ["sealed", "struck", "replaced"]
    assert times["replaced"] >= max(times["sealed"], times["struck"]) > 0
    assert replicas.failover_times(promoted) == {}


def test_engine_is_struck_while_its_owner_takes_long_to_seal(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = stage.make(1, 1)
    replicas.start(timeout_s=BOUND_S)
    wait_for(lambda: replicas.standbys, "a standby")
    failed = replicas.active[0]
    core = member(failed, "VLLM::EngineCor")
    lived: list[bool] = []

    def seal(replica: int) -> dict[int, int]:
        wait_for(lambda: not is_alive(core), "its end")
        lived.append(bool(replicas.active))
        return {}

    monkeypatch.setattr(stage.journal, "seal_replica", seal)
    fault = Fault(FaultKind.STEP_OVERDUE, failed.incarnation, time.monotonic_ns(), "test")
    replicas.fail_over(failed, fault)
    assert lived == [False], "another served before it was sealed"


def test_standby_is_replaced_when_it_dies(stage: Stage) -> None:
    replicas = stage.make(1, 1)
    replicas.start(timeout_s=BOUND_S)
    wait_for(lambda: replicas.standbys, "a standby")
    active, standby = replicas.active[0], replicas.standbys[0]
    os.kill(member(standby, "VLLM::EngineCor"), signal.SIGKILL)
    wait_for(lambda: replicas.standbys and replicas.standbys[0] is not standby, "another standby")
    assert replicas.active == [active]
    assert [f.replica for f in stage.faults] == [standby.incarnation]


def test_standby_is_replaced_when_it_takes_long_to_die(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas = stage.make(1, 1)
    replicas.start(timeout_s=BOUND_S)
    wait_for(lambda: replicas.standbys, "a standby")
    standby, fence, attempts = replicas.standbys[0], Replica.fence, []

    def slow(self: Replica, **how: Any) -> None:
        attempts.append(self)
        if len(attempts) <= 2:
            raise ReplicaError("still alive")
        fence(self, **how)

    monkeypatch.setattr(Replica, "fence", slow)
    os.kill(member(standby, "VLLM::EngineCor"), signal.SIGKILL)
    wait_for(lambda: replicas.standbys and replicas.standbys[0] is not standby, "another standby")
    assert attempts[:3] == [standby] * 3


def test_engine_is_watched_struck_and_ended_when_its_processes_cannot_be_listed_for_a_while(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas = stage.make(1, 1)
    replicas.start(timeout_s=BOUND_S)
    wait_for(lambda: replicas.standbys, "a standby")
    failed, standby = replicas.active[0], replicas.standbys[0]
    core = member(failed, "VLLM::EngineCor")
    refused: list[threading.Thread] = []  # kept, so that no later thread is taken for an earlier one

    def refuse() -> list[Any]:
        refused.append(threading.current_thread())
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(failed.tree, "refresh", refuse)
        wait_for(lambda: len(refused) >= 2, "a second look after the one that failed")
        assert stage.faults == []
        os.kill(core, signal.SIGKILL)
        wait_for(lambda: stage.faults, "the fault")
        assert replicas.fail_over(failed, stage.faults[0]) is standby
        wait_for(lambda: len(set(refused)) >= 3, "attempts to strike and to end it")
        assert failed.state is State.FENCING
    wait_for(lambda: failed.state is State.DEAD, "its end")
    wait_for(lambda: len(replicas.standbys) == 1, "a new standby")


@pytest.mark.parametrize("where", ["wait_ready", "add"])
def test_another_engine_is_started_when_a_start_fails_with_an_error_of_the_system(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    replicas = stage.make(1, 1)
    replicas.start(timeout_s=BOUND_S)
    wait_for(lambda: replicas.standbys, "a standby")
    standby = replicas.standbys[0]
    owner: type = Replica if where == "wait_ready" else Watch
    real, asked = getattr(owner, where), []

    def refuse_the_first(*arguments: Any, **how: Any) -> None:
        asked.append(where)
        if len(asked) == 1:
            raise OSError(errno.EMFILE, "too many open files")
        real(*arguments, **how)

    monkeypatch.setattr(owner, where, refuse_the_first)
    os.kill(member(standby, "VLLM::EngineCor"), signal.SIGKILL)
    wait_for(lambda: len(stage.faults) == 2, "the failed start")
    assert stage.faults[1].kind is FaultKind.START_FAILED
    wait_for(lambda: replicas.standbys, "another standby")
    assert len(asked) == 2


@pytest.mark.skipif(not can_raise_priority(), reason="the right to raise a priority is missing")
def test_standby_has_full_priority_when_it_is_loaded(stage: Stage) -> None:
    replicas = stage.make(1, 1)
    replicas.start(timeout_s=BOUND_S)
    wait_for(lambda: replicas.standbys, "a standby")
    own = os.getpriority(os.PRIO_PROCESS, 0)
    members = replicas.standbys[0].tree.refresh()
    assert {p.name: os.getpriority(os.PRIO_PROCESS, p.pid) - own for p in members} == {
        p.name: 0 for p in members
    }


def test_new_engine_serves_when_there_is_no_standby(stage: Stage) -> None:
    replicas = stage.make(1, 0)
    replicas.start(timeout_s=BOUND_S)
    failed = replicas.active[0]
    os.kill(failed.session_id, signal.SIGKILL)
    wait_for(lambda: stage.faults, "the fault")
    promoted = replicas.fail_over(failed, stage.faults[0])
    assert promoted is not failed
    assert replicas.active == [promoted]


def test_each_gets_its_own_replacement_when_two_fail_together(stage: Stage) -> None:
    replicas = stage.make(2, 1)
    replicas.start(timeout_s=BOUND_S)
    failed = replicas.active
    for replica in failed:
        os.kill(member(replica, "VLLM::EngineCor"), signal.SIGKILL)
    wait_for(lambda: len(stage.faults) == 2, "both faults")
    promoted = [replicas.fail_over(r, stage.faults[0]) for r in failed]
    assert len({r.incarnation for r in (*failed, *promoted)}) == 4
    wait_for(lambda: len(replicas.standbys) == 1, "a new standby")


def test_successor_is_replaced_too_when_it_dies_during_the_failover(stage: Stage) -> None:
    replicas = stage.make(1, 1)
    replicas.start(timeout_s=BOUND_S)
    wait_for(lambda: replicas.standbys, "a standby")
    first, second = replicas.active[0], replicas.standbys[0]
    os.kill(first.session_id, signal.SIGKILL)
    os.kill(second.session_id, signal.SIGKILL)
    wait_for(lambda: replicas.active and replicas.active[0] not in (first, second), "a third")
    assert {f.replica for f in stage.faults} == {first.incarnation, second.incarnation}


@pytest.mark.parametrize(("status", "is_fault"), [("unhealthy", True), (None, False)])
def test_report_is_a_fault_only_when_the_engine_is_unhealthy(
    stage: Stage, status: str | None, is_fault: bool
) -> None:
    replicas = stage.make(1, 1)
    replicas.start(timeout_s=BOUND_S)
    wait_for(lambda: replicas.standbys, "a standby")
    active = replicas.active[0]
    if status:
        (stage.folder / status).touch()
    replicas.report_fault(active, FaultKind.ENGINE_ERROR, "an answer broke off")
    assert any(f.replica == active.incarnation for f in stage.faults) == is_fault
    if status:
        (stage.folder / status).unlink()
        wait_for(lambda: replicas.active, "one that serves")


@pytest.mark.parametrize(
    ("mode", "error", "words"),
    [
        ("refuse", ReplicaError, "ValueError: no such weights"),
        ("exit2", UsageError, "unrecognized arguments: --wrong"),
    ],
)
def test_start_ends_with_the_engines_own_words_when_it_fails(
    stage: Stage, mode: str, error: type[Exception], words: str
) -> None:
    (stage.folder / mode).touch()
    replicas = stage.make(1, 0)
    with pytest.raises(error, match=words):
        replicas.start(timeout_s=BOUND_S)


def test_standby_is_given_up_when_it_fails_again_and_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "START_ATTEMPTS_MAX", 3)
    monkeypatch.setattr(config, "START_PAUSE_MAX_S", 0.1)
    replicas = stage.make(1, 1)
    replicas.start(timeout_s=BOUND_S)
    wait_for(lambda: replicas.standbys, "a standby")
    active = replicas.active[0]
    (stage.folder / "refuse").touch()
    os.kill(replicas.standbys[0].session_id, signal.SIGKILL)
    wait_for(lambda: replicas._keeper.failed_count >= 3, "three failures")
    launched = replicas._keeper.launched_count
    wait_for(lambda: len(replicas.replicas) == 1, "only the active one")
    assert replicas.active == [active]
    (stage.folder / "refuse").unlink()
    os.kill(active.session_id, signal.SIGKILL)
    wait_for(lambda: replicas.active and replicas.active[0] is not active, "a successor")
    assert replicas._keeper.launched_count > launched


def test_start_ends_at_once_when_it_is_stopped(stage: Stage) -> None:
    (stage.folder / "mute").touch()
    replicas = stage.make(1, 0)
    stopper = threading.Timer(0.5, replicas.stop)
    stopper.start()
    began = time.monotonic()
    with pytest.raises(ReplicaError, match="stopped while it started"):
        replicas.start(timeout_s=BOUND_S)
    assert time.monotonic() - began < BOUND_S / 2
    stopper.join()


def test_nothing_is_left_when_stopped_while_engines_start(stage: Stage) -> None:
    (stage.folder / "mute").touch()
    replicas = stage.make(1, 1)
    with pytest.raises(ReplicaError, match="not ready"):
        replicas.start(timeout_s=1.5)
