"""Run-time compilation for the GPU, floor 2.

Owns: CUDA C++ to PTX (NVRTC) and PTX to a linked cubin (nvJitLink). Promises: needs no driver and
no GPU; always relocatable (a pointer to a whole-program function is only an index into its own
kernel's constants); both sides of an indirect call get the same register cap; a failure is
CompileError with the compiler's own words. Called by cuda.py, and by tests on machines without a
GPU. Does not cache, judge or load: compiler.py and loader.py do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from concordia.errors import CompileError, EnvironmentRefused

# 1024 threads share 65536 registers. The executor's CTA may be that wide, so every function that it
# calls fits it.
REGISTERS_MAX: Final = 64
STANDARD: Final = "--std=c++17"
# one mistake in a header can cost a hundred messages; the first ones tell
LOG_BYTES_MAX: Final = 4000


def versions() -> str:
    """Names both compilers; part of every cache key."""
    nvrtc, nvjitlink = _bindings()
    status, major, minor = nvrtc.nvrtcVersion()
    if int(status):
        raise EnvironmentRefused(f"NVRTC does not answer: {status.name}")
    return f"nvrtc {major}.{minor} nvjitlink {'.'.join(map(str, nvjitlink.version()))}"


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
        return bytes(ptx).rstrip(b"\0")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def link_cubin(
    parts: Sequence[bytes], *, name: str, architecture: str, registers_max: int = REGISTERS_MAX
) -> bytes:
    """Assemble and link PTX into one executable cubin; unresolved symbols are an error here."""
    _, nvjitlink = _bindings()
    options = [f"-arch={architecture}", f"-maxrregcount={registers_max}", "-O3"]
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
