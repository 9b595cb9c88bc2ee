"""Store marks and hooks of random kernels, against a reference.

Invariants: the rewritten kernel leaves the bytes that the original leaves; it marks exactly the pages that the reference says, for windows
over all, none or part of the memory, and never for shared memory; each block counts in once and out once; a text for an assembler does the
same, and nothing while its word is 0; what comes out assembles for sm_80, sm_90a and sm_100. The same programs run on a GPU in gpu/test_gpu_ptx_marks.py.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import random

import pytest

from concordia.instrument.ptx import rewrite_ptx
from ptx_assembler import assemble
from ptx_generator import BLOCKS, BUFFER_BYTES, THREADS, Program, module, windows
from ptx_machine import ALL_BEFORE, filled, run

PROGRAMS = 12  # some 0.6 s each


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_marks_are_those_of_the_reference_when_a_known_kernel_runs(seed: int) -> None:
    check(seed)


def test_marks_are_those_of_the_reference_when_a_random_kernel_runs() -> None:
    first = int(os.environ.get("CONCORDIA_TEST_SEED", "0")) or random.randrange(1 << 30)
    print(f"seed {first}")
    for seed in range(first, first + PROGRAMS):
        check(seed)


def check(seed: int) -> None:
    """The program of a seed: original, and rewritten under three windows."""
    has_bulk = seed % 2 == 1
    program = Program.random("kernel", seed, has_bulk=has_bulk)
    text = module([program], "sm_90" if has_bulk else "sm_80")
    expected = program.written()
    shape = {"buffer_bytes": BUFFER_BYTES, "threads": THREADS, "blocks": BLOCKS}
    original = run(text, "kernel", **shape)
    assert original.data == bytes(expected.data), "the generator and its reference differ"
    page_shift = 12 if seed % 3 == 0 else 16
    rewritten = filled(rewrite_ptx(text, entry=True, exit=True, marks=True, page_shift=page_shift))
    around = (ALL_BEFORE, BUFFER_BYTES - ALL_BEFORE)
    for window in [around, *itertools.islice(windows(seed), 2)]:
        ran = run(rewritten, "kernel", **shape, window=window)
        assert ran.data == original.data
        assert ran.marked == expected.pages(*window, page_shift), f"seed {seed}, window {window}"
        assert sum(ran.entries) == sum(ran.exits) == BLOCKS
        assert ran.entries == ran.exits
    assembled = rewrite_ptx(text, entry=True, exit=True, marks=True, page_shift=page_shift, is_for_assembler=True)
    assert not assembled.slots
    assert run(assembled.text, "kernel", **shape, window=around) == run(rewritten, "kernel", **shape, window=around)
    empty = run(assembled.text, "kernel", **shape, window=around, control_at=0)  # an access through it is an error
    assert (empty.data, empty.marked, sum(empty.entries)) == (original.data, frozenset(), 0)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100"])
def test_random_kernels_assemble_when_they_were_rewritten(
    target: str, tmp_path: pathlib.Path
) -> None:
    seed = int(os.environ.get("CONCORDIA_TEST_SEED", "0")) or random.randrange(1 << 30)
    print(f"seed {seed}")
    programs = [
        Program.random(f"kernel_{index}", seed + index, has_bulk=target != "sm_80")
        for index in range(40)
    ]
    text = module(programs, target)
    assert assemble(text, target, tmp_path) == ""
    for is_for_assembler in (False, True):
        rewritten = rewrite_ptx(text, entry=True, exit=True, marks=True, is_for_assembler=is_for_assembler)
        assert assemble(rewritten.text, target, tmp_path) == ""
