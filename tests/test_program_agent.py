"""integrations/program: a program that knows nothing of us, killed and resumed, with a real journal owner and a real agent, on a driver in C.

Invariants: what a resumed program prints is what an unfailed one prints, line for line, wherever it was killed and however often; a program that
ends well leaves nothing; one that is not the same program, or has another policy, is refused before it computes anything; an agent that dies
costs the protection alone.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from concordia import config
from concordia.errors import (
    Corruption,
    EnvironmentRefused,
    LayoutMismatch,
    RecoveryError,
    UsageError,
)
from concordia.integrations.program.policy import Policy, parse_policy
from concordia.integrations.program.program_pages import Board
from concordia.integrations.program.protection import Protection, reads_path
from concordia.journal.client import JournalClient
from protected_ground import LIFE_S, ProtectedGround, build, marking_run
from waiting import until

POLICY = """
[program]
series = "trained"
audit_every = 1
[journal]
place = "{place}"
size = "96MiB"
linger_s = 60
[limits]
stage = "32MiB"
reads = "1MiB"
[[region]]
name = "big"
size = ["1MiB", "4MiB"]
[[trigger]]
on = "kernel:update"
"""
SOURCE = Path(__file__).parents[1] / "src"
LONG = "1000000"  # steps of a program that is killed before
PYTHON_PROGRAM = Path(__file__).parent / "protected_child.py"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> ProtectedGround:
    return build(tmp_path_factory.mktemp("agent"))


@pytest.fixture
def policy() -> Iterator[Policy]:
    place = Path("/dev/shm") / f"concordia-agent-{os.getpid()}-{random.randrange(1 << 30)}"
    found = parse_policy(POLICY.format(place=place), "test.toml")
    yield found
    if place.exists():
        with JournalClient.connect(place) as client:
            client.shutdown()
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(reads_path(found).parent, ignore_errors=True)


class Life:
    """One run of the program under its policy."""

    def __init__(self, ground: ProtectedGround, policy: Policy, *words: str, program: list[str] | None = None, **environment: str) -> None:
        self.protection = Protection.open(policy)
        self.process = ground.start(*words, program=program, **(self.protection.environment() | environment))
        self.lines: list[str] = []
        self.errors = ""
        self.report: dict[str, Any] = {}

    def end(self) -> int:
        said, self.errors = self.process.communicate(timeout=LIFE_S)
        self.lines += said.splitlines()
        self.report = self.protection.end(self.process.returncode)
        return self.process.returncode

    def kill_after(self, lines: int, *, commits: int = 2) -> None:
        """SIGKILL once it has printed so many lines and so much was committed of it, wherever it is then."""
        assert self.process.stdout is not None
        board = Board(self.protection.folder / "board", self.protection.policy.stage_bytes)
        deadline = time.monotonic() + LIFE_S
        while len(self.lines) < lines or board.word("taken") < commits:
            assert time.monotonic() < deadline
            self.lines.append(self.process.stdout.readline().rstrip("\n"))
        self.regions = {region.name: region.address for region in board.regions()}
        board.close()
        self.process.kill()
        self.lines += self.process.stdout.read().splitlines()  # with what was read ahead, which communicate() would lose
        assert self.end() == -signal.SIGKILL


def plain_run(ground: ProtectedGround, steps: int) -> list[str]:
    said, errors = ground.start("train", str(steps), shimmed=False).communicate(timeout=LIFE_S)
    assert errors == ""
    return said.splitlines()


def resumed_at(life: Life) -> tuple[int, int]:
    found = re.search(r"resumed at point (\d+): \d+ regions, (\d+) launches left out", life.errors)
    assert found, life.errors
    return int(found[1]), int(found[2])


def test_resumed_program_says_what_an_unfailed_one_says_when_it_was_killed_in_a_step(ground: ProtectedGround, policy: Policy) -> None:
    killed = Life(ground, policy, "train", LONG)
    killed.kill_after(100)
    steps = len(killed.lines) + 50
    wanted = plain_run(ground, steps)
    assert killed.lines == wanted[: len(killed.lines)]
    assert killed.report["missed_pages"] == 0
    assert killed.report["lost"] == ""
    resumed = Life(ground, policy, "train", str(steps))
    assert resumed.protection.resumed is not None
    assert resumed.end() == 0, resumed.errors
    assert resumed.lines == wanted
    point, left_out = resumed_at(resumed)
    assert point == resumed.protection.resumed.ordinal
    assert left_out > 0
    assert point > 1
    third = Life(ground, policy, "train", "3")
    assert third.protection.resumed is None, "it has ended well: nothing is kept"
    third.end()


def test_resumed_program_has_its_memory_when_it_frees_and_allocates_on_its_way(ground: ProtectedGround, policy: Policy) -> None:
    killed = Life(ground, policy, "train", LONG)
    killed.kill_after(300)
    steps = len(killed.lines) + 10
    resumed = Life(ground, policy, "train", str(steps), FAKE_BYTES=str(40 << 20))  # twice what it has at a time; it frees three times that
    assert resumed.end() == 0, resumed.errors
    assert resumed.lines == plain_run(ground, steps)
    assert resumed_at(resumed)[1] > 0


@pytest.mark.parametrize("is_kept", [True, False])
def test_regions_have_their_addresses_when_the_policy_keeps_them(ground: ProtectedGround, policy: Policy, is_kept: bool) -> None:
    """Of all sizes: three of the first five share pages with each other."""
    keeping = replace(policy, keep_addresses=is_kept, regions=(replace(policy.regions[0], size_min=1),))
    addresses: list[list[int]] = []
    lines: list[str] = []
    for skew in (0, (3 << 20) + 128):  # where the driver's own memory begins: no address of it comes twice
        life = Life(ground, keeping, "train", LONG, FAKE_SKEW=str(skew))
        life.kill_after(len(lines) + 60)
        addresses.append([life.regions[f"big.{i}"] for i in range(5)])  # the next are from the driver's pool
        lines = life.lines
    assert [first == second for first, second in zip(*addresses, strict=True)] == [is_kept] * 5
    last = Life(ground, keeping, "train", str(len(lines) + 10), FAKE_SKEW=str((5 << 20) + 256))
    assert last.end() == 0, last.errors
    assert last.lines == plain_run(ground, len(lines) + 10)
    assert f"{1 if is_kept else 6} regions have other addresses" in last.errors, last.errors
    named = r"region big\.\d+ of 1\d+ bytes was at 0x6\w+ and is at 0x6\w+: allocated by cuMemAllocAsync, which is not kept"
    assert len(re.findall(named, last.errors)) == is_kept, last.errors


def test_program_gets_memory_at_kept_addresses_until_there_is_none(ground: ProtectedGround, policy: Policy) -> None:
    killed = Life(ground, replace(policy, keep_addresses=True), "train", LONG)  # copies of what it frees stay while an agent is slow
    killed.kill_after(300)
    steps = len(killed.lines) + 10
    resumed = Life(ground, replace(policy, keep_addresses=True), "train", str(steps), FAKE_BYTES=str(40 << 20))
    assert resumed.end() == 0, resumed.errors
    assert resumed.lines == plain_run(ground, steps)


def test_resumed_program_says_the_same_when_it_is_killed_again_and_again(ground: ProtectedGround, policy: Policy) -> None:
    seed = int(os.environ.get("AGENT_SEED", random.randrange(1 << 30)))
    print(f"AGENT_SEED={seed}")
    rng = random.Random(seed)
    lives = []
    for _ in range(4):
        life = Life(ground, policy, "train", LONG, FAKE_SEED=str(rng.randrange(1 << 20)))
        resumed = life.protection.resumed
        life.kill_after((resumed.ordinal if resumed else 0) + rng.randint(20, 90))
        assert life.report["lost"] == ""
        assert life.report["missed_pages"] == 0
        lives.append(life)
    steps = max(len(life.lines) for life in lives) + 40
    last = Life(ground, policy, "train", str(steps), FAKE_SEED=str(rng.randrange(1 << 20)))
    assert last.end() == 0, last.errors
    wanted = plain_run(ground, steps)
    assert last.lines == wanted
    for life in lives:
        assert life.lines == wanted[: len(life.lines)]
    points = [life.protection.resumed.ordinal for life in lives[1:] if life.protection.resumed]
    assert len(points) == 3
    assert points == sorted(set(points))
    print(f"resumed at {points} and {resumed_at(last)}")


def test_python_program_is_resumed_when_it_was_killed(ground: ProtectedGround, policy: Policy) -> None:
    named = replace(policy, regions=(replace(policy.regions[0], stack="make_state"),))
    program = [sys.executable, str(PYTHON_PROGRAM)]
    killed = Life(ground, named, LONG, program=program)
    killed.kill_after(60)
    assert [row["name"] for row in killed.report["regions"]] == ["big.0", "big.1"]
    steps = len(killed.lines) + 20
    resumed = Life(ground, named, str(steps), program=program)
    assert resumed.end() == 0, resumed.errors
    wanted = Life(ground, replace(named, series="unfailed"), str(steps), program=program)
    assert wanted.end() == 0, wanted.errors
    assert resumed.lines == wanted.lines
    assert len(wanted.lines) == steps
    assert resumed_at(resumed)[1] > 0


def test_resume_is_refused_when_the_program_or_its_log_is_another(ground: ProtectedGround, policy: Policy) -> None:
    killed = Life(ground, policy, "train", LONG)
    killed.kill_after(20)
    with pytest.raises(LayoutMismatch, match="another policy"):
        Protection.open(replace(policy, warm_points=7))
    other = Life(ground, policy, "dirty", "100", PROGRAM_SNAPSHOTS="/dev/null")
    assert other.end() == 70
    assert "cannot resume: up to point 1 the program has launched something else" in other.errors
    reads = reads_path(policy)
    log = bytearray(reads.read_bytes())
    log[4096 + 32] ^= 1
    reads.write_bytes(log)
    with pytest.raises(Corruption, match="not as it was saved"):
        Protection.open(policy)
    log[4096 + 32] ^= 1
    reads.write_bytes(log)
    steps = len(killed.lines) + 20
    again = Life(ground, policy, "train", str(steps))
    assert again.end() == 0, again.errors
    assert again.lines == plain_run(ground, steps)
    killed = Life(ground, policy, "train", LONG)
    killed.kill_after(20)
    reads.unlink()
    with pytest.raises(RecoveryError, match="is gone"):
        Protection.open(policy)


@pytest.mark.parametrize(("before", "after"), [({}, {"PROGRAM_PLACE": "other"}), ({"PROGRAM_GRAPH": "0"}, {"PROGRAM_GRAPH": "64"})], ids=["launches", "graphs"])
def test_resume_is_refused_when_the_program_has_its_numbers_in_other_places(
    ground: ProtectedGround, policy: Policy, before: dict[str, str], after: dict[str, str]
) -> None:
    """Kernels are left out until the point, and reads answered: only their arguments tell."""
    killed = Life(ground, policy, "train", LONG, **before)
    killed.kill_after(20)
    other = Life(ground, policy, "train", LONG, **after)
    assert other.end() == 70
    assert "or on other places of its regions" in other.errors
    again = Life(ground, policy, "train", str(len(killed.lines) + 20), **before)
    assert again.end() == 0, again.errors
    assert again.lines[: len(killed.lines)] == killed.lines


def test_memory_comes_in_the_same_order_when_points_came_before_it_and_when_none_did(ground: ProtectedGround, policy: Policy, tmp_path: Path) -> None:
    """What points need is there with the first region; the second one comes behind the first point, which a resumed program has not."""
    marking, found = marking_run(tmp_path), []
    for lines in (30, 60):
        life = Life(ground, policy, "train", LONG, **marking)
        life.kill_after(lines)
        found.append(life.regions["big.1"])
    assert found[0] == found[1]


def test_resume_is_refused_when_an_asynchronous_read_of_the_first_points_is_another(ground: ProtectedGround, policy: Policy) -> None:
    second = replace(policy, warm_points=2)  # the first step reads before its second point, and asynchronously
    killed = Life(ground, second, "train", LONG)
    killed.kill_after(20)
    other = Life(ground, second, "train", "200", PROGRAM_FILL="other")
    assert other.end() == 70
    assert other.lines == []
    assert "cannot resume: the program computes other bytes than it once did" in other.errors


def test_program_goes_on_when_its_agent_is_killed(ground: ProtectedGround, policy: Policy) -> None:
    life = Life(ground, policy, "train", "300")
    assert life.process.stdout is not None
    life.lines.append(life.process.stdout.readline().rstrip("\n"))
    life.protection._agent.kill()
    assert life.end() == 0
    assert life.lines == plain_run(ground, 300)


def test_next_start_goes_on_when_the_agent_was_killed_and_the_program_has_ended_well(
    ground: ProtectedGround, policy: Policy, capfd: pytest.CaptureFixture[str]
) -> None:
    life = Life(ground, policy, "train", "900")
    board = Board(life.protection.folder / "board", policy.stage_bytes)
    until(lambda: board.word("taken") >= 2, LIFE_S)
    board.close()
    life.protection._agent.kill()
    assert life.end() == 0
    assert "the checkpoints of trained are still there" in capfd.readouterr().err
    again = Life(ground, policy, "train", "900")
    assert again.protection.resumed is not None
    assert again.end() == 0, again.errors
    assert again.lines == life.lines == plain_run(ground, 900)
    assert not reads_path(policy).exists()


def test_second_run_of_a_series_is_refused_when_the_first_is_there(ground: ProtectedGround, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "PROGRAM_LOCK_S", 0.2)
    life = Life(ground, policy, "train", "30")
    before = reads_path(policy).stat().st_ino
    with pytest.raises(UsageError, match="another run has series trained"):
        Protection.open(policy)
    assert reads_path(policy).stat().st_ino == before
    other = Life(ground, replace(policy, series="other"), "train", "30")
    assert (life.end(), other.end()) == (0, 0)
    assert life.lines == other.lines == plain_run(ground, 30)


def test_program_says_why_it_is_unprotected_when_the_journal_is_full(ground: ProtectedGround, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "PROGRAM_COMMIT_S", 0.5)
    life = Life(ground, replace(policy, journal_bytes=8 << 20), "train", "1500")
    assert life.end() == 0, life.errors
    assert life.lines == plain_run(ground, 1500)
    assert "the journal has no room left" in life.report["lost"]
    assert "concordia: unprotected from here on: " in life.errors


def test_nothing_is_compiled_beside_a_program_when_the_cache_was_empty(
    ground: ProtectedGround, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONCORDIA_CACHE", str(tmp_path))
    Protection.open(policy).end(1)
    compiled = {path.name for path in tmp_path.rglob("*.so")}
    assert compiled
    Life(ground, policy, "train", LONG).kill_after(20)
    assert {path.name for path in tmp_path.rglob("*.so")} == compiled


def test_program_is_not_started_when_its_agent_finds_no_compiler(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONCORDIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EnvironmentRefused, match="no agent"):
        Protection.open(policy)
    errors = capfd.readouterr().err
    assert errors.startswith("concordia: ")
    assert errors.count("\n") == 1
    assert "compiler" in errors


def test_report_says_what_was_marked_and_what_had_changed(ground: ProtectedGround, policy: Policy) -> None:
    life = Life(ground, policy, "train", LONG)
    life.kill_after(60, commits=12)  # of which those that begin with a larger stage have all pages
    rows = life.report["regions"]
    assert {row["name"] for row in rows} >= {"big.0", "big.1"}
    for row in rows:
        assert row["pages_changed"] <= row["pages_marked"] <= row["posts"] * row["pages"]
    assert any(row["pages_changed"] for row in rows)
    assert json.dumps(life.report)


def test_no_process_and_no_folder_stays_when_a_program_has_ended(ground: ProtectedGround, policy: Policy) -> None:
    life = Life(ground, policy, "train", "5")
    folder, agent = life.protection.folder, life.protection._agent
    assert folder.exists()
    life.end()
    assert not folder.exists()
    assert agent.returncode is not None
    assert not reads_path(policy).exists()
    assert subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, check=False).stdout == b""


LAUNCHER = """
import sys, time
from concordia.integrations.program.policy import parse_policy
from concordia.integrations.program.protection import Protection
print(Protection.open(parse_policy(sys.argv[1], "test.toml")).folder, flush=True)
time.sleep(60)
"""


def test_folder_in_memory_is_removed_when_the_launcher_is_killed(policy: Policy) -> None:
    text = POLICY.format(place=policy.journal)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, text], env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    folder = Path(launcher.stdout.readline().strip())
    assert (folder / "board").exists()
    launcher.kill()
    launcher.communicate(timeout=LIFE_S)
    until(lambda: not folder.exists(), LIFE_S)  # the agent may not even have begun


@pytest.fixture
def runs() -> Iterator[Path]:
    """A path that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="runs-", dir="/tmp") as folder:
        yield Path(folder)


