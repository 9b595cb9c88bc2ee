"""Store marks and hooks of rewritten PTX on a GPU.

Invariants: several hundred random kernels leave the same bytes with and without hooks, mark exactly the pages of their reference, and
count each block in and out once; so does every form of store, reduction, atomic and copy that one GPU can run by itself.
"""

from __future__ import annotations

import os
import random

from child import run

PROGRAMS = int(os.environ.get("CONCORDIA_TEST_PROGRAMS", "300"))
TIMEOUT_S = 100.0  # some 40 s


def test_marks_are_those_of_the_reference_when_random_kernels_run() -> None:
    seed = int(os.environ.get("CONCORDIA_TEST_SEED", "0")) or random.randrange(1 << 30)
    print(f"seed {seed}")
    answer = run("scenarios_ptx:random_kernels", TIMEOUT_S, seed=seed, count=PROGRAMS)
    print(answer)
    assert answer["wrong"] == []
    assert answer["programs"] == PROGRAMS
    assert answer["pages"] > PROGRAMS


def test_every_form_marks_its_page_when_it_runs() -> None:
    answer = run("scenarios_ptx:forms", TIMEOUT_S)
    print(answer)
    assert answer["wrong"] == []
    assert answer["forms"] > 25
