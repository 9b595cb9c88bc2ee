"""The ring, the executor and the handlers under sanitizers: tests/native/ring_stress.cpp, lanes.cpp and cta.h.

Invariants: each of the tasks handed in by four producers runs exactly once, with its own arguments, through laps, full rings, leaves at any
step, parks and hot swaps; nobody sleeps while work waits; no data race, no memory error. The GPU's own code, run by a thread for each lane
of a CTA, has none either, where shuffles and votes order nothing. CONCORDIA_STRESS_TASKS=10000000 (`make test-ring`) runs
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


LANES = SOURCE.with_name("lanes.cpp")
RECORDS = {"records": 3 + 5 + 3 + 35 + 4}
CTA = 64  # lanes: two warps


def build_lanes(folder: Path, name: str, *, flags: list[str], before: list[str], sources: list[Path]) -> Path:
    """lanes.cpp with every handler; `before` is put before each file of device code, of which `sources` are more."""
    flags = [*NATIVE, "-O1", "-g", *BUILDS[name], *flags, *(f"-D{one}={value}" for one, value in GEOMETRY.constants().items())]
    objects = []
    for source in [*(KERNELS / f"{handler}.cu" for handler in HANDLERS), *sources]:
        objects.append(str(folder / f"{source.stem}.o"))
        # Every handler has these names; other ones let all of them into one program.
        names = ("concordia_handler", "concordia_handler_abi", "concordia_handler_pointer")
        renamed = [f"-D{one}={one.replace('concordia', source.stem)}" for one in names]
        compile_with([*flags, *renamed, *before, "-x", "c++", "-c", str(source), "-o", objects[-1]], name)
    binary = folder / "lanes"
    compile_with([*flags, str(LANES), *objects, "-o", str(binary), "-pthread"], name)
    return binary


def run_lanes(binary: Path, *words: str) -> subprocess.CompletedProcess[str]:
    keep = {"ASAN_OPTIONS": "detect_leaks=0"}  # its memory lives as long as the program
    return subprocess.run([str(binary), *words], capture_output=True, text=True, timeout=120, check=False, env=keep)


@pytest.mark.parametrize("is_device", [0, 1], ids=["cpu-shape", "gpu-shape"])
@pytest.mark.parametrize("name", ["thread", "address"])
def test_lanes_do_not_race_when_four_run_a_handler(
    tmp_path: Path, name: str, is_device: int
) -> None:
    shape = [f"-DCONCORDIA_DEVICE_SHAPE={is_device}", "-DPAGE_BYTES=8192"]
    done = run_lanes(build_lanes(tmp_path, name, flags=shape, before=[], sources=[]))
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == RECORDS


def build_cta(folder: Path, name: str, *more: str) -> Path:
    shape = ["-DCONCORDIA_DEVICE_SHAPE=1", f"-DCONCORDIA_CTA={CTA}", "-Wno-unused-function", "-Wno-unused-parameter", *more]
    before = ["-include", str(SOURCE.with_name("cta.h"))]
    return build_lanes(folder, name, flags=shape, before=before, sources=[*(KERNELS / f"{kernel}.cu" for kernel in ("executor", "kv_restore")), SOURCE.with_name("cta.cpp")])


@pytest.mark.parametrize("page_bytes", [4096, 8192])
@pytest.mark.parametrize("name", ["thread", "address"])
def test_lanes_of_a_cta_do_not_race_when_only_barriers_order_memory(tmp_path: Path, name: str, page_bytes: int) -> None:
    binary = build_cta(tmp_path, name, f"-DPAGE_BYTES={page_bytes}")
    for words in ((), ("stream",)):  # a stay of its own, or work of a framework's stream
        done = run_lanes(binary, *words)
        assert done.returncode == 0, done.stderr[-4000:]
        assert json.loads(done.stdout) == RECORDS


def test_lanes_of_a_cta_race_when_a_warp_s_barrier_orders_nothing(tmp_path: Path) -> None:
    done = run_lanes(build_cta(tmp_path, "thread", "-DPAGE_BYTES=8192", "-DCONCORDIA_CTA_LOOSE"))
    assert done.returncode == 66, done.stderr[-4000:]  # ThreadSanitizer's own
    for found in ("take_fetched", "fill_header", "put_commits"):
        assert found in done.stderr