def command_line(ground: ProtectedGround, folder: Path, policy: Path, *words: str) -> subprocess.Popen[str]:
    environment = ground.environment(shimmed=False)
    more = {"PYTHONPATH": str(SOURCE), "CONCORDIA_RUN_DIR": str(folder), "CONCORDIA_CACHE": os.environ.get("CONCORDIA_CACHE", str(folder / "cache"))}
    command = [sys.executable, "-m", "concordia.cli", "run", "--policy", str(policy), "--", str(ground.program), *words]
    return subprocess.Popen(command, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_command_line_resumes_a_program_when_it_was_killed(ground: ProtectedGround, policy: Policy, runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY.format(place=policy.journal) + "[images]\nentry_hooks = false\nstore_marks = false\n")
    launcher = command_line(ground, runs, path, "train", LONG)
    assert launcher.stdout is not None
    lines = [launcher.stdout.readline().rstrip("\n") for _ in range(400)]
    assert lines[-1], launcher.communicate(timeout=LIFE_S)
    (program,) = [child for child in psutil.Process(launcher.pid).children() if child.cmdline()[0] == str(ground.program)]
    program.kill()
    lines += launcher.stdout.read().splitlines()  # what was read ahead of the last line, too
    _, errors = launcher.communicate(timeout=LIFE_S)
    assert launcher.returncode == -signal.SIGKILL, errors
    steps = len(lines) + 30
    resumed = command_line(ground, runs, path, "train", str(steps))
    said, errors = resumed.communicate(timeout=LIFE_S)
    assert resumed.returncode == 0, errors
    wanted = plain_run(ground, steps)
    assert said.splitlines() == wanted
    assert lines == wanted[: len(lines)]
    assert "concordia: resumed at point" in errors
    (newest, *_) = sorted((runs / "runs").iterdir(), key=lambda found: -found.stat().st_mtime)
    about = json.loads((newest / "about.json").read_text())
    assert about["protection"]["lost"] == ""
    assert not reads_path(policy).exists()


@pytest.mark.parametrize("commits", [0, 3])
def test_series_is_resumed_when_a_program_lives_on_whose_launcher_was_killed(
    ground: ProtectedGround, policy: Policy, runs: Path, tmp_path: Path, commits: int
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY.format(place=policy.journal) + "[images]\nentry_hooks = false\nstore_marks = false\n")
    launcher = command_line(ground, runs, path, "train", LONG)
    assert launcher.stdout is not None
    assert launcher.stdout.readline(), launcher.communicate(timeout=LIFE_S)
    children = psutil.Process(launcher.pid).children()
    (program,) = [child for child in children if child.cmdline()[0] == str(ground.program)]
    (folder,) = [Path(child.cmdline()[-1]) for child in children if "agent" in child.cmdline()[2]]
    board = Board(folder / "board", policy.stage_bytes)
    deadline = time.monotonic() + LIFE_S
    while board.word("taken") < commits:
        assert time.monotonic() < deadline
        assert launcher.stdout.readline()
    launcher.kill()
    launcher.wait(LIFE_S)
    board.close()
    life = Life(ground, parse_policy(path.read_text(), "test.toml"), "train", "40")
    assert life.protection.resumed is not None or not commits
    assert life.end() == 0, life.errors
    assert life.lines == plain_run(ground, 40)
    assert program.is_running(), "a program of before is ended by a later one"
    assert program.status() != psutil.STATUS_ZOMBIE
    program.kill()


def test_command_line_says_one_line_when_the_policy_is_wrong(ground: ProtectedGround, runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[journal]\nplaces = 1\n")
    said, errors = (refused := command_line(ground, runs, path, "train", "3")).communicate(timeout=LIFE_S)
    assert (refused.returncode, said) == (2, "")
    assert errors.count("\n") == 1
    assert "policy.toml:2: journal.places: no such key" in errors
