"""native/park.c: who has a kernel that stays is told before each call that waits for the whole GPU, and after it.

Invariants: told once around each such call, of as many as registered, and of no other call; nobody is inside what was unregistered; calls of many
threads nest; a child of fork tells nobody.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from protected_ground import ProtectedGround, build, marking_run
from shim_ground import NATIVE, compile_c


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> ProtectedGround:
    folder = tmp_path_factory.mktemp("park")
    made = build(folder)
    made.program = folder / "park"
    compile_c([str(NATIVE / "park_user.c"), f"-L{made.driver}", "-l:libcuda.so.1", "-ldl"], made.program)
    return made


def lines(ground: ProtectedGround, *, shimmed: bool = True, **environment: str) -> list[str]:
    program = ground.start(shimmed=shimmed, **environment)
    said, errors = program.communicate(timeout=60)
    assert (program.returncode, errors) == (0, "")
    return said.splitlines()


def test_each_call_that_waits_is_told_of_once_when_two_have_registered(ground: ProtectedGround, tmp_path: Path) -> None:
    assert lines(ground, **marking_run(tmp_path)) == [
        "nobody 0 0 0",
        "load 1 1 0",
        "function 0 0 0",
        "first launch 1 1 0",
        "second launch 0 0 0",
        "work 0 0 0",
        "free 1 1 0",
        "free host 1 1 0",
        "unregister 1 1 0",
        "synchronize 1 1 0",
        "dropped 1",
        "unload 0 1 0",
        "first launch of new code 0 1 0",
        "several at once 0 1 0",
        "told in a child 0",
        "dropped 1 0",
        "many 200 0",
    ]


def test_program_finds_nothing_to_register_with_when_there_is_no_shim(ground: ProtectedGround) -> None:
    assert lines(ground, shimmed=False) == ["no shim"]


def test_symbols_of_the_shim_are_hooks_and_its_own_when_it_is_built(ground: ProtectedGround) -> None:
    shim = Path(ground.run, "libcuda.so.1")
    table = subprocess.run(["nm", "-D", "--defined-only", str(shim)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in table.splitlines()}
    assert {"concordia_park_register", "concordia_park_unregister", "cuMemAlloc_v2"} <= names
    assert all(name.startswith(("cu", "concordia_")) for name in names)
