"""cli_run.py: the flags of `concordia run`, read the short way.

Invariants: what it reads is what click reads of the same words; what it does not read is None; a start loads neither click nor what only a parser, a build or a GPU needs.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import click
import pytest

from concordia.cli_program import run
from concordia.cli_run import RUN_DIR, Asked, plain

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


def test_start_loads_little_when_its_flags_are_plain() -> None:
    code = (
        "import sys\nfrom concordia import cli_run\nimport concordia.cli, concordia.integrations.program.launch\n"
        "cli_run.plain(['run', 'true'], {})\n"
        "print(sorted({'click', 'numpy', 'ctypes', 'dataclasses', 'shutil', 'subprocess', 'tempfile', 'hashlib', 'google_crc32c', 'concordia.serving'} & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
