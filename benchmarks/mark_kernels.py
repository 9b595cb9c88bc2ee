"""Triton kernels that wait for memory, and what Triton makes of them.

Owns: the kernels of mark_cost.py, their PTX, and the way of a text through the assembler that
Triton has for a GPU. Promises: no GPU is needed. It launches nothing and knows no hook.
"""

from __future__ import annotations

import pathlib
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any, Final

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from concordia.errors import DeviceError

PTX_VERSION: Final = 86  # which every driver of CUDA 12.8 and later takes
ASSEMBLE_S: Final = 120.0


@triton.jit
def vector_add(x_ptr, y_ptr, o_ptr, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(o_ptr + at, x + tl.load(y_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def vector_copy(x_ptr, y_ptr, o_ptr, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def vector_fill(x_ptr, y_ptr, o_ptr, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o_ptr + at, at.to(tl.float32), mask=at < n)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as Triton hands it to an assembler."""

    name: str
    text: str
    block: int


def compile_kernel(kernel: Any, block: int, architecture: int) -> Compiled:
    """PTX for a GPU such as 90."""
    names = [name for name in kernel.arg_names if name != "BLOCK"]
    kinds = ["*fp32" if name.endswith("_ptr") else "i32" for name in names]
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(names, kinds, strict=True)) | {"BLOCK": "constexpr"},
        constexprs={"BLOCK": block},
        attrs={(index,): [["tt.divisibility", 16]] for index in range(len(names))},
    )
    target = GPUTarget("cuda", architecture, 32)
    found = triton.compile(source, target=target, options={"ptx_version": PTX_VERSION})
    return Compiled(kernel.__name__, str(found.asm["ptx"]), block)


def assembled(text: str, architecture: int) -> bytes:
    """What Triton's assembler makes of a text."""
    suffix = "a" if architecture >= 90 else ""  # as Triton names it
    with tempfile.TemporaryDirectory() as folder:
        source, made = pathlib.Path(folder, "text.ptx"), pathlib.Path(folder, "cubin")
        source.write_text(text)
        words = [get_ptxas(architecture).path, "-lineinfo", f"--gpu-name=sm_{architecture}{suffix}"]
        done = subprocess.run(
            [*words, str(source), "-o", str(made)],
            capture_output=True,
            text=True,
            timeout=ASSEMBLE_S,
            check=False,
        )
        if done.returncode:
            raise DeviceError(f"{words[0]} gave {done.returncode}: {done.stderr[:500]}")
        return made.read_bytes()
