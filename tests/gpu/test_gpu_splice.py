"""Hooks in machine code on a GPU: nothing that a kernel writes changes, and every hook runs as often as it must.

Invariants: with hooks at entry, at exit and at both, the same launches write the same bytes, also in a CUDA graph; one count per CTA at
entry, and one at exit where the kernel has such a hook; no other byte of the control block is touched; a small kernel's occupancy is
what it was.
"""

from __future__ import annotations

import pytest
import scenarios_splice
from child import run
from splice_kernels import KERNELS

BOUND_S = 100.0  # all kernels take some 20 seconds; one that hangs is ended then, and the test fails


@pytest.mark.parametrize("generation", ["V1", "V2"])
def test_kernels_write_the_same_and_hooks_count_their_ctas_when_hooked(generation: str) -> None:
    if generation == "V1":
        pytest.importorskip("triton", reason="triton is not installed: its wheel has the assembler of CUDA 12")
    answers = run("scenarios_splice:kernels", BOUND_S, generation=generation)
    wrong = {}
    for kernel in KERNELS:
        answer = answers[kernel.name]
        if answer != wanted(kernel.cta_count, has_exit=not kernel.exit_reason):
            wrong[kernel.name] = answer
    assert not wrong
    assert len(answers) == len(KERNELS)


def test_triton_kernel_writes_the_same_and_hooks_count_its_ctas_when_hooked() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    answer = run("scenarios_splice:triton_kernel", BOUND_S, rows=500, columns=1000)
    assert answer == wanted(500, has_exit=True)


def test_occupancy_stays_when_a_small_kernel_needs_more_registers() -> None:
    answer = run("scenarios_splice:attributes", BOUND_S, name="nothing")
    print(answer)
    assert answer["hooked"]["ctas"] == answer["plain"]["ctas"] == 2
    assert answer["plain"]["registers"] <= answer["hooked"]["registers"] <= 24


def wanted(ctas: int, *, has_exit: bool) -> dict[str, list[int | None]]:
    """For each variant the first byte that differs, CTAs in, CTAs out."""
    launches = {"launched": scenarios_splice.ROUNDS, "replayed": scenarios_splice.NODES * scenarios_splice.REPLAYS}
    return {
        f"{variant} {how}": [None, ctas * times * entry, ctas * times * (leaving and has_exit)]
        for variant, (entry, leaving) in scenarios_splice.VARIANTS.items()
        for how, times in launches.items()
    }
