"""Kernels compiled for the CPU device, floor 2.

Owns: `HandlerSource` and the system C++ compiler. Promises: a file was made from exactly these
sources, constants, flags, compiler, processor and ABI, because all of them are its name in the
cache (kernel_cache). Called by host.py. Does not load code and does not know what a handler does.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

from concordia import abi, config
from concordia.device.kernel_cache import KernelCache
from concordia.errors import CompileError, EnvironmentRefused

KERNELS: Final = Path(__file__).resolve().parent.parent / "kernels"
FLAGS: Final = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # records are written as words and read as structures
    "-fno-exceptions",
    "-fno-rtti",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # some are for the GPU's compiler alone
    "-Wno-psabi",  # vectors wider than the processor's are split, and never cross a call
)
LOG_BYTES_MAX: Final = 4000


@dataclass(frozen=True, slots=True)
class HandlerSource:
    """Device code: a file of `kernels/` or a text of the caller's, specialised by named numbers."""

    file: str
    constants: tuple[tuple[str, int], ...] = ()
    text: str | None = field(default=None, repr=False)

    @staticmethod
    def of(
        file: str, constants: Mapping[str, int] | None = None, *, text: str | None = None
    ) -> HandlerSource:
        return HandlerSource(file, tuple(sorted((constants or {}).items())), text)

    def code(self) -> str:
        """The text that is compiled."""
        return self.text if self.text is not None else (KERNELS / self.file).read_text("utf-8")

    def defines(self) -> list[str]:
        """The constants as NAME=VALUE, for either compiler."""
        return [f"{name}={value}" for name, value in self.constants]

    def key(self, toolchain: str) -> str:
        """Names what would come out: 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for part in (toolchain, _headers(), str(abi.ABI_VERSION), *self.defines(), self.code()):
            digest.update(len(part).to_bytes(8, "little") + part.encode())
        return digest.hexdigest()


class HostCompiler:
    """The system C++ compiler."""

    def __init__(self, cache: KernelCache | None = None, *, flags: Sequence[str] = ()) -> None:
        self._cache = cache or KernelCache()
        self._flags = (*FLAGS, *flags)
        self._command = _compiler()

    def compile(self, source: HandlerSource) -> tuple[Path, str]:
        """A shared object and its key."""
        key = source.key(f"{_toolchain(self._command)} {' '.join(self._flags)}")
        return self._cache.get(key, ".so", lambda path: self._build(source, path)), key

    def _build(self, source: HandlerSource, path: Path) -> None:
        command = [
            self._command,
            *self._flags,
            *(f"-D{define}" for define in source.defines()),
            f"-I{KERNELS}",
            *("-x", "c++", "-"),
            *("-o", str(path)),
            "-pthread",
        ]
        try:
            done = subprocess.run(
                command,
                input=source.code().encode(),
                capture_output=True,
                timeout=config.COMPILE_WAIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise CompileError(
                f"{source.file}: no result after {config.COMPILE_WAIT_S} s"
            ) from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace")[:LOG_BYTES_MAX]
            raise CompileError(f"{source.file}: {self._command} gave {done.returncode}\n{said}")


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise EnvironmentRefused("no C++ compiler: install g++, or set CXX")


@cache
def _toolchain(command: str) -> str:
    """Names the compiler and what -march=native means here: a home folder may be shared by unlike
    machines.
    """
    said = []
    for arguments in (["--version"], ["-march=native", "-Q", "--help=target"]):
        done = subprocess.run(
            [command, *arguments], capture_output=True, timeout=config.COMPILE_WAIT_S, check=False
        )
        said.append(done.stdout.decode(errors="replace"))
    return hashlib.sha256("".join([sys.platform, *said]).encode()).hexdigest()


def _headers() -> str:
    """All headers of the kernels: a handler may include any of them."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
