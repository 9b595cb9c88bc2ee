"""What is hooked, and in which libraries, floor 3.

Owns: `Options` and the policy for libraries that are left as they are. Promises: two rewriters with
the same key make the same file of the same image: the key covers the options, every byte of this
package, and what else decides. Called by rewrite, cache, the rewriter and whoever starts it. It
looks into no image.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import xxhash

from concordia import __version__, config
from concordia.errors import UsageError

# Libraries whose licence forbids to change them, as names without "lib" and as the kernels in them
# are called. Their launches are gated instead.
OPAQUE: Final = (
    "cublas*",
    "cudnn*",
    "cufft*",
    "cusolver*",
    "cusparse*",
    "curand*",
    "cutensor*",
    "nvjpeg*",
    "npp*",
    "sm?*_xmma_*",
)
ARCHITECTURES: Final = range(75, 130)  # as the drivers of CUDA 13 know them
PAGE_SHIFTS: Final = range(12, 31)  # 4 KiB, a page of the system, to 1 GiB
# Packages that assemble what was rewritten, as check, and that unpack images
_TOOLS: Final = (
    *("cuda-bindings", "nvidia-nvjitlink", "nvidia-nvjitlink-cu12", "zstandard", "lz4"),
)
_FACTS: Final = ".dist-info"
_SEPARATOR: Final = "/"  # of opaque names, for the shim: in no name of a file
_NESTED: Final = re.compile(r"_ZN?[KVr]*(?=\d)")
_LENGTH: Final = re.compile(r"\d+")
_LENGTH_DIGITS: Final = 5  # of a length in a mangled name: none is longer than 64 KiB


class _Values(NamedTuple):
    """Of `Options`. No data class: those load what reads sources, for which a launcher waits."""

    arch: int
    entry: bool
    exit: bool
    marks: bool
    sass_marks: bool
    assembler: bool
    page_shift: int
    opaque: tuple[str, ...]
    deny: tuple[str, ...]


class Options(_Values):
    """What a rewrite does. `arch` is the device's, as 90; `marks` are those of stores in PTX,
    `sass_marks` those in machine code, which cost far more; `assembler`: a text goes to one, and
    what that makes is loaded; `deny` are kernels that stay as they are.
    """

    __slots__ = ()

    def __new__(
        cls,
        *,
        arch: int = 90,
        entry: bool = True,
        exit: bool = False,
        marks: bool = True,
        sass_marks: bool = False,
        assembler: bool = False,
        page_shift: int = config.MARK_PAGE_SHIFT,
        opaque: tuple[str, ...] = OPAQUE,
        deny: tuple[str, ...] = (),
    ) -> Self:
        """Raises UsageError."""
        made = super().__new__(
            cls, arch, entry, exit, marks, sass_marks, assembler, page_shift, opaque, deny
        )
        made._check()
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        """For copies and pickles: `__new__` takes names alone."""
        return (), self._asdict()

    def _replace(self, /, **values: Any) -> Self:
        return self.replaced(**values)

    def replaced(self, **values: Any) -> Self:
        """The same but for these; raises UsageError."""
        return type(self)(**self._asdict() | values)

    def _check(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise UsageError(f"architecture {self.arch}: give a number such as 90 for sm_90")
        if self.page_shift not in PAGE_SHIFTS:
            raise UsageError(f"page shift {self.page_shift}: give 16 for pages of 64 KiB")
        for pattern in self.opaque:
            if not pattern or _SEPARATOR in pattern or "\n" in pattern:
                raise UsageError(f"opaque {pattern!r}: give the library's name without its folder")
            if "[" in pattern:
                raise UsageError(f"opaque {pattern!r}: only * and ? stand for other letters")
        if len(self.opaque_list().encode()) > config.OPAQUE_BYTES_MAX:
            raise UsageError(f"opaque: give at most {config.OPAQUE_BYTES_MAX} bytes of names")

    @classmethod
    def parse(cls, text: str) -> Options:
        """Options out of a JSON object; raises UsageError."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"options are a JSON object: {error}") from None
        if not isinstance(found, Mapping):
            raise UsageError("options are a JSON object")
        wanted = cls()._asdict()
        for name, value in found.items():
            if name not in wanted:
                raise UsageError(f"no option {name!r}: there are {', '.join(wanted)}")
            wanted[name] = _checked(name, value, wanted[name])
        return cls(**wanted)

    def to_json(self) -> str:
        """What `parse` reads."""
        return json.dumps(self._asdict())

    def key(self) -> str:
        """Names these options of this rewriter: 32 lower-case hexadecimal digits."""
        text = json.dumps(self._asdict(), sort_keys=True)
        return xxhash.xxh3_128_hexdigest(f"{_version()} {text}".encode())

    def opaque_list(self) -> str:
        """The same for the shim, which decides for each load; native/opaque.c."""
        return _SEPARATOR.join(self.opaque)

    def is_opaque_library(self, library: str) -> bool:
        """Whether a file of this path is one that is left as it is."""
        return self._is_opaque(library.rpartition("/")[2].removeprefix("lib"))

    def is_opaque_kernel(self, kernel: str) -> bool:
        """Whether a kernel's name says that its library is one of them."""
        return any(map(self._is_opaque, _names(kernel)))

    def is_denied(self, kernel: str) -> bool:
        """Whether a person wants this kernel as it is."""
        return any(fnmatchcase(kernel, pattern) for pattern in self.deny)

    def _is_opaque(self, name: str) -> bool:
        return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in self.opaque)


