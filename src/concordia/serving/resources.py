"""How the engines share one machine, floor 6.

Owns: each engine's part of the machine, and the journal's. Promises: the parts never add up to more
than there is; what the user set in a flag or an environment variable is kept; what cannot fit is
refused with what to do. Called by the command line; replicas are started with their share. It
starts nothing, and changes no setting of this process.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from concordia import config
from concordia.errors import EnvironmentRefused, UsageError
from concordia.serving.engine_flags import EngineFlags
from concordia.serving.machine import Engine, Machine
from concordia.serving.shared_names import SHARED_MEMORY

_BINDING: Final = "VLLM_CPU_OMP_THREADS_BIND"
_WEIGHTS: Final = ("*.safetensors", "*.bin", "*.pt")
_SHIFTS: Final = {
    "": 0, "b": 0, "k": 10, "kib": 10, "m": 20, "mib": 20, "g": 30, "gib": 30, "t": 40, "tib": 40,
}  # fmt: skip


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
    kv_bytes: int | None  # per engine, on all its ranks; None where nobody knows before it runs
    notes: tuple[str, ...]


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
        shares, kv_bytes, notes = _gpu_shares(machine, flags, count, weights_bytes)
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


def check_shared_memory(*, journal_bytes: int, where: pathlib.Path) -> None:
    """Raise EnvironmentRefused when /dev/shm cannot hold the journal and the engines' queues."""
    is_shared = where.is_relative_to(SHARED_MEMORY)
    needed = config.ENGINE_SHARED_BYTES + (journal_bytes if is_shared else 0)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise EnvironmentRefused(
            f"/dev/shm has {free >> 20} MiB free; the engines and the journal need {needed >> 20} "
            "MiB: "
            f"give it more (docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm)"
            + (", or set a smaller --journal-size" if is_shared else "")
        )


def core_groups(
    cores: Sequence[int], *, count: int, replicas: int, world: int
) -> list[list[list[int]]]:
    """Cores per engine and rank.

    One core per rank is kept free for the HTTP server, scheduler and router, as vLLM does. All
    active engines have groups of their own; standbys too when there are cores enough, else they lie
    over an active one's, which costs nothing while they only wait.
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


def parse_bytes(text: str) -> int:
    """A size with an optional suffix: 512MiB, 2GiB, 2g, 1073741824. Raises UsageError."""
    number = text.strip().rstrip(string.ascii_letters)
    shift = _SHIFTS.get(text.strip()[len(number) :].lower())
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if shift is None or value <= 0:
        raise UsageError(f"{text!r} is no size; write 512MiB or 2GiB")
    return int(value * (1 << shift))


def _cpu_shares(
    machine: Machine, flags: EngineFlags, *, replicas: int, count: int, weights_bytes: int
) -> tuple[tuple[Share, ...], int | None, tuple[str, ...]]:
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
                f"{count} engines with {kv_bytes >> 20} MiB of KV cache and {weights_bytes >> 20} "
                "MiB of weights each do not fit into "
                f"{machine.memory_free_bytes >> 20} MiB of free memory: lower "
                "--kv-cache-memory-bytes, --replicas or --standby"
            )
    names = ("--enforce-eager", "--compilation-config", "--optimization-level")
    if not flags.has(*names) and not any(name.startswith("-O") for name in flags.names()):
        # Compiling takes longer than all the rest of a start, and is repeated at each; it brought
        # no tokens/s.
        fixed.append("--enforce-eager")
    is_eager = "--enforce-eager" in fixed or flags.is_on("--enforce-eager")
    environment: dict[str, str] = {}
    if is_eager and "TORCH_COMPILE_DISABLE" not in os.environ:
        # Else vLLM compiles what ranks log-probabilities when the first request wants some: 20 s,
        # and 11 s from its cache.
        environment["TORCH_COMPILE_DISABLE"] = "1"
    if _BINDING in os.environ:
        note = f"cores as {_BINDING} says"
        return (Share(environment, tuple(fixed)),) * count, kv_bytes, (note,)
    groups = core_groups(machine.cores, count=count, replicas=replicas, world=flags.world_size)
    shares = []
    for ranks in groups:
        binding = "|".join(",".join(str(core) for core in rank) for rank in ranks)
        cores = tuple(tuple(rank) for rank in ranks)
        shares.append(Share({**environment, _BINDING: binding}, tuple(fixed), cores))
    return tuple(shares), kv_bytes, ()


def _cpu_kv_bytes(machine: Machine, *, replicas: int, count: int, weights_bytes: int) -> int:
    """KV cache of one engine, so that engines, weights and the journal fit into what is free."""
    room = int(config.MEMORY_USED_MAX * machine.memory_free_bytes)
    room -= count * int(config.ENGINE_BYTES + config.WEIGHTS_FACTOR * weights_bytes)
    kv_bytes = int(room / (count + config.JOURNAL_PER_KV * replicas))
    kv_bytes = min(kv_bytes, config.CPU_KV_BYTES_MAX) >> 20 << 20
    if kv_bytes < config.CPU_KV_BYTES_MIN:
        raise UsageError(
            f"{count} engines of {weights_bytes >> 20} MiB of weights do not fit into "
            f"{machine.memory_free_bytes >> 20} MiB of "
            "free memory: use fewer --replicas or --standby, or set --kv-cache-memory-bytes "
            "yourself"
        )
    return kv_bytes


def _gpu_shares(
    machine: Machine, flags: EngineFlags, count: int, weights_bytes: int
) -> tuple[tuple[Share, ...], int | None, tuple[str, ...]]:
    world = flags.world_size
    places = len(machine.gpus) // world
    if places == 0:
        raise UsageError(
            f"{world} ranks need {world} GPUs and {len(machine.gpus)} can be used: lower "
            "--tensor-parallel-size"
        )
    per_device = -(-count // places)  # engines that share a device, rounded up
    fixed: tuple[str, ...] = ()
    notes = []
    given = flags.value("--gpu-memory-utilization")
    try:
        whole = float(given) if given is not None else config.GPU_UTILIZATION
    except ValueError:
        raise UsageError(f"--gpu-memory-utilization wants a number, not {given!r}") from None
    part = int(1000 * whole / per_device) / 1000
    if per_device > 1:
        # Also beside --kv-cache-memory-bytes: vLLM starts only where so much memory is free.
        fixed = ("--gpu-memory-utilization", f"{part:.3f}")
        notes.append(f"{per_device} engines share a GPU: each takes {part:.0%} of its memory")
    kv_bytes = None
    if flags.value("--kv-cache-memory-bytes") is not None:
        kv_bytes = world * flags.number("--kv-cache-memory-bytes", 0)
    elif machine.gpu_bytes:
        # What the engine will measure as left over, about: only the journal's size hangs on it.
        left = part * machine.gpu_bytes - config.GPU_WORK_BYTES - weights_bytes / world
        kv_bytes = max(0, int(left)) * world
    shares = []
    for slot in range(count):
        place = slot % places
        devices = machine.gpus[place * world : (place + 1) * world]
        shares.append(Share({"CUDA_VISIBLE_DEVICES": ",".join(devices)}, fixed))
    return tuple(shares), kv_bytes, tuple(notes)


def _memory_is_set(flags: EngineFlags) -> bool:
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return True
    return flags.has(
        "--kv-cache-memory-bytes", "--gpu-memory-utilization", "--num-gpu-blocks-override"
    )
