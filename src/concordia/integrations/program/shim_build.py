"""The shim, built for this machine and its driver, floor 7.

Owns: how `native/` becomes a library, and the three names it has in a run folder. Promises: built
once for the same sources, compiler, flags and driver, and kept in the cache of compiled code; it
exports the hooks that the driver itself exports, so that nobody finds a function that the driver
lacks; it needs the driver by a private name that is a link beside it. Called by launch. It loads
nothing and starts no program but the compiler.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

from concordia import config
from concordia.device.compiler import KernelCache
from concordia.errors import CompileError, EnvironmentRefused
from concordia.integrations.program.driver import REAL_NAME, SONAME, exported_names

NATIVE: Final = Path(__file__).resolve().parents[2] / "native"
FLAGS: Final = (
    "-std=c11",
    "-O2",
    "-g1",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # images are bytes and structures at once
    "-Wall",
    "-Wextra",  # tests make them errors; a user's compiler may know more of them
    "-pthread",
)
_LINK: Final = (
    f"-Wl,-soname,{SONAME}",
    "-Wl,-rpath,$ORIGIN",
    "-Wl,--enable-new-dtags",
    "-Wl,-z,defs",
    "-Wl,-z,now",  # what is missing is known at once, not in the middle of a step
)
_LOG_BYTES_MAX: Final = 2000


def place_shim(folder: Path, driver: Path, *, flags: Sequence[str] = ()) -> Path:
    """Build the shim for a driver when it is not in the cache, and put it and its links into a run
    folder; raises EnvironmentRefused or CompileError.
    """
    names = sorted(set(hook_names()) & exported_names(driver))
    if "cuGetProcAddress_v2" not in names:
        raise EnvironmentRefused(
            f"{driver} is no CUDA driver that this can stand before (12 or newer)"
        )
    command = _compiler()
    key = _key(command, [*FLAGS, *flags, *_LINK], names)
    built = KernelCache().get(
        key, ".shim", lambda path: _build(command, path, names=names, flags=flags)
    )
    shim = folder / SONAME
    shutil.copyfile(built, shim)
    shim.chmod(0o700)
    (folder / "libcuda.so").symlink_to(SONAME)
    (folder / REAL_NAME).symlink_to(driver)
    return shim


def hook_names() -> tuple[str, ...]:
    """Every function that the shim may export, as the tables of hooks list them."""
    texts = [path.read_text("utf-8") for path in sorted(NATIVE.glob("*hooks.def"))]
    return tuple(re.findall(r"^HOOK\((\w+),", "\n".join(texts), re.MULTILINE))


def sources() -> tuple[Path, ...]:
    """The files that are compiled."""
    return tuple(sorted(NATIVE.glob("*.c")))


def _build(command: str, path: Path, *, names: Sequence[str], flags: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="concordia-shim-") as work:
        stub = Path(work, REAL_NAME)
        # Linking against the driver itself would record its own name, which is ours too.
        Path(work, "stub.c").write_text("extern int concordia_stub;\nint concordia_stub;\n")
        _run([command, "-shared", "-fPIC", f"-Wl,-soname,{REAL_NAME}", "-o", str(stub)], work)
        script = Path(work, "exports")
        exported = "".join(f"    {name};\n" for name in names)
        script.write_text("{\n  global:\n" + exported + "    concordia_*;\n  local: *;\n};\n")
        _run(
            [
                *(command, *FLAGS, f"-I{NATIVE}"),
                *(str(source) for source in sources()),
                *(*_LINK, *flags),
                f"-Wl,--version-script={script}",
                *("-Wl,--no-as-needed", f"-L{work}", f"-l:{REAL_NAME}", "-Wl,--as-needed", "-ldl"),
                *("-o", str(path)),
            ],
            None,
        )


def _run(command: list[str], folder: str | None) -> None:
    if folder is not None:
        command = [*command, str(Path(folder, "stub.c"))]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=config.COMPILE_WAIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise CompileError(f"the shim: no result after {config.COMPILE_WAIT_S} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace")[:_LOG_BYTES_MAX]
        raise CompileError(f"the shim: {command[0]} gave {done.returncode}\n{said}")


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    raise EnvironmentRefused(
        "no C compiler, which `concordia run` builds its shim with: install gcc"
    )


@cache
def _said(command: str) -> bytes:
    return subprocess.run(
        [command, "--version"], capture_output=True, timeout=config.COMPILE_WAIT_S, check=False
    ).stdout


def _key(command: str, flags: Sequence[str], names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    files = sorted(path for path in NATIVE.iterdir() if path.suffix in {".c", ".h", ".def"})
    for part in (_said(command), *(text.encode() for text in (*flags, *names))):
        digest.update(len(part).to_bytes(8, "little") + part)
    for path in files:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
