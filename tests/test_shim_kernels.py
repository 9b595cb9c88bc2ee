"""native/kernels.c, load.c: what is known of a kernel is of the code that its handle means now.

Invariants: every page that a kernel writes is marked when its handle was another kernel's before, when it hides where it writes, and when its
argument points before the region, into the same allocation or what is mapped beside it; a graph that passes nobody ends protection; a file
descriptor that is the program's is not used, though it has the number of one of ours.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from concordia.integrations.program.coverage import read_run
from concordia.integrations.program.native_build import NATIVE as SOURCES
from concordia.integrations.program.run_folder import ProgramRun
from protected_ground import ProtectedGround, build, marking_run, policy_of, protected_folder
from shim_ground import NATIVE, compile_c
from test_shim_tracking import BY_SIZE, Answers

AUDITED = "[program]\naudit_every = 1\n"
TRUSTED = AUDITED + '[images]\ntrust_arguments = ["fill", "update", "axpy"]'


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> ProtectedGround:
    return build(tmp_path_factory.mktemp("learning"), source="learning_program.c")


def life(
    ground: ProtectedGround, folder: Path, mode: str, more: str = AUDITED, *, words: Sequence[str] = (), rules: str = BY_SIZE, **environment: str
) -> tuple[Answers, str]:
    """One program to its end: its points, and what it said on stderr."""
    answers = Answers(folder, protected_folder(folder, policy_of(rules, more=more)))
    said, errors = answers.until_end(program := ground.start(mode, *words, CONCORDIA_PROTECT=str(folder), **environment))
    assert (program.returncode, said) == (0, "done\n"), errors
    return answers, errors


def test_pages_are_marked_when_a_kernel_that_marks_was_unloaded_and_its_handle_is_anothers(ground: ProtectedGround, tmp_path: Path) -> None:
    answers, errors = life(ground, tmp_path / "protect", "reload", **marking_run(tmp_path))
    assert len(answers.posts) == 3
    assert sum(one.pages_marked for one in answers.posts[1].regions) < 2 * 64, "nobody marked for the program"
    assert (answers.board.word("missed_pages"), errors) == (0, "")


def test_launches_are_counted_when_the_handle_was_of_other_code_before(ground: ProtectedGround, tmp_path: Path) -> None:
    run = marking_run(tmp_path)
    life(ground, tmp_path / "protect", "reload", words=("twice",), **run)
    rows = {row.kernel: row.count for row in read_run(ProgramRun(Path(run["CONCORDIA_RUN"]))).unseen}
    assert rows == {"fill": 1}, "of the code that does not mark"


def test_launches_are_counted_once_when_a_child_has_something_to_say(ground: ProtectedGround, tmp_path: Path) -> None:
    run = marking_run(tmp_path)
    life(ground, tmp_path / "protect", "tensor", words=("fork",), **run)
    found = read_run(ProgramRun(Path(run["CONCORDIA_RUN"])))
    assert len(list(Path(run["CONCORDIA_RUN"], "modules").iterdir())) == 2
    assert [(row.kernel, row.count) for row in found.unseen] == [("tensor", 1)]


def test_all_pages_are_marked_when_a_large_parameter_may_hide_where_a_kernel_writes(ground: ProtectedGround, tmp_path: Path) -> None:
    trusted = AUDITED + '[images]\ntrust_arguments = ["fill", "update"]'
    answers, errors = life(ground, tmp_path / "protect", "tensor", trusted)
    assert len(answers.posts) == 3
    assert (answers.board.word("missed_pages"), errors) == (0, "")


@pytest.mark.parametrize("words", [(), ("graph",)])
def test_pages_are_marked_when_an_argument_points_before_a_region_into_its_allocation(ground: ProtectedGround, tmp_path: Path, words: tuple[str, ...]) -> None:
    half = '[[region]]\nname = "half"\nkernel = "axpy"\nargument = 0\nbytes = "1MiB"'
    answers, errors = life(ground, tmp_path / "protect", "part", TRUSTED, words=words, rules=half)
    assert [one.bytes for one in answers.posts[-1].regions] == [1 << 20]
    assert (answers.board.word("missed_pages"), errors) == (0, "")
    assert answers.board.word("audits") == len(answers.posts) > 2


@pytest.mark.parametrize("words", [(), ("first",), ("graph",), ("graph", "first")])
def test_pages_are_marked_when_an_argument_points_into_the_piece_before(ground: ProtectedGround, tmp_path: Path, words: tuple[str, ...]) -> None:
    answers, errors = life(ground, tmp_path / "protect", "pieces", TRUSTED, words=words)
    assert [one.bytes for one in answers.posts[-1].regions] == [1 << 21] * 4
    assert (answers.board.word("missed_pages"), errors) == (0, "")
    before, after = (answers.posts[at].regions for at in (-2, -1))
    assert [two.pages_marked - one.pages_marked for one, two in zip(before, after, strict=True)] == [0, 0, 32, 32], "and no other region"


def test_stretches_are_all_that_is_mapped_side_by_side_when_mappings_come_and_go(tmp_path: Path) -> None:
    seed = int(os.environ.get("MAPPED_SEED", random.randrange(1 << 30)))
    print(f"MAPPED_SEED={seed}")
    program = tmp_path / "mapped"
    compile_c([str(NATIVE / "mapped_random.c"), f"-I{SOURCES}", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], program)
    done = subprocess.run([str(program), str(seed), "20000"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 20000


def test_protection_ends_when_a_graph_is_made_that_the_gpu_may_launch(ground: ProtectedGround, tmp_path: Path) -> None:
    _, errors = life(ground, tmp_path / "protect", "device")
    assert errors == "concordia: unprotected from here on: a graph may be launched by the GPU itself: what it writes then is not marked\n"


def test_protection_ends_when_a_graph_calls_the_host(ground: ProtectedGround, tmp_path: Path) -> None:
    answers, errors = life(ground, tmp_path / "protect", "host")
    assert errors.startswith("concordia: unprotected from here on: a graph calls the host")
    assert errors.count("\n") == 1
    assert answers.board.word("lost") == 1


def test_files_of_the_program_are_left_alone_when_it_has_closed_ours(ground: ProtectedGround, tmp_path: Path) -> None:
    stack = "[[region]]\nname = \"none\"\nstack = \"no_such_function\"\n"
    mine = tmp_path / "mine"
    mine.write_text("what a user wrote")
    trace = tmp_path / "trace"
    trace.touch()
    stale = {"CONCORDIA_STACK_SIGNAL": "10", "CONCORDIA_STACK_FILE": "5", "CONCORDIA_STACK_PATH": str(trace)}
    answers, errors = life(ground, tmp_path / "protect", "closed", AUDITED + stack, PROGRAM_FILE=str(mine), PROGRAM_SIGNAL="10", **stale)
    assert mine.read_text() == "what a user wrote"
    assert (len(answers.posts), errors) == (3, "")


def test_region_is_there_from_its_access_until_its_copies_are_made_when_memory_is_mapped(ground: ProtectedGround, tmp_path: Path) -> None:
    answers, errors = life(ground, tmp_path / "protect", "virtual")
    assert [len(post.regions) for post in answers.posts] == [2, 2, 2, 3, 3]
    assert errors == "concordia: region big.2 is freed: it is no part of later checkpoints\n"
    assert answers.content[answers.posts[4].ordinal][2][:24] == b"".join(value.to_bytes(8, "little") for value in (6, 7, 8))


@pytest.mark.parametrize(("newer", "is_lost"), [("cuMemsetD8", True), ("cuInit", False), ("", False)])
def test_protection_ends_when_a_function_that_writes_is_of_a_version_without_a_hook(
    ground: ProtectedGround, tmp_path: Path, newer: str, is_lost: bool
) -> None:
    names = {"FAKE_NEWER": newer, "PROGRAM_NAMES": "cuInit cuMemsetD8 cuMemFree cuMemcpyHtoD cuLaunchKernel cuStreamCreate"}
    _, errors = life(ground, tmp_path / "protect", "newer", **names)
    wanted = "concordia: unprotected from here on: the driver has a version of cuMemsetD8 that is not watched\n"
    assert errors == (wanted if is_lost else "")
