"""The NVIDIA driver library of this machine, floor 7.

Owns: where the loader would find libcuda.so.1, and which names it exports. Promises: the order is
the loader's (LD_LIBRARY_PATH, its cache, the default folders), so that a compatibility driver put
before the installed one stays before it; a shim of ours is never taken for the driver; nothing is
loaded or run. Called by shim_build. It does not know what the names mean.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from concordia.errors import EnvironmentRefused

SONAME: Final = "libcuda.so.1"
REAL_NAME: Final = "libcuda-real.so"  # beside a shim, and only there
LOADER_CACHE: Final = Path("/etc/ld.so.cache")

_MAGIC: Final = b"glibc-ld.so.cache1.1"
_ENTRY: Final = struct.Struct("<iIIIQ")  # flags, name, path, system version, capabilities
_MACHINES: Final = {"x86_64": 62, "aarch64": 183}
_DYNSYM: Final = 11
_SYMBOL: Final = struct.Struct("<IBBH16x")
_PART_BYTES_MAX: Final = 64 << 20  # of names or symbols; a driver has some ten thousand


def find_driver(
    environment: Mapping[str, str] | None = None, *, cache: Path = LOADER_CACHE
) -> Path:
    """The file that a program started in this environment would load; raises EnvironmentRefused."""
    environment = os.environ if environment is None else environment
    for path in _candidates(environment.get("LD_LIBRARY_PATH", ""), cache):
        if _is_ours(path) or not _is_for_this_machine(path):
            continue
        return path.resolve()
    raise EnvironmentRefused(
        f"no NVIDIA driver: the loader finds no {SONAME}; install the driver, or name its folder "
        "in LD_LIBRARY_PATH"
    )


def exported_names(path: Path) -> frozenset[str]:
    """All functions and objects that a library defines for others; raises EnvironmentRefused."""
    try:
        with path.open("rb") as file:
            return frozenset(_dynamic_names(file.fileno()))
    except (OSError, struct.error, IndexError, ValueError) as error:
        raise EnvironmentRefused(f"{path} cannot be read as a library: {error}") from None


def _candidates(search: str, cache: Path) -> Iterator[Path]:
    """Where the loader looks, in its order; what does not exist is left out."""
    for folder in search.replace(";", ":").split(":") if search else ():
        # an empty part is the working folder, to the loader too
        path = Path(folder or ".") / SONAME
        if path.exists():
            yield path
    yield from (path for path in _cached(cache) if path.exists())
    machine = os.uname().machine
    for folder in (
        f"/lib/{machine}-linux-gnu",
        f"/usr/lib/{machine}-linux-gnu",
        "/lib64",
        "/usr/lib64",
        "/lib",
        "/usr/lib",
    ):
        path = Path(folder) / SONAME
        if path.exists():
            yield path


def _cached(cache: Path) -> list[Path]:
    """The loader's cache: its files of this name, in its order; nothing when it cannot be read."""
    try:
        data = cache.read_bytes()
        start = data.index(_MAGIC)  # an old format may lie before it
        (count,) = struct.unpack_from("<I", data, start + 20)
        found = []
        for index in range(count):
            entry = _ENTRY.unpack_from(data, start + 48 + index * _ENTRY.size)
            if _text(data, start + entry[1]) == SONAME:
                found.append(Path(_text(data, start + entry[2])))
        return found
    except (OSError, ValueError, struct.error):
        return []


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode(errors="replace")


def _is_ours(path: Path) -> bool:
    """A shim lies beside the link to its driver: a run inside a run must not stack them."""
    return path.parent.joinpath(REAL_NAME).is_symlink()


def _is_for_this_machine(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except OSError:
        return False
    if len(head) < 20 or head[:4] != b"\x7fELF" or head[4] != 2:
        return False
    return int.from_bytes(head[18:20], sys.byteorder) == _MACHINES.get(os.uname().machine, -1)


def _dynamic_names(file: int) -> Iterator[str]:
    """Of its parts alone: a driver has a hundred megabytes."""
    head = _part(file, 0, 64)
    (sections,) = struct.unpack_from("<Q", head, 40)
    size, count = struct.unpack_from("<HH", head, 58)
    table = _part(file, sections, size * count)
    headers = [struct.unpack_from("<IIQQQQIIQQ", table, index * size) for index in range(count)]
    for header in headers:
        if header[1] != _DYNSYM:
            continue
        symbols = _part(file, header[4], header[5])
        names = _part(file, headers[header[6]][4], headers[header[6]][5])
        for name, _, _, section in _SYMBOL.iter_unpack(symbols):
            if section and name:
                yield _text(names, name)


def _part(file: int, at: int, size: int) -> bytes:
    """All of it, or a ValueError."""
    if size > _PART_BYTES_MAX:
        raise ValueError(f"a part of {size} bytes")
    found = os.pread(file, size, at)
    if len(found) != size:
        raise ValueError(f"it ends before byte {at + size}")
    return found
