"""Plain programs on a GPU, killed and resumed through `concordia run` alone: a LoRA training loop and generation on transformers.

Invariants: the lines of a resumed program are those of an unfailed one, bit for bit, wherever it was killed and however often; no page changed
that was not marked, over all steps that were compared; a resumed program does not compute again what it had computed; one that ends well leaves
nothing; memory whose address is kept is for the program's questions as the driver's own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_S = 240.0  # longest that one life may take; a first start compiles and imports
COUNT = 500  # lines of a whole run
LIFE_LINES = (100, 220)  # of one life until it is killed: the first checkpoint has all pages, and takes as long as many steps
KILLS = int(os.environ.get("CONCORDIA_TEST_KILLS", "2"))  # at two, one is of a program that was resumed itself
PROGRAMS = {"training": ("plain_training.py", "--steps"), "generation": ("plain_generation.py", "--tokens")}
SCAN = "[images]\nentry_hooks = false\nstore_marks = false\n"
TRIGGERS = {
    "synchronize": '[[trigger]]\non = "stream-synchronize"\ninterval_ms = 5\n',
    "adam": '[[trigger]]\non = "kernel:*multi_tensor_apply*:every=3"\n',
}


PLAIN: dict[tuple[str, int], list[str]] = {}  # what runs without us have said


class Place:
    """Policy, journal and run folders of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plain_runs: dict[tuple[str, int], subprocess.Popen[str]] = {}
        self.journal = Path("/dev/shm") / f"concordia-gpu-program-{os.getpid()}"
        self.runs = Path("/tmp") / f"concordia-runs-{os.getpid()}"

    def policy(self, trigger: str, *, images: str = SCAN, audit: int = 1, is_kept: bool = False) -> Path:
        path = self.folder / "policy.toml"
        path.write_text(
            f'[program]\nseries = "plain"\naudit_every = {audit}\nkeep_addresses = {str(is_kept).lower()}\n'
            f'[journal]\nplace = "{self.journal}"\nsize = "6GiB"\nlinger_s = 120\n[limits]\nstage = "1GiB"\n'
            f'[[region]]\nname = "segment"\nsize = ["1B", "1GiB"]\n{TRIGGERS[trigger]}{images}'
        )
        return path

    def environment(self) -> dict[str, str]:
        paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CONCORDIA_RUN_DIR": str(self.runs)}

    def command(self, name: str, count: int, policy: Path | None) -> list[str]:
        script, flag = PROGRAMS[name]
        program = [sys.executable, str(ROOT / "examples" / script), flag, str(count)]
        return program if policy is None else [sys.executable, "-m", "concordia.cli", "run", "--policy", str(policy), "--", *program]

    def start_plain(self, name: str, count: int) -> None:
        """Beside what is tested: `plain` waits for it."""
        if (name, count) not in PLAIN and (name, count) not in self.plain_runs:
            errors = (self.folder / f"plain-{name}").open("w")
            self.plain_runs[name, count] = subprocess.Popen(
                self.command(name, count, None), env=self.environment(), stdout=subprocess.PIPE, stderr=errors, text=True
            )
            errors.close()

    def plain(self, name: str, count: int) -> list[str]:
        """What it says without us: one run of it for all tests."""
        if (name, count) not in PLAIN:
            self.start_plain(name, count)
            run = self.plain_runs[name, count]
            said, _ = run.communicate(timeout=RUN_S)
            assert run.returncode == 0, (self.folder / f"plain-{name}").read_text()[-3000:]
            PLAIN[name, count] = said.splitlines()
        return PLAIN[name, count]

    def report(self) -> dict[str, Any]:
        newest = max((self.runs / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
        return dict(json.loads((newest / "about.json").read_text())["protection"])


class Life:
    """One start of a program through `concordia run`."""

    def __init__(self, place: Place, name: str, count: int, policy: Path) -> None:
        self.errors = place.folder / f"errors-{time.monotonic_ns()}"
        with self.errors.open("w") as file:
            self.launcher = subprocess.Popen(place.command(name, count, policy), env=place.environment(), stdout=subprocess.PIPE, stderr=file, text=True)
        self.script = PROGRAMS[name][0]
        self.lines: list[str] = []

    def read(self, count: int) -> None:
        assert self.launcher.stdout is not None
        while len(self.lines) < count:
            line = self.launcher.stdout.readline()
            assert line, self.errors.read_text()[-3000:]
            self.lines.append(line.rstrip("\n"))

    def kill(self) -> None:
        """The program itself, not its launcher."""
        for child in psutil.Process(self.launcher.pid).children(recursive=True):
            if any(word.endswith(self.script) for word in child.cmdline()):
                child.kill()
                break
        else:
            pytest.fail("the program is not there")
        assert self.end() == -signal.SIGKILL, self.errors.read_text()[-3000:]

    def end(self) -> int:
        try:
            said, _ = self.launcher.communicate(timeout=RUN_S)
        finally:
            if self.launcher.poll() is None:
                self.launcher.kill()
        self.lines += said.splitlines()
        return self.launcher.returncode


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    for run in found.plain_runs.values():
        run.kill()
        run.communicate(timeout=30)
    owner = [sys.executable, "-c", f"from concordia.journal.client import JournalClient as C\nfrom pathlib import Path\nC.connect(Path({str(found.journal)!r})).shutdown()"]
    subprocess.run(owner, env=found.environment(), capture_output=True, timeout=30, check=False)
    shutil.rmtree(found.journal, ignore_errors=True)
    shutil.rmtree(found.journal.with_name(found.journal.name + ".reads"), ignore_errors=True)
    shutil.rmtree(found.runs, ignore_errors=True)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "trigger", "images", "is_kept"),
    [
        ("training", "synchronize", SCAN, False),
        ("training", "adam", SCAN, False),
        ("generation", "synchronize", SCAN, False),
        ("training", "synchronize", "", False),
        ("training", "synchronize", "", True),
        ("generation", "synchronize", "", True),
    ],
    ids=["training", "training-at-a-kernel", "generation", "training-with-hooks", "training-at-kept-addresses", "generation-at-kept-addresses"],
)
def test_resumed_program_says_what_an_unfailed_one_says_when_it_was_killed(place: Place, name: str, trigger: str, images: str, is_kept: bool) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    if name == "generation":
        pytest.importorskip("transformers", reason="transformers is not installed")
    seed = int(os.environ.get("PROGRAM_SEED", random.randrange(1 << 20)))
    print(f"PROGRAM_SEED={seed}")
    rng = random.Random(seed)
    place.start_plain(name, COUNT)
    policy = place.policy(trigger, images=images, is_kept=is_kept)
    reached = 0
    started = time.monotonic()
    for _ in range(KILLS):
        life = Life(place, name, COUNT, policy)
        life.read(min(COUNT - 20, reached + rng.randint(*LIFE_LINES)))
        time.sleep(rng.random() * 0.05)  # anywhere in the next steps
        life.kill()
        print(f"{time.monotonic() - started:.0f} s: killed after {len(life.lines)} lines")
        report = place.report()
        print({key: value for key, value in report.items() if key != "regions"}, life.errors.read_text()[-400:])
        assert report["lost"] == ""
        assert report["missed_pages"] == 0
        assert report["audits"] > 0
        assert life.lines == place.plain(name, COUNT)[: len(life.lines)]
        reached = len(life.lines)
    last = Life(place, name, COUNT, policy)
    assert last.end() == 0, last.errors.read_text()[-3000:]
    assert last.lines == place.plain(name, COUNT)
    errors = last.errors.read_text()
    print(f"{time.monotonic() - started:.0f} s: ended", errors[-1000:])
    assert "concordia: resumed at point" in errors, errors[-3000:]
    assert not is_kept or "have other addresses" not in errors, errors[-3000:]
    report = place.report()
    for row in report["regions"]:
        print(f"{row['name']}: {row['pages_changed']} changed of {row['pages_marked']} marked of {row['posts'] * row['pages']} pages")
    assert report["missed_pages"] == 0
    assert not place.journal.with_name(place.journal.name + ".reads").joinpath("plain").exists(), "it has ended well"


