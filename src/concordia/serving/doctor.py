"""What this machine has, and what protection that allows, floor 6.

Owns: the examination behind `concordia doctor`. Promises: starts nothing, loads neither torch nor
vLLM, changes nothing; every finding that limits protection says what to do. Called by the command
line.
"""

from __future__ import annotations

import enum
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from concordia import __version__, config
from concordia.errors import ConcordiaError
from concordia.journal import privacy
from concordia.journal.folder import Folder, fit_size, free_bytes
from concordia.paths import Paths
from concordia.serving.machine import find_engine, find_gpus, read_machine
from concordia.serving.shared_names import SHARED_MEMORY

_MIB: Final = 1 << 20


class Grade(enum.Enum):
    """How a finding counts."""

    GOOD = "ok"
    LIMITED = "limited"  # serves, with less
    MISSING = "missing"  # does not serve


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    name: str
    grade: Grade
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Examination:
    """All findings, and what follows."""

    findings: tuple[Finding, ...]

    @property
    def can_serve(self) -> bool:
        return all(f.grade is not Grade.MISSING for f in self.findings)

    @property
    def protection(self) -> str:
        """One line."""
        if not self.can_serve:
            names = ", ".join(f.name for f in self.findings if f.grade is Grade.MISSING)
            return f"none: {names} must be put right first"
        limits = [f.name for f in self.findings if f.grade is Grade.LIMITED]
        survives = "death and hang of engine, worker or GPU context; not of the host"
        return f"survives {survives}" + (f" (limited by {', '.join(limits)})" if limits else "")

    def as_json(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "can_serve": self.can_serve,
            "protection": self.protection,
            "findings": [
                {"name": f.name, "grade": f.grade.value, "found": f.found, "advice": f.advice}
                for f in self.findings
            ],
        }

    def table(self) -> str:
        """For people."""
        width = max(len(f.name) for f in self.findings)
        lines = []
        for f in self.findings:
            lines.append(f"{f.grade.value:<8} {f.name:<{width}}  {f.found}")
            if f.advice:
                lines.append(f"{'':<8} {'':<{width}}  -> {f.advice}")
        return "\n".join([*lines, "", f"protection: {self.protection}"])


def examine() -> Examination:
    """Look at everything."""
    looks: tuple[Callable[[], Finding], ...] = (
        _system, _device, _vllm, _compiler, _cores, _memory, _shared_memory, _journal, _privacy,
        _priority,
    )  # fmt: skip
    return Examination(tuple(look() for look in looks))


def _system() -> Finding:
    found = (
        f"{platform.system()} {platform.release()} {platform.machine()}, Python "
        f"{platform.python_version()}"
    )
    is_known = platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")
    advice = "" if is_known else "Concordia needs Linux on x86-64"
    return Finding("system", Grade.GOOD if is_known else Grade.MISSING, found, advice)


def _device() -> Finding:
    gpus = find_gpus()
    if gpus:
        return Finding("device", Grade.GOOD, f"{len(gpus)} GPU ({', '.join(gpus)})")
    return Finding("device", Grade.GOOD, f"CPU: {_processor()}")


def _vllm() -> Finding:
    try:
        engine = find_engine()
    except ConcordiaError as error:
        return Finding("vLLM", Grade.MISSING, "not installed", str(error))
    found = f"{engine.distribution} {engine.version} for {engine.device}"
    if (engine.distribution, engine.version) in config.VLLM_PROVEN:
        return Finding("vLLM", Grade.GOOD, found)
    proven = ", ".join(f"{name} {version}" for name, version in config.VLLM_PROVEN)
    return Finding(
        "vLLM", Grade.LIMITED, found, f"proven with {proven}; others as far as they match"
    )


def _compiler() -> Finding:
    name = next(
        (n for n in (os.environ.get("CXX"), "c++", "g++", "clang++") if n and shutil.which(n)), None
    )
    if name is None:
        return Finding("compiler", Grade.MISSING, "none", "install g++, or set CXX")
    done = subprocess.run(
        [name, "--version"],
        capture_output=True,
        text=True,
        timeout=config.COMPILE_WAIT_S,
        check=False,
    )
    return Finding("compiler", Grade.GOOD, (done.stdout.splitlines() or [name])[0])


def _cores() -> Finding:
    cores = read_machine().cores
    found = f"{len(cores)} cores for engines"
    if len(cores) < 2:
        return Finding(
            "cores",
            Grade.LIMITED,
            found,
            "an engine and the router share one core: expect slow failovers",
        )
    return Finding("cores", Grade.GOOD, found)


def _memory() -> Finding:
    machine = read_machine()
    found = (
        f"{machine.memory_free_bytes // _MIB} MiB free under the machine's and the cgroup's limit"
    )
    if machine.memory_free_bytes < 2 * config.ENGINE_BYTES:
        return Finding(
            "memory",
            Grade.LIMITED,
            found,
            "too little for an engine and a standby; use --standby 0",
        )
    return Finding("memory", Grade.GOOD, found)


def _shared_memory() -> Finding:
    if not SHARED_MEMORY.is_dir():
        return Finding("/dev/shm", Grade.MISSING, "not there", "mount a tmpfs on /dev/shm")
    usage = shutil.disk_usage(SHARED_MEMORY)
    found = f"{usage.free // _MIB} of {usage.total // _MIB} MiB free"
    least = config.ENGINE_SHARED_BYTES + 2 * config.JOURNAL_BYTES_MIN
    if usage.free < least:
        advice = (
            f"needs {least // _MIB} MiB at least: docker run --shm-size=8g, or mount -o "
            "remount,size=8g /dev/shm"
        )
        return Finding("/dev/shm", Grade.MISSING, found, advice)
    return Finding("/dev/shm", Grade.GOOD, found)


def _journal() -> Finding:
    path = Paths.default().journal
    try:
        if path.exists():
            Folder(path).check()
            return Finding("journal", Grade.GOOD, f"{path} is there already")
        size = fit_size(SHARED_MEMORY, None, config.SEGMENT_BYTES)
    except ConcordiaError as error:
        return Finding("journal", Grade.MISSING, str(path), str(error))
    room = free_bytes(SHARED_MEMORY) // 2 // _MIB
    return Finding(
        "journal", Grade.GOOD, f"{path}: {size // _MIB} MiB by default, up to {room} MiB"
    )


def _privacy() -> Finding:
    """Prompts lie in the journal: whether they can get to a disk."""
    if not privacy.has_swap():
        return Finding(
            "privacy", Grade.GOOD, "there is no swap, and the journal stays out of core dumps"
        )
    most, size = privacy.lockable_bytes(), config.JOURNAL_BYTES_DEFAULT
    if most is None or most >= size:
        found = "all" if most is None else f"{most // _MIB} MiB"
        return Finding(
            "privacy",
            Grade.GOOD,
            f"the journal is locked in memory (up to {found}), and stays out of core dumps",
        )
    found = (
        f"{most // _MIB} MiB may be locked of a journal of {size // _MIB}: prompts in it may be "
        "swapped to disk"
    )
    return Finding(
        "privacy",
        Grade.LIMITED,
        found,
        "docker run --ulimit memlock=-1, LimitMEMLOCK=infinity, or no swap",
    )


def _priority() -> Finding:
    from concordia.serving.process import can_raise_priority

    if can_raise_priority():
        return Finding("priority", Grade.GOOD, "a loading standby can be given a low priority")
    advice = "without CAP_SYS_NICE a loading standby competes with the engine that serves"
    return Finding("priority", Grade.LIMITED, "cannot be given back once lowered", advice)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return f"{names[0]} x {len(names)}" if names else platform.machine()
