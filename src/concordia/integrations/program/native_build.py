"""What native/ is compiled with, floor 7.

Owns: which C compiler that is, and one call of it. Promises: a call is bounded; what it refuses, or
does not finish, is a CompileError that names what was wanted and has what the compiler said; to
know the compiler none is started. Called by shim_build and assembler, which know what becomes of
which sources, and keep it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from concordia import config
from concordia.errors import CompileError, EnvironmentRefused
from concordia.integrations.program.find_program import find_program

NATIVE: Final = Path(__file__).resolve().parents[2] / "native"
FLAGS: Final = (
    "-std=c11",
    "-O2",
    "-g1",
    "-fno-strict-aliasing",  # images are bytes and structures at once
    "-Wall",
    "-Wextra",  # tests make them errors; a user's compiler may know more of them
    "-pthread",
)
_LOG_CHARACTERS_MAX: Final = 2000


def find_compiler() -> str:
    """Raises EnvironmentRefused."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and find_program(name):
            return name
    raise EnvironmentRefused(
        "no C compiler, which `concordia run` builds its shim with: install gcc, or set CC"
    )


def identity_of(compiler: str) -> bytes:
    """The file that it is, and the name that leads there: one file may be several compilers, as a
    cache before them is. A part of the name of what it compiled. Not what it says of itself: each
    start would wait for a process. So a compiler behind a script or a cache that changes, and they
    do not, goes unseen.
    """
    name = find_program(compiler) or compiler
    path = os.path.realpath(name)
    try:
        found = os.stat(path)
    except OSError:  # it has gone since it was found: then it compiles nothing either
        return f"{name} {path}".encode()
    return f"{name} {path} {found.st_size} {found.st_mtime_ns}".encode()


def compile_c(what: str, command: Sequence[str]) -> None:
    """Run the compiler; raises CompileError."""
    import subprocess  # most starts compile nothing

    try:
        done = subprocess.run(
            command, capture_output=True, timeout=config.COMPILE_WAIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise CompileError(f"{what}: no result after {config.COMPILE_WAIT_S} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace")[:_LOG_CHARACTERS_MAX]
        raise CompileError(f"{what}: {command[0]} gave {done.returncode}\n{said}")