@pytest.mark.timeout(300)
def test_program_is_told_what_the_driver_says_of_its_own_memory_when_addresses_are_kept(place: Place) -> None:
    """The driver itself says what is right: of which sizes its own allocations are, and what it answers when one is freed."""
    program = [sys.executable, str(ROOT / "tests" / "pointers_child.py"), "tell"]
    answers = []
    for before in ([], [sys.executable, "-m", "concordia.cli", "run", "--policy", str(place.policy("synchronize", is_kept=True)), "--"]):
        done = subprocess.run([*before, *program], env=place.environment(), capture_output=True, text=True, timeout=RUN_S / 2, check=False)
        print(done.stdout[-3000:], done.stderr[-2000:])
        assert done.returncode == 0
        assert "unprotected" not in done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        answers.append(json.loads(line.removeprefix("ANSWER ")))
    plain, kept = answers
    for name in ("rows", "ids", "freed"):
        assert kept[name] == plain[name], name
    for name in ("ipc", "capable"):
        assert all(plain[name]), name
        assert not any(kept[name]), name


@pytest.mark.timeout(600)
def test_program_is_refused_when_it_is_another_one(place: Place) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    policy = place.policy("synchronize", audit=0)
    place.start_plain("training", COUNT)
    life = Life(place, "training", COUNT, policy)
    life.read(200)
    life.kill()
    other = Life(place, "generation", 50, policy)
    assert other.end() == 70
    assert "cannot resume" in other.errors.read_text()
    again = Life(place, "training", COUNT, policy)
    assert again.end() == 0, again.errors.read_text()[-3000:]
    assert again.lines == place.plain("training", COUNT)
