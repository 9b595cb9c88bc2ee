"""A Triton kernel compiled without a GPU, for tests of hooks in machine code.

Owns: the kernel, and its compilation for sm_90 by the assembler of Triton's own wheel. Called by test_instrument_splice.py and by
scenarios_splice.py.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BLOCK = 1024
WARPS = 4


@triton.jit
def softmax_rows(out, rows, count, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803 - Triton's own language
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    x = tl.load(rows + row * count + at, mask=at < count, other=-float("inf"))
    if tl.max(x, axis=0) < -1e30:
        return
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(out + row * count + at, e / tl.sum(e, axis=0), mask=at < count)


@functools.cache
def compiled() -> Any:
    """What Triton knows of it: `.asm["cubin"]`, `.metadata.shared`."""
    signature = {"out": "*fp32", "rows": "*fp32", "count": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=softmax_rows, signature=signature, constexprs={(3,): BLOCK})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
