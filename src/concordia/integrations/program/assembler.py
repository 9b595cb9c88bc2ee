"""The stand-in for ptxas under `concordia run`, floor 7.

Owns: how native/assembler/ becomes a program, where it lies, and what Triton and it are told.
Promises: built once for the same sources, compiler and flags; Triton is pointed to it only after it
has answered from where it lies; the assembler that the user or Triton chose does the work. Called
by launch when stores are to be marked. A stand-in that cannot be had costs marks, not the run. What
it does with a text is native/assembler's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from concordia import config
from concordia.device.kernel_cache import KernelCache
from concordia.errors import ConcordiaError
from concordia.instrument.cache import ImageCache
from concordia.instrument.options import Options
from concordia.integrations.program.native_build import (
    FLAGS,
    NATIVE,
    compile_c,
    find_compiler,
    identity_of,
)
from concordia.integrations.program.run_folder import ProgramRun
from concordia.paths import Paths

# Names of the assemblers, and where Triton reads which one to take.
VARIABLES: Final = {
    "ptxas": "TRITON_PTXAS_PATH",
    "ptxas-blackwell": "TRITON_PTXAS_BLACKWELL_PATH",
}
# torch.compile keeps finished kernels under keys of its own, to which this is added.
_TORCH_TAG: Final = "TORCH_COMPILE_CACHE_KEY_TAG"
_TORCH_TAG_DIGITS: Final = 16
ARCHITECTURE_END: Final = 100  # from here on the driver finishes machine code, and no file is read
_SHARED: Final = ("cache_file.c", "hash.c", "key.c", "process_settings.c", "rewriter.c")
_CHECK: Final = "--concordia"


@dataclass(frozen=True, slots=True)
class StandIn:
    """A stand-in in a run folder, or why there is none."""

    paths: Mapping[str, Path] = field(default_factory=dict)  # by the name of the assembler
    settings: Mapping[str, object] = field(default_factory=dict)
    key: str = ""  # of the options
    why_not: str = ""

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """What is added to a program's, once the run's settings are written: nothing where the
        stand-in does not run.
        """
        if not self.paths or not all(map(_answers, self.paths.values())):
            return {}
        tag = f"{given.get(_TORCH_TAG, '')}+concordia-{self.key[:_TORCH_TAG_DIGITS]}"
        return {VARIABLES[name]: str(path) for name, path in self.paths.items()} | {_TORCH_TAG: tag}


def place_stand_in(run: Path, options: Options, environment: Mapping[str, str]) -> StandIn:
    """Put it into a run folder, for marks with these options."""
    if options.arch >= ARCHITECTURE_END:
        return StandIn(why_not=f"machine code for sm_{options.arch} cannot be read")
    try:
        built = _built()
        paths = {name: run / name for name in VARIABLES}
        for path in paths.values():
            shutil.copyfile(built, path)
            path.chmod(0o700)
        wanted = options.replaced(assembler=True)
        cache = ImageCache(Paths.default().image_cache, wanted.key())
    except (ConcordiaError, OSError) as error:
        return StandIn(why_not=str(error))
    settings: dict[str, object] = {
        "assembler_cache": cache.folder,
        "assembler_key": wanted.key(),
        "assembler_wait_ms": int(1000 * config.ASSEMBLER_WAIT_S),
        "assembler_run_ms": int(1000 * config.ASSEMBLER_RUN_S),
    }
    for name, variable in VARIABLES.items():
        if real := _chosen(name, environment.get(variable, "")):
            settings[f"real_{name}"] = real
        if found := _bundled(name):
            settings[f"found_{name}"] = found
    return StandIn(paths, settings, wanted.key())


def build(path: Path, *, flags: tuple[str, ...] = ()) -> None:
    """Compile it; raises EnvironmentRefused or CompileError."""
    files = map(str, sources())
    compile_c("the stand-in", [find_compiler(), *FLAGS, *flags, *files, "-o", str(path)])
    path.chmod(0o700)


def sources() -> tuple[Path, ...]:
    """The files that are compiled."""
    own = sorted((NATIVE / "assembler").glob("*.c"))
    return (*own, *(NATIVE / name for name in _SHARED))


def _built() -> Path:
    digest = hashlib.sha256(identity_of(find_compiler()) + " ".join(FLAGS).encode())
    for path in (*sources(), *sorted(NATIVE.glob("**/*.h")), *sorted(NATIVE.glob("*.def"))):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return KernelCache().get(digest.hexdigest(), ".stand-in", build)


def _chosen(name: str, given: str) -> str:
    """The assembler that the user chose; in a run inside a run the one that stood there before."""
    path = shutil.which(given) if given else None
    if path is None:
        return ""
    settings = ProgramRun(Path(path).parent).settings()
    if "assembler_key" in settings:
        return settings.get(f"real_{name}", "")
    return str(Path(path).absolute())


def _bundled(name: str) -> str:
    """That of this interpreter's Triton, which is not imported for it."""
    try:
        found = importlib.util.find_spec("triton")
    except (ImportError, ValueError):
        return ""
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder, "backends", "nvidia", "bin", name)
        if os.access(path, os.X_OK):
            return str(path)
    return ""


def _answers(path: Path) -> bool:
    """A folder may forbid that programs in it are started, and Triton would fail with it."""
    try:
        done = subprocess.run(
            [str(path), _CHECK], capture_output=True, timeout=config.COMPILE_WAIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
