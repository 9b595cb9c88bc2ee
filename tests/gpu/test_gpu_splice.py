"""Hooks in machine code on a GPU: nothing that a kernel writes changes, and every hook runs as often as it must.

Invariants: with hooks at entry, at exit and at both, the same launches write the same bytes, also in a CUDA graph; one count per CTA at
entry, and one at exit where the kernel has such a hook; no other byte of the control block is touched; a small kernel's occupancy is
what it was.
"""

from __future__ import annotations

import pytest
import scenarios_splice
from child import run
from splice_kernels import BY_NAME, KERNELS

BOUND_S = 60.0  # a scenario takes some seconds; one that hangs is ended then, and the test fails


@pytest.mark.parametrize("generation", ["V1", "V2"])
@pytest.mark.parametrize("name", [kernel.name for kernel in KERNELS])
def test_kernel_writes_the_same_and_hooks_count_its_ctas_when_hooked(name: str, generation: str) -> None:
    if generation == "V1":
        pytest.importorskip("triton", reason="triton is not installed: its wheel has the assembler of CUDA 12")
    kernel = BY_NAME[name]
    answer = run("scenarios_splice:kernel", BOUND_S, name=name, generation=generation)
    print(answer)
    check(answer, kernel.cta_count, has_exit=not kernel.exit_reason)


def test_triton_kernel_writes_the_same_and_hooks_count_its_ctas_when_hooked() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    answer = run("scenarios_splice:triton_kernel", BOUND_S, rows=500, columns=1000)
    print(answer)
    check(answer, 500, has_exit=True)


def test_occupancy_stays_when_a_small_kernel_needs_more_registers() -> None:
    answer = run("scenarios_splice:attributes", BOUND_S, name="nothing")
    print(answer)
    assert answer["hooked"]["ctas"] == answer["plain"]["ctas"] == 2
    assert answer["plain"]["registers"] <= answer["hooked"]["registers"] <= 24


def check(answer: dict[str, list[int | None]], ctas: int, *, has_exit: bool) -> None:
    """`answer`: for each variant the first byte that differs, CTAs in, CTAs out."""
    launches = {"launched": scenarios_splice.ROUNDS, "replayed": scenarios_splice.NODES * scenarios_splice.REPLAYS}
    wanted = {
        f"{variant} {how}": [None, ctas * times * entry, ctas * times * (leaving and has_exit)]
        for variant, (entry, leaving) in scenarios_splice.VARIANTS.items()
        for how, times in launches.items()
    }
    assert answer == wanted
