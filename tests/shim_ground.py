"""What tests of the shim stand on: a driver in plain C, programs that use it, and a run folder with the shim in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from concordia.integrations.program.shim_build import place_shim

NATIVE = Path(__file__).parent / "native"
DRIVER_SOURCES = ("fake_driver.c", "fake_modules.c", "fake_streams.c")
STRICT = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-O1", "-fno-strict-aliasing")


def build_driver(folder: Path, *flags: str) -> Path:
    """The fake driver as libcuda.so.1 in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "libcuda.so.1"
    sources = [str(NATIVE / name) for name in DRIVER_SOURCES]
    compile_c([*sources, "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic", *flags], path)
    (folder / "libcuda.so").symlink_to(path.name)
    return path


def build_user(folder: Path, driver: Path, *flags: str) -> Path:
    """The program of shim_user.c, linked with the driver by its name."""
    path = folder / "user"
    needs = ["-DNEEDED", "-Wl,--no-as-needed", f"-L{driver.parent}", "-l:libcuda.so.1"]
    compile_c([str(NATIVE / "shim_user.c"), "-Wno-deprecated-non-prototype", *needs, *flags, "-ldl"], path)
    return path


def compile_c(arguments: list[str], path: Path) -> None:
    """With the system's compiler, warnings as errors."""
    command = [os.environ.get("CC", "cc"), *STRICT, *arguments, "-pthread", "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[:4000]


@dataclass
class ShimGround:
    """A run folder, a driver in a folder of its own, and the program."""

    driver: Path
    user: Path
    run: Path
    settings: dict[str, str] = field(default_factory=lambda: {"opaque": ""})

    def settle(self, **settings: object) -> None:
        """Write the shim's settings."""
        self.settings.update({name: str(value) for name, value in settings.items()})
        lines = "".join(f"{name}={value}\n" for name, value in self.settings.items())
        (self.run / "settings").write_text(lines)

    def environment(self, *, shimmed: bool = True, **more: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("CONCORDIA", "LD_", "FAKE"))}
        path = f"{self.run}:{self.driver.parent}" if shimmed else str(self.driver.parent)
        return {**clean, "LD_LIBRARY_PATH": path, "CONCORDIA_RUN": str(self.run), **more}

    def do(self, *words: str, shimmed: bool = True, program: Path | None = None, code: int = 0, **environment: str) -> list[str]:
        """Run the program through the shim and give its lines."""
        done = subprocess.run(
            [str(program or self.user), *words],
            env=self.environment(shimmed=shimmed, **environment),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, f"{done.returncode}: {done.stdout}\n{done.stderr}"
        assert "Sanitizer" not in done.stderr, done.stderr
        return done.stdout.splitlines()


def folder_of_length(folder: Path, size: int) -> Path:
    """A folder's path of this many bytes, below this one."""
    left = size - len(os.fsencode(folder))
    assert left >= 2, f"{folder} is too long to begin with"
    while left > 202:  # a name has 255 at most, and the last one 1 at least
        folder /= "n" * 199
        left -= 200
    return folder / ("n" * (left - 1))


def make_ground(folder: Path, driver: Path, user: Path, *flags: str) -> ShimGround:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, mode=0o700)
    (run / "modules").mkdir(mode=0o700)
    place_shim(run, driver, flags=("-Werror", *flags))
    ground = ShimGround(driver, user, run)
    ground.settle()
    return ground
