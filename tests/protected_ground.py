"""What tests of protected programs stand on: a driver whose work is done later, a program that uses it, the shim, and a program's life."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from concordia.instrument.cache import ImageCache, image_key
from concordia.instrument.options import Options
from concordia.instrument.report import KernelReport, Rewritten, Slot, SlotKind
from concordia.integrations.program.policy import Policy, parse_policy
from concordia.integrations.program.program_pages import Board, create_reads, create_stage
from concordia.integrations.program.shim_build import place_shim
from shim_ground import NATIVE, compile_c

LIFE_S = 60.0  # longest that one program may take


def build(folder: Path, *flags: str, source: str = "protected_program.c", shim: Sequence[str] = ()) -> ProtectedGround:
    """Driver, program and shim, in folders of their own; `flags` are the program's, whose `source` is one of native/."""
    driver = folder / "driver" / "libcuda.so.1"
    driver.parent.mkdir(parents=True)
    shape = ["-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic"]
    compile_c([str(NATIVE / "fake_gpu.c"), str(NATIVE / "fake_tensor_maps.c"), *shape, "-ldl"], driver)
    program = folder / "program"
    compile_c([str(NATIVE / source), f"-L{driver.parent}", "-l:libcuda.so.1", *flags], program)
    run = folder / "run"
    run.mkdir(mode=0o700)
    place_shim(run, driver, flags=shim)
    return ProtectedGround(driver.parent, program, run)


@dataclass
class ProtectedGround:
    driver: Path
    program: Path
    run: Path

    def environment(self, *, shimmed: bool = True, **more: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("CONCORDIA", "LD_", "FAKE", "PROGRAM"))}
        path = f"{self.run}:{self.driver}" if shimmed else str(self.driver)
        return {**clean, "LD_LIBRARY_PATH": path, **more}

    def start(self, *words: str, shimmed: bool = True, program: list[str] | None = None, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*(program or [str(self.program)]), *words],
            env=self.environment(shimmed=shimmed, **environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def protected_folder(folder: Path, policy: Policy) -> Board:
    """What protection.py makes, without a journal: the test itself answers posts."""
    folder.mkdir()
    (folder / "policy").write_text(policy.lines())
    Board.create(folder / "board", policy.stage_bytes)
    create_stage(folder / "stage", policy.stage_bytes)
    create_reads(folder / "reads", policy.reads_bytes)
    return Board(folder / "board", policy.stage_bytes)


def policy_of(regions: str, *, trigger: str = "kernel:update", more: str = "") -> Policy:
    text = f'[journal]\nplace = "/dev/shm/none"\n[limits]\nstage = "32MiB"\nreads = "1MiB"\n{regions}\n[[trigger]]\non = "{trigger}"\n{more}'
    return parse_policy(text, "test.toml")


def marking_run(folder: Path) -> dict[str, str]:
    """The settings of a run in which the program's image is found hooked: its kernels mark what they store."""
    run, image = folder / "hooked-run", b".version 8.0"
    (run / "modules").mkdir(parents=True)
    run.chmod(0o700)
    cache = ImageCache(folder / "cache", Options().key())
    hooked = image + b"\n// hooked: 0x0000000000000000\n"
    kernels = tuple(KernelReport(name, 5, 32, "") for name in ("fill", "axpy", "scatter", "indirect", "sum", "mix", "update"))
    cache.store(image_key(image), Rewritten(hooked, (Slot(hooked.index(b"0x") + 2, SlotKind.TEXT),), kernels, is_changed=True))
    (run / "settings").write_text(f"mode=rewrite\nopaque=\ncache={cache.folder}\npage_shift=16\n")
    return {"CONCORDIA_RUN": str(run)}
