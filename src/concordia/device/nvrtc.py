"""Run-time compilation for the GPU, floor 2.

Owns: CUDA C++ to PTX (NVRTC) and PTX to a linked cubin (nvJitLink). Promises: needs no driver and
no GPU; always relocatable (a pointer to a whole-program function is only an index into its own
kernel's constants); both sides of an indirect call get the same register cap and preserve the same
registers; a failure is CompileError with the compiler's own words. Called by cuda.py, and by tests
on machines without a GPU. Does not cache, judge or load: compiler.py and loader.py do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from concordia.errors import CompileError, EnvironmentRefused

# 512 threads share 65536 registers. The executor's CTA is that wide, so every function that it
# calls fits it.
REGISTERS_MAX: Final = 128
# The executor keeps next to nothing in registers, and by the usual convention a handler would save
# 62 of them for it: with 16 warps 2 us of each task. PTX has a word for it from version 9.0 on.
PRESERVED: Final = b".abi_preserve 0"
_PTX_VERSION: Final = re.compile(rb"^\.version (\d+)\.", re.MULTILINE)
_FUNCTION: Final = re.compile(rb"\.func\s+concordia_\w+\s*\([^)]*\)")
_ANY_FUNCTION: Final = re.compile(rb"\.func\b[^;{]*\bconcordia_\w+\s*\(")
_ANY_POINTER: Final = re.compile(rb"\.callprototype\b")
_POINTER: Final = re.compile(rb"\.callprototype\s*\(\)\s*_\s*\([^)]*\)")
STANDARD: Final = "--std=c++17"
# What a tool that watches kernels asks for besides, e.g. names of source lines; part of versions().
OPTIONS: Final[tuple[str, ...]] = ()
# one mistake in a header can cost a hundred messages; the first ones tell
LOG_BYTES_MAX: Final = 4000


def versions() -> str:
    """Names both compilers; part of every cache key."""
    nvrtc, nvjitlink = _bindings()
    status, major, minor = nvrtc.nvrtcVersion()
    if int(status):
        raise EnvironmentRefused(f"NVRTC does not answer: {status.name}")
    linker = ".".join(map(str, nvjitlink.version()))
    return " ".join((f"nvrtc {major}.{minor} nvjitlink {linker} {PRESERVED.decode()}", *OPTIONS))


def compile_ptx(
    text: str, *, name: str, architecture: str, include: Path, defines: Sequence[str] = ()
) -> bytes:
    """Compile CUDA C++ to PTX for e.g. "sm_90"; `defines` are NAME=VALUE."""
    nvrtc, _ = _bindings()
    options = [
        f"--gpu-architecture={architecture.replace('sm_', 'compute_')}",
        "--relocatable-device-code=true",
        # constexpr helpers that both compilers share carry no annotation
        "--device-as-default-execution-space",
        STANDARD,
        *OPTIONS,
        f"--include-path={include}",
        *(f"--define-macro={define}" for define in defines),
    ]
    status, program = nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], [])
    if int(status):
        raise CompileError(f"{name}: NVRTC refused the source: {status.name}")
    try:
        raw = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(raw), raw)
        if int(status):
            raise CompileError(f"{name}: {status.name}\n{_log(nvrtc, program)}")
        _, size = nvrtc.nvrtcGetPTXSize(program)
        ptx = bytearray(size)
        (status,) = nvrtc.nvrtcGetPTX(program, ptx)
        if int(status):
            raise CompileError(f"{name}: no PTX: {status.name}")
        return _with_preserved(bytes(ptx).rstrip(b"\0"), name)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def link_cubin(
    parts: Sequence[bytes],
    *,
    name: str,
    architecture: str,
    registers_max: int = REGISTERS_MAX,
    optimization: int = 3,
) -> bytes:
    """Assemble and link PTX into one executable cubin; unresolved symbols are an error here."""
    _, nvjitlink = _bindings()
    options = [f"-arch={architecture}", f"-maxrregcount={registers_max}", f"-O{optimization}"]
    handle = nvjitlink.create(len(options), options)
    try:
        for index, part in enumerate(parts):
            text = part + b"\0"  # nvJitLink takes PTX as a C string
            nvjitlink.add_data(handle, nvjitlink.InputType.PTX, text, len(text), f"{name}.{index}")
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        return bytes(cubin)
    except nvjitlink.nvJitLinkError as error:
        words = bytearray(nvjitlink.get_error_log_size(handle))
        if words:
            nvjitlink.get_error_log(handle, words)
        told = bytes(words).rstrip(b"\0\n").decode(errors="replace")
        raise CompileError(f"{name}: {error}\n{told}") from error
    finally:
        nvjitlink.destroy(handle)


def _with_preserved(ptx: bytes, name: str) -> bytes:
    """The same with our calling convention, on both sides of the executor's calls. Raises
    CompileError when a side is worded so that it would be missed: one alone corrupts registers.
    """
    version = _PTX_VERSION.search(ptx)
    if version is None or int(version[1]) < 9:
        return ptx
    for pattern, word in ((_FUNCTION, _ANY_FUNCTION), (_POINTER, _ANY_POINTER)):
        ptx, count = pattern.subn(lambda found: found[0] + b" " + PRESERVED, ptx)
        if count != len(word.findall(ptx)):
            raise CompileError(f"{name}: this NVRTC words {word.pattern!r} in an unknown way")
    return ptx


def _bindings() -> tuple[Any, Any]:
    try:
        from cuda.bindings import nvjitlink, nvrtc
    except ImportError as error:
        raise EnvironmentRefused(
            f"no CUDA bindings ({error}): install Concordia with its extra 'cuda', or use the "
            "host device"
        ) from error
    return nvrtc, nvjitlink


def _log(nvrtc: Any, program: Any) -> str:
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    return bytes(log).rstrip(b"\0")[:LOG_BYTES_MAX].decode(errors="replace")
