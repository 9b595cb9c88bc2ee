"""cli_run.py: the flags of `concordia run`, read the short way.

Invariants: what it reads is what click reads of the same words; what it does not read is None; a start loads neither click nor what only a parser, a build or a GPU needs, and
leaves the collector of garbage as it was.
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pytest

from concordia.cli_program import run
from concordia.cli_run import RUN_DIR, Asked, plain, start
from concordia.errors import UsageError

pytest_plugins = ["shim_fixtures"]

SOURCE = Path(__file__).parents[1] / "src"
WORDS = (
    *("--hooks", "--hooks=entry", "--hooks=", "entry", "entry,marks", "--policy", "--policy=a=b", "p.toml", "--run-dir", "/r", "--run-dir=/q", "--verbose"),
    *("--verbose=1", "--help", "-h", "-v", "--", "-", "--=", "", "python", "x.py", "--hook", "--no", "run", "a=b", "--policy=--", "-x=1"),
)


def _by_click(words: list[str]) -> Asked | None:
    """None for what is wrong."""
    try:
        context = run.make_context("run", list(words))
    except (click.ClickException, click.exceptions.Exit):
        return None
    found = context.params
    return Asked(found["command"], found["hooks"], found["policy"], found["run_dir"], found["verbose"])


@pytest.mark.parametrize("given", ["", "/from/environment"])
def test_words_mean_what_click_makes_of_them_when_they_are_read_the_short_way(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    source, read = random.Random(seed), 0
    monkeypatch.setenv(RUN_DIR, given)
    for _ in range(4000):
        words = source.choices(WORDS, k=source.randrange(8))
        found = plain(["run", *words], os.environ)
        if found is not None:
            assert found == _by_click(words), words
            read += 1
    assert read > 400


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["run", "--hooks", "entry", "--", "python", "--hooks", "x"], Asked(("python", "--hooks", "x"), "entry")),
        (["run", "--policy=p.toml", "--verbose", "--run-dir", "/r", "a", "--", "b"], Asked(("a", "--", "b"), "", Path("p.toml"), Path("/r"), True)),
        (["run", "true"], Asked(("true",))),
        (["run"], None),
        (["run", "--hooks", "entry"], None),
        (["run", "--help"], None),
        (["run", "--hooks"], None),
        (["modules"], None),
        ([], None),
    ],
)
def test_plain_words_are_read_and_others_left_to_click_when_they_are_given(words: list[str], asked: Asked | None) -> None:
    assert plain(words, {}) == asked


HEAVY = ("click", "numpy", "ctypes", "dataclasses", "inspect", "shutil", "subprocess", "tempfile", "hashlib", "google_crc32c", "concordia.serving")
LOOK = f"""import gc, os, sys
from concordia import cli_run
from concordia.integrations.program import launch
tidy = launch._tidy
def look(run):
    found, before = sorted(set({HEAVY!r}) & set(sys.modules)), gc.isenabled()
    tidy(run)
    print(found, before, gc.isenabled(), flush=True)
launch._tidy = look
launch.architecture = lambda: 90  # as kept of the GPU's model: where there is no GPU, each start asks anew
import concordia.cli
sys.exit(cli_run.start(cli_run.plain(sys.argv[1:], os.environ)))
"""


def test_start_loads_little_when_all_that_is_built_is_there(shim_parts: tuple[Path, Path], tmp_path: Path) -> None:
    driver, _ = shim_parts
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CONCORDIA", "LD_", "FAKE"))}
    with tempfile.TemporaryDirectory(prefix="cnc-", dir="/tmp") as base:  # a socket's path is short
        environment = clean | {"PYTHONPATH": str(SOURCE), "LD_LIBRARY_PATH": str(driver.parent), "CONCORDIA_CACHE": str(tmp_path), RUN_DIR: f"{base}/base"}
        said = []
        for words in (["--", "true"], ["--", "true"], ["--hooks", "entry", "--", "sh", "-c", "exit 3"]):
            done = subprocess.run([sys.executable, "-c", LOOK, "run", *words], env=environment, capture_output=True, text=True, timeout=60, check=False)
            said.append((done.returncode, done.stdout, done.stderr))
    assert "subprocess" in said[0][1], "the first start builds, and the look sees it"
    assert said[1] == (0, "[] False True\n", "")
    assert said[2] == (3, "[] False True\n", "")


def test_garbage_is_collected_again_when_a_start_fails() -> None:
    assert gc.isenabled()
    with pytest.raises(UsageError, match="--hooks other"):
        start(Asked(("true",), "other"))
    assert gc.isenabled()
