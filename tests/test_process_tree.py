"""serving/process_tree.py: nobody escapes, nobody else is hit, no name is left.

Invariants: children, grandchildren, processes in a session of their own and orphans are found and killed; stopped ones too; a bystander
lives; shared memory that the tree mapped is gone, the bystander's stays.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory

import pytest

from concordia.serving.process import read_process
from concordia.serving.process_tree import MARKER_ENV, ProcessTree, become_subreaper
from concordia.serving.shared_names import SHARED_MEMORY

BOUND_S = 20.0

# Each program writes its process id to a file named by its role, so that a test knows who must die.
PROGRAM = """
import os, pathlib, signal, sys, time, subprocess
from multiprocessing import shared_memory
folder, role = pathlib.Path(sys.argv[1]), sys.argv[2]
def start(role, **options):
    return subprocess.Popen([sys.executable, __file__, str(folder), role], **options)
if role == "leader":
    start("child"); start("away", start_new_session=True)
    start("shared")
elif role == "child":
    start("grandchild")
elif role == "away":
    start("orphan", start_new_session=True)
elif role == "shared":
    block = shared_memory.SharedMemory(create=True, size=4096)
    (folder / "name").write_text(block.name)
(folder / (role + ".partial")).write_text(str(os.getpid()))
(folder / (role + ".partial")).rename(folder / role)
if role == "away":
    os._exit(0)  # leaves its child an orphan in a session of its own
time.sleep(300)
"""
ROLES = ("leader", "child", "grandchild", "orphan", "shared")


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}"
        os.sched_yield()


@pytest.fixture(scope="module", autouse=True)
def subreaper() -> None:
    become_subreaper()


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> Iterator[tuple[ProcessTree, dict[str, int]]]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    marker = f"test-{os.getpid()}-{time.monotonic_ns()}"
    leader = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), "leader"],
        start_new_session=True,
        env={**os.environ, MARKER_ENV: marker},
    )
    wait_for(lambda: all((tmp_path / role).exists() for role in ROLES), "all processes")
    wait_for(lambda: not is_alive(int((tmp_path / "away").read_text())), "the orphan's parent gone")
    found = ProcessTree(leader.pid, marker)
    yield found, {role: int((tmp_path / role).read_text()) for role in ROLES}
    found.kill(timeout_s=BOUND_S)
    found.close()
    (SHARED_MEMORY / (tmp_path / "name").read_text().lstrip("/")).unlink(missing_ok=True)
    leader.wait(BOUND_S)


def is_alive(pid: int) -> bool:
    process = read_process(pid)
    return process is not None and process.is_alive


def test_every_process_is_found_when_some_started_sessions_of_their_own(
    tree: tuple[ProcessTree, dict[str, int]],
) -> None:
    found, roles = tree
    members = {p.pid for p in found.members}
    assert set(roles.values()) <= members
    assert found.members[0].pid == roles["leader"]
    assert os.getpid() not in members
    assert all(found.pidfd(pid) is not None for pid in roles.values())


def test_nobody_lives_and_a_bystander_does_when_the_tree_is_killed(
    tree: tuple[ProcessTree, dict[str, int]],
) -> None:
    found, roles = tree
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    os.kill(roles["grandchild"], signal.SIGSTOP)
    started = time.monotonic()
    assert found.kill(timeout_s=5.0) >= len(ROLES)
    seconds = time.monotonic() - started
    assert [role for role, pid in roles.items() if is_alive(pid)] == []
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait(BOUND_S)
    assert seconds < 2.0
    assert found.kill(timeout_s=5.0) == 0


def test_orphan_is_found_by_its_marker_when_it_escaped_before_the_first_look(
    tree: tuple[ProcessTree, dict[str, int]],
) -> None:
    found, roles = tree
    os.kill(roles["leader"], signal.SIGKILL)
    wait_for(lambda: not is_alive(roles["leader"]), "leader gone")
    assert roles["orphan"] in {p.pid for p in found.refresh()}
    assert roles["grandchild"] in {p.pid for p in found.refresh()}


def test_shared_memory_goes_and_a_bystanders_stays_when_the_tree_is_dead(
    tree: tuple[ProcessTree, dict[str, int]], tmp_path: pathlib.Path
) -> None:
    found, _ = tree
    name = (tmp_path / "name").read_text().lstrip("/")
    mine = shared_memory.SharedMemory(create=True, size=4096)
    try:
        found.record_shared_names()
        found.kill(timeout_s=5.0)  # the tracker too, so that nobody else removes the name
        assert (SHARED_MEMORY / name).exists()
        assert name in found.remove_shared_names()
        assert not (SHARED_MEMORY / name).exists()
        assert (SHARED_MEMORY / mine.name.lstrip("/")).exists()
    finally:
        mine.close()
        mine.unlink()


def test_tracker_cleans_up_when_it_is_spared(
    tree: tuple[ProcessTree, dict[str, int]], tmp_path: pathlib.Path
) -> None:
    found, _ = tree
    name = (tmp_path / "name").read_text().lstrip("/")
    helpers = found.helpers()
    assert helpers
    found.kill(timeout_s=5.0, spare=[p.pid for p in helpers])
    found.wait_helpers(timeout_s=BOUND_S)
    assert found.members == []
    assert not (SHARED_MEMORY / name).exists()
