"""Store marks in Triton's kernels under `concordia run`, on a GPU.

Invariants: the kernels leave the bytes that they leave without us, cold and from Triton's cache; every one that Triton compiled is reported
with entry hook and marks; a run without marks, and one without us, never loads a marked one; pages that a marked kernel stores to are marked
and no others (random kernels, against their reference). real_kernels.py is the program.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
from typing import Any

import pytest
from child import HERE, run

ROOT = HERE.parent.parent
PROGRAM = str(HERE / "real_kernels.py")
TIMEOUT_S = 240.0
KERNELS = {"_add", "_softmax", "_matmul"}
PROGRAMS = int(os.environ.get("CONCORDIA_TEST_PROGRAMS", "100"))


class Caches:
    """Of Triton, and of images; a run folder of our own, so that the last run is this test's."""

    def __init__(self, folder: pathlib.Path) -> None:
        paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("CONCORDIA", "TRITON"))}
        self.triton = folder / "triton"
        self.runs = folder / "runs"
        self.environment = clean | {
            "PYTHONPATH": paths, "CONCORDIA_CACHE": str(folder / "images"), "CONCORDIA_RUN_DIR": str(self.runs), "TRITON_CACHE_DIR": str(self.triton),
        }  # fmt: skip

    def say(self, words: list[str]) -> str:
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment, start_new_session=True)
        try:
            said, complaints = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            said, complaints = child.communicate(timeout=10)
            raise AssertionError(f"no end within {TIMEOUT_S} s:\n{said[-2000:]}\n{complaints[-4000:]}") from None
        assert child.returncode == 0, f"ended with {child.returncode}:\n{said[-2000:]}\n{complaints[-4000:]}"
        return said

    def digests(self, *hooks: str) -> dict[str, str]:
        """What the program says, with these hooks, or without us."""
        front = [sys.executable, "-m", "concordia.cli", "run", "--hooks", ",".join(hooks), "--"] if hooks else []
        found = json.loads(self.say([*front, sys.executable, PROGRAM, "triton"]).strip().splitlines()[-1])
        assert not found["missing"]
        digests: dict[str, str] = found["digests"]
        return digests

    def kernels(self) -> dict[str, dict[str, Any]]:
        """Triton's, of the last run, by name."""
        found = json.loads(self.say([sys.executable, "-m", "concordia.cli", "modules", "--json"]))
        print("notes", found["notes"])
        kernels = {}
        for image in found["images"]:
            for kernel in image["kernels"] or ():
                if kernel["name"] in KERNELS:
                    kernels[kernel["name"]] = kernel | {"outcome": image["outcome"], "why": image["why"]}
        return kernels

    def marked(self) -> int:
        """Cubins in Triton's cache that have our table."""
        return sum(b"__concordia_hooks" in path.read_bytes() for path in self.triton.rglob("*.cubin"))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    return Caches(tmp_path_factory.mktemp("c"))


@pytest.fixture(scope="module")
def plain(caches: Caches) -> dict[str, str]:
    first, second = caches.digests(), caches.digests()
    assert first == second, "the program does not repeat itself"
    assert len(first) == len(KERNELS)
    assert caches.marked() == 0
    return first


@pytest.mark.parametrize("turn", ["cold", "from Triton's cache"])
def test_kernels_are_marked_and_leave_the_same_bytes_under_us(plain: dict[str, str], caches: Caches, turn: str) -> None:
    assert caches.digests("entry", "marks") == plain, turn
    found = caches.kernels()
    print(found)
    assert {name: (kernel["outcome"], kernel["hooks"]) for name, kernel in found.items()} == {
        name: ("rewritten", ["entry", "marks"]) for name in KERNELS
    }
    assert caches.marked() == len(KERNELS)


def test_kernels_have_no_marks_when_none_are_asked_for(plain: dict[str, str], caches: Caches) -> None:
    assert caches.digests("entry", "marks") == plain
    assert caches.digests("entry") == plain
    assert {name: kernel["hooks"] for name, kernel in caches.kernels().items()} == {name: ["entry"] for name in KERNELS}
    assert caches.digests() == plain


def test_marked_kernels_do_nothing_when_nobody_fills_in_their_word(plain: dict[str, str], caches: Caches) -> None:
    """As if Triton's cache were handed on to a program without us."""
    assert caches.digests("entry", "marks") == plain
    exchanged = 0
    by_name: dict[str, dict[bool, list[pathlib.Path]]] = {}
    for path in caches.triton.rglob("*.cubin"):
        by_name.setdefault(path.name, {}).setdefault(b"__concordia_hooks" in path.read_bytes(), []).append(path)
    originals = {path: path.read_bytes() for kinds in by_name.values() for path in kinds.get(False, [])}
    try:
        for kinds in by_name.values():
            for path in kinds.get(False, []):
                path.write_bytes(kinds[True][0].read_bytes())
                exchanged += 1
        assert exchanged == len(KERNELS)
        assert caches.digests() == plain
    finally:
        for path, content in originals.items():
            path.write_bytes(content)


def test_marks_are_those_of_the_reference_when_an_assembler_compiled_them() -> None:
    seed = int(os.environ.get("CONCORDIA_TEST_SEED", "0")) or random.randrange(1 << 30)
    print(f"seed {seed}")
    answer = run("scenarios_triton:random_kernels", 110.0, seed=seed, count=PROGRAMS)
    print(answer)
    assert answer["wrong"] == []
    assert answer["programs"] == PROGRAMS
    assert answer["pages"] > PROGRAMS
