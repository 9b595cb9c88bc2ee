"""The shim before the real driver: names, the pause, and the control block's life.

Invariants: whatever version and stream kind a program asks the resolver for, it gets the hook of exactly the function that the driver
would have given; after a pause the GPU is at rest and launches of others are held, with graphs and captures beside it; at its bound a
pause is given up and says for whom; hooked code of a library goes on as it would without us when its context was reset.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from child import HERE

ROOT = HERE.parent.parent
TIMEOUT_S = 100.0


def run(folder: pathlib.Path, scenario: str, *flags: str, disabled: bool = False) -> tuple[Any, str]:
    """The answer of a scenario under `concordia run`, and what was said beside it."""
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "CONCORDIA_RUN_DIR": str(folder)}
    environment.pop("CONCORDIA_DISABLE", None)
    if disabled:
        environment["CONCORDIA_DISABLE"] = "1"
    program = [sys.executable, str(HERE / "scenarios_gate.py"), scenario]
    done = subprocess.run(
        [sys.executable, "-m", "concordia.cli", "run", *flags, "--verbose", "--", *program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return json.loads(answer.removeprefix("ANSWER ")), done.stderr


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("r", numbered=True)  # short: a socket's path is
    made.chmod(0o700)
    return made


def test_resolver_gives_the_hook_of_each_function_when_any_version_is_asked_for(folder: pathlib.Path) -> None:
    answer, _ = run(folder, "resolver")
    assert answer["missed"] == []
    assert answer["asked"] > 200
    assert answer["hooks"] > 40


@pytest.mark.parametrize("flags", [(), ("--hooks", "entry,marks")])
def test_gpu_is_at_rest_and_launches_are_held_when_it_is_paused(folder: pathlib.Path, flags: tuple[str, ...]) -> None:
    answer, _ = run(folder, "rest", *flags)
    assert answer["total"] == 40
    assert 0 < answer["latency_ns_max"] < 5_000_000_000


def test_pause_is_given_up_in_time_when_a_kernel_does_not_end(folder: pathlib.Path) -> None:
    answer, _ = run(folder, "late")
    assert "not at rest after 0.2 s" in answer["said"]
    assert 0.2 <= answer["seconds"] < 1.5
    assert answer["total"] == 1


def test_captures_and_replays_are_whole_when_it_is_paused_again_and_again(folder: pathlib.Path) -> None:
    answer, _ = run(folder, "graphs")
    assert answer["failures"] == []
    assert answer["total"] == answer["replays"] > 0


def test_library_goes_on_as_without_hooks_when_its_context_was_reset(folder: pathlib.Path) -> None:
    plain, _ = run(folder, "reset", disabled=True)
    hooked, said = run(folder, "reset", "--hooks", "entry,marks")
    assert ": 1 hooked" in said
    assert hooked == plain
    assert plain["values"][0] == 8
