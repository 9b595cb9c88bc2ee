"""Store marks in machine code on a GPU.

Invariants: random kernels, every form of store that one GPU can run, and kernels with early exits, divergent loops, jump tables, atomics
and pipelines leave the same bytes with and without marks; the marked pages are exactly those of a reference, for windows that cover all,
a part and nothing, for two sizes of pages and for offsets beyond 32 bits; a launch in a graph does the same.
"""

from __future__ import annotations

import os
import random

import pytest
import scenarios_sass_marks
from child import run
from splice_kernels import KERNELS, LEFT

PROGRAMS = int(os.environ.get("CONCORDIA_TEST_PROGRAMS", "150"))
BOUND_S = 60.0  # some 5 to 10 s; a kernel that hangs is named after hook_stage.ENDS_S, what else hangs is ended then


def test_marks_are_those_of_the_reference_when_random_kernels_run() -> None:
    seed = int(os.environ.get("CONCORDIA_TEST_SEED", "0")) or random.randrange(1 << 30)
    print(f"seed {seed}")
    answer = run("scenarios_sass_marks:random_kernels", BOUND_S, seed=seed, count=PROGRAMS)
    print(answer)
    assert answer["wrong"] == []
    assert answer["marked"] > PROGRAMS // 5
    assert answer["pages"] > answer["marked"]


def test_every_form_of_store_marks_its_page_when_it_runs() -> None:
    answer = run("scenarios_sass_marks:forms", BOUND_S)
    print(answer)
    assert answer["wrong"] == []
    assert answer["forms"] > 25


def test_pages_are_those_that_change_when_control_flow_is_not_simple() -> None:
    answer = run("scenarios_sass_marks:cases", BOUND_S)
    print(answer)
    assert answer["wrong"] == []
    assert answer["marked"] == len(scenarios_sass_marks.CASES) * len(scenarios_sass_marks.SHIFTS)


def test_pages_are_those_of_the_stores_when_they_lie_beyond_4_gib() -> None:
    answer = run("scenarios_sass_marks:far_offsets", BOUND_S)
    print(answer)
    assert [window["wrong"] for window in answer["windows"]] == [[], [], []]
    assert all(window["wanted"] for window in answer["windows"])
    assert answer["bytes_wrong"] == []


def test_kernels_write_the_same_and_no_page_is_missed_when_launched_or_in_a_graph() -> None:
    pytest.importorskip("triton", reason="triton is not installed: its wheel has the assembler of CUDA 12")
    answer = run("scenarios_sass_marks:kernels_of_hooks", BOUND_S)
    print(answer)
    assert answer["wrong"] == []
    assert answer["left"] == {f"{name} {generation}": reason for name, reason in LEFT.items() for generation in scenarios_sass_marks.GENERATIONS}
    assert answer["marked"] == len(KERNELS) * len(scenarios_sass_marks.GENERATIONS) - len(answer["left"])