def _checked(name: str, value: Any, default: Any) -> Any:
    """The value as the option's type; a number is no truth value, nor a truth value a number."""
    if isinstance(default, tuple):
        if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return tuple(value)
    elif type(value) is type(default):
        return value
    kind = "a list of patterns" if isinstance(default, tuple) else type(default).__name__
    raise UsageError(f"option {name!r} is {kind}, not {value!r}")


def _names(kernel: str) -> tuple[str, str]:
    """The name, and its outermost scope (else the name alone) when it is a mangled one."""
    begin = _NESTED.match(kernel)
    length = _LENGTH.match(kernel, begin.end()) if begin else None
    if length is None:
        return kernel, kernel
    bytes_said = int(length[0][:_LENGTH_DIGITS])
    return kernel, kernel[length.end() : length.end() + bytes_said]


@functools.cache
def _version() -> str:
    """Every byte of this package and of what else decides: limits, the layout of the control block,
    and which assembler judges what comes out, if any. A rewriter of which one of them was changed
    finds no file of the one before.
    """
    digest = xxhash.xxh3_128(__version__.encode())
    for path in _sources():
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    for name, version in _installed_versions().items():
        digest.update(f"{name} {version} ".encode())
    return digest.hexdigest()


def _installed_versions() -> dict[str, str]:
    """Of the tools that an import would find, by the names of their folders of facts; empty
    without. To read the facts takes a parser of mail, and a launcher 20 ms.
    """
    versions = dict.fromkeys(_TOOLS, "")
    missing = {name.replace("-", "_"): name for name in _TOOLS}
    for place in sys.path:
        with contextlib.suppress(OSError):
            facts = sorted(name for name in os.listdir(place or ".") if name.endswith(_FACTS))
            for found in facts:
                begin, _, version = found.removesuffix(_FACTS).partition("-")
                name = missing.pop(begin.lower().replace(".", "_"), None)
                if name is not None:
                    versions[name] = version
    return versions


def _sources() -> list[Path]:
    here = Path(__file__).parent
    found = [Path(config.__file__), here.parent / "device" / "nvrtc.py"]
    for folder, ending in ((here, ""), (here.parent / "abi", ".py")):
        for place, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            found += [Path(place, name) for name in sorted(names) if name.endswith(ending)]
    return [path for path in found if path.is_file()]
