"""Writes the PTX of this folder: kernels of our own, compiled by Triton 3.9 without a GPU.

Run as `python tests/corpus/ptx/make.py` with triton installed; what it writes is committed.
"""

from __future__ import annotations

import pathlib
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HERE = pathlib.Path(__file__).parent
ALIGNED = [["tt.divisibility", 16]]
PTX_VERSION = 86  # knows sm_100, and the pinned assembler knows it


@triton.jit
def vector_add(x_ptr, y_ptr, o_ptr, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(
        o_ptr + at, tl.load(x_ptr + at, mask=inside) + tl.load(y_ptr + at, mask=inside), mask=inside
    )


@triton.jit
def product(a_ptr, b_ptr, c_ptr, m, n, k, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803, PLR0917
    """Through tensor maps that it makes itself."""
    a = tl.make_tensor_descriptor(a_ptr, [m, k], [k, 1], [BLOCK, 64])
    b = tl.make_tensor_descriptor(b_ptr, [k, n], [n, 1], [64, BLOCK])
    c = tl.make_tensor_descriptor(c_ptr, [m, n], [n, 1], [BLOCK, BLOCK])
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for at in range(0, k, 64):
        total = tl.dot(a.load([row, at]), b.load([at, column]), total)
    c.store([row, column], total.to(tl.float16))


@triton.jit
def tiles(a_ptr, b_ptr, c_ptr, k, a_row, b_row, c_row, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803, PLR0917
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column, inner = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 32)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    a, b = (
        a_ptr + row[:, None] * a_row + inner[None, :],
        b_ptr + inner[:, None] * b_row + column[None, :],
    )
    for _ in range(0, k, 32):
        total = tl.dot(tl.load(a), tl.load(b), total)
        a += 32
        b += 32 * b_row
    tl.store(c_ptr + row[:, None] * c_row + column[None, :], total.to(tl.float16))


@triton.jit
def histogram(x_ptr, h_ptr, lock_ptr, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """Atomics, a loop and a lock."""
    for begin in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.atomic_add(h_ptr + (tl.load(x_ptr + at, mask=at < n, other=0) & 255), 1, mask=at < n)
    tl.debug_barrier()
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(h_ptr + 256, tl.load(h_ptr + 256) + 1)
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def softmax(o_ptr, x_ptr, row, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """With what a debugging build calls."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * row + at, mask=at < n, other=-float("inf"))
    x = tl.exp(x - tl.max(x, 0))
    tl.device_assert(n <= BLOCK)
    tl.store(o_ptr + tl.program_id(0) * row + at, x / tl.sum(x, 0), mask=at < n)
    tl.device_print("row", row)


def write(kernel: Any, pointers: str, *, block: int, architecture: int) -> None:
    """One text; parameters that are no pointers are 32-bit numbers."""
    names = [name for name in kernel.arg_names if name != "BLOCK"]
    kinds = [f"*{pointers}" if name.endswith("_ptr") else "i32" for name in names]
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(names, kinds, strict=True)) | {"BLOCK": "constexpr"},
        constexprs={"BLOCK": block},
        attrs={(index,): ALIGNED for index in range(len(names))},
    )
    # Debugging data in one of them is enough.
    triton.knobs.compilation.disable_line_info = kernel is not vector_add
    options = {"ptx_version": PTX_VERSION, "debug": kernel is softmax}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    # Where this file lies is nobody's business.
    text = compiled.asm["ptx"].replace(str(HERE) + "/", "")
    (HERE / f"{kernel.__name__}_sm{architecture}.ptx").write_text(text)


if __name__ == "__main__":
    for arch in (80, 90, 100):
        write(vector_add, "fp32", block=1024, architecture=arch)
        write(product, "fp16", block=64, architecture=arch)
    write(tiles, "fp16", block=64, architecture=80)
    write(histogram, "i32", block=256, architecture=90)
    write(softmax, "fp32", block=1024, architecture=90)
