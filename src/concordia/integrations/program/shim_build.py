"""The shim, built for this machine and its driver, floor 7.

Owns: how `native/` becomes a library, and the three names it has in a run folder. Promises: built
once for the same sources, compiler, flags and driver, and kept in the cache of compiled code; it
exports the hooks that the driver itself exports, so that nobody finds a function that the driver
lacks; it needs the driver by a private name that is a link beside it. Called by launch. It loads
nothing and starts no program but the compiler.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import xxhash

from concordia.device.kernel_cache import KernelCache
from concordia.errors import EnvironmentRefused
from concordia.integrations.program.driver import REAL_NAME, SONAME, exported_names
from concordia.integrations.program.native_build import (
    FLAGS,
    NATIVE,
    compile_c,
    find_compiler,
    identity_of,
)

_SHARED: Final = ("-fPIC", "-shared", "-fvisibility=hidden")
_LINK: Final = (
    f"-Wl,-soname,{SONAME}",
    "-Wl,-rpath,$ORIGIN",
    "-Wl,--enable-new-dtags",
    "-Wl,-z,defs",
    "-Wl,-z,now",  # what is missing is known at once, not in the middle of a step
)


def place_shim(folder: Path, driver: Path, *, flags: Sequence[str] = ()) -> Path:
    """Build the shim for a driver when it is not in the cache, and put it and its links into a run
    folder; raises EnvironmentRefused or CompileError.
    """
    names = sorted(set(hook_names()) & exported_names(driver))
    if "cuGetProcAddress_v2" not in names:
        raise EnvironmentRefused(
            f"{driver} is no CUDA driver that this can stand before (12 or newer)"
        )
    command = find_compiler()
    key = _key(command, [*FLAGS, *_SHARED, *flags, *_LINK], names)
    built = KernelCache().get(
        key, ".shim", lambda path: _build(command, path, names=names, flags=flags)
    )
    shim = folder / SONAME
    shim.write_bytes(built.read_bytes())
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
    import tempfile  # most starts build nothing

    with tempfile.TemporaryDirectory(prefix="concordia-shim-") as work:
        stub = Path(work, REAL_NAME)
        # Linking against the driver itself would record its own name, which is ours too.
        source = Path(work, "stub.c")
        source.write_text("extern int concordia_stub;\nint concordia_stub;\n")
        named = (f"-Wl,-soname,{REAL_NAME}", "-o", str(stub))
        compile_c("the shim", [command, "-shared", "-fPIC", *named, str(source)])
        script = Path(work, "exports")
        exported = "".join(f"    {name};\n" for name in names)
        script.write_text("{\n  global:\n" + exported + "    concordia_*;\n  local: *;\n};\n")
        compile_c(
            "the shim",
            [
                *(command, *FLAGS, *_SHARED, f"-I{NATIVE}"),
                *(str(source) for source in sources()),
                *(*_LINK, *flags),
                f"-Wl,--version-script={script}",
                *("-Wl,--no-as-needed", f"-L{work}", f"-l:{REAL_NAME}", "-Wl,--as-needed", "-ldl"),
                *("-o", str(path)),
            ],
        )


def _key(command: str, flags: Sequence[str], names: Sequence[str]) -> str:
    digest = xxhash.xxh3_128()
    for part in (identity_of(command), *(text.encode() for text in (*flags, *names))):
        digest.update(len(part).to_bytes(8, "little") + part)
    for name in sorted(os.listdir(NATIVE)):
        if name.endswith((".c", ".h", ".def")):
            content = (NATIVE / name).read_bytes()
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()
