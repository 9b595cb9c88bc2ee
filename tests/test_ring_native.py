"""The ring and the CPU executor under sanitizers: tests/native/ring_stress.cpp.

Invariants: each of the tasks handed in by four producers runs exactly once, with its own arguments, through laps, full rings, leaves at any
step, parks and hot swaps; nobody sleeps while work waits; no data race, no memory error. CONCORDIA_STRESS_TASKS=10000000 (`make test-ring`) runs
the long version (about a minute per build on an idle pair of cores), CONCORDIA_STRESS_SEED repeats a run, CONCORDIA_STRESS_RESULTS names
a file that is told what ran.
"""

import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from concordia.checkpoint.region import KvGeometry, Plane
from concordia.device.compiler import FLAGS, KERNELS
from concordia.testing.machine import machine

SOURCE = Path(__file__).parent / "native" / "ring_stress.cpp"
PRODUCERS = 4  # kProducers there
TASKS = int(os.environ.get("CONCORDIA_STRESS_TASKS", "500000"))
SEED = int(os.environ.get("CONCORDIA_STRESS_SEED", "0")) or secrets.randbits(32)
BUILDS = {
    "plain": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


NATIVE = [flag for flag in FLAGS if flag not in ("-shared", "-O3", "-fvisibility=hidden")] + [
    "-Werror",
    f"-I{KERNELS}",
]


def compile_with(words: list[str], name: str) -> None:
    done = subprocess.run(["g++", *words], capture_output=True, text=True, timeout=120, check=False)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip(f"this compiler has no runtime for {BUILDS[name][0]}")
    assert done.returncode == 0, done.stderr


def build(folder: Path, name: str) -> Path:
    binary = folder / f"ring_stress_{name}"
    compile_with(
        [*NATIVE, "-O2", "-g", *BUILDS[name], str(SOURCE), "-o", str(binary), "-pthread"], name
    )
    return binary


@pytest.fixture(scope="module", params=BUILDS)
def stress(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    return request.param, build(tmp_path_factory.mktemp("native"), request.param)


def run(binary: Path, tasks: int, *, lanes: int, slots: int, how: str) -> dict[str, float]:
    words = [str(binary), str(tasks), str(SEED), str(lanes), str(slots), how]
    print("seed", SEED, " ".join(words))
    done = subprocess.run(words, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-4000:]}"
    print(done.stdout)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, object]]]:
    """What was run, for the file that CONCORDIA_STRESS_RESULTS names."""
    rows: list[dict[str, object]] = []
    yield rows
    path = os.environ.get("CONCORDIA_STRESS_RESULTS")
    if path and rows:
        Path(path).write_text(json.dumps({"machine": machine(), "runs": rows}, indent=1) + "\n")


@pytest.mark.timeout(600)
def test_each_task_runs_once_when_the_ring_is_flooded(
    stress: tuple[str, Path], results: list[dict[str, object]]
) -> None:
    figures = run(stress[1], TASKS, lanes=1, slots=64, how="flood")
    figures_told = {name: figures[name] for name in ("tasks", "seed", "seconds", "laps", "full", "forced_leaves", "swaps")}
    results.append({"sanitizer": stress[0], "producers": PRODUCERS, **figures_told})
    assert figures["laps"] > 100
    assert figures["full"] > 0
    assert figures["forced_leaves"] > 100
    assert figures["swaps"] > 1


def test_each_task_runs_once_when_four_lanes_share_it(stress: tuple[str, Path]) -> None:
    assert run(stress[1], TASKS // 20, lanes=4, slots=16, how="flood")["launches"] > 10


def test_no_task_waits_alone_when_the_executor_leaves_at_that_moment(
    stress: tuple[str, Path],
) -> None:
    tasks = TASKS // 20
    figures = run(stress[1], tasks, lanes=1, slots=64, how="turns")
    # Some found it inside and some had to wake it, unless the machine is so busy that it always had time to leave.
    assert 0 < figures["launches"] <= tasks + 1


GEOMETRY = KvGeometry(
    layers=2, block_count=8, block_tokens=16, block_bytes=4096, heads=2, head_dim_key=32, head_dim_value=32, element_bytes=2,
    key=Plane(0, 2048, 2, 32), value=Plane(1024, 2048, 64, 2), dtype="bfloat16", instruction_set="vec",
)  # fmt: skip
HANDLERS = ("kv_append", "kv_apply", "kv_hash", "bytes_append", "page_scan")


@pytest.mark.parametrize("is_device", [0, 1], ids=["cpu-shape", "gpu-shape"])
@pytest.mark.parametrize("name", ["thread", "address"])
def test_lanes_do_not_race_when_four_run_a_handler(
    tmp_path: Path, name: str, is_device: int
) -> None:
    flags = [
        *NATIVE,
        "-O1",
        "-g",
        *BUILDS[name],
        f"-DCONCORDIA_DEVICE_SHAPE={is_device}",
        "-DPAGE_BYTES=8192",
    ]
    flags += [f"-D{name}={value}" for name, value in GEOMETRY.constants().items()]
    objects = []
    for handler in HANDLERS:
        objects.append(str(tmp_path / f"{handler}.o"))
        # Every handler has these two names; other ones let all of them into one program.
        renamed = [
            f"-Dconcordia_handler={handler}_handler",
            f"-Dconcordia_handler_abi={handler}_abi",
        ]
        compile_with(
            [
                *flags,
                *renamed,
                "-x",
                "c++",
                "-c",
                str(KERNELS / f"{handler}.cu"),
                "-o",
                objects[-1],
            ],
            name,
        )
    binary = tmp_path / "lanes"
    compile_with(
        [*flags, str(SOURCE.with_name("lanes.cpp")), *objects, "-o", str(binary), "-pthread"], name
    )
    keep = {"ASAN_OPTIONS": "detect_leaks=0"}  # its memory lives as long as the program
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120, check=False, env=keep)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == {"records": 3 + 5 + 3}
