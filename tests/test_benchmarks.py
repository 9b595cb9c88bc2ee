"""The benchmarks as far as they can be tried without a GPU.

Invariants: a figure's numbers are what they are called; peers that have figures of their own are named in the others; wrong arguments and a missing
GPU end with one line and 2; the parts of the suite that a CPU device can run find what they must and refuse what is wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import delta  # noqa: E402
import drawing  # noqa: E402
import engine  # noqa: E402
import figures  # noqa: E402
import goals  # noqa: E402
import host_scan  # noqa: E402
import kernel_limits  # noqa: E402
import lent_stream  # noqa: E402
import plot  # noqa: E402
import recovery  # noqa: E402
import slope  # noqa: E402
import swap  # noqa: E402
import table  # noqa: E402
import transfer  # noqa: E402
from engine_client import Stream  # noqa: E402
from loops import Loops  # noqa: E402

from concordia import abi  # noqa: E402
from concordia.checkpoint.checkpointer import Checkpointer  # noqa: E402
from concordia.device.compiler import HandlerSource  # noqa: E402
from concordia.device.cuda import CudaCompiler  # noqa: E402
from concordia.device.host import HostDevice  # noqa: E402
from concordia.device.kernel_cache import KernelCache  # noqa: E402
from concordia.errors import ConcordiaError, DeviceError  # noqa: E402
from concordia.testing import command  # noqa: E402


@pytest.fixture
def host() -> Iterator[HostDevice]:
    device = HostDevice()
    yield device
    device.close()


@pytest.fixture
def stream() -> Iterator[lent_stream.Stream]:
    opened = lent_stream.Stream(segments=3)
    yield opened
    opened.close()


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        capture_output=True, text=True, check=False, timeout=120, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "src"), "HOME": "/nonexistent", "CONCORDIA_CACHE": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


# --- figures


def test_figure_has_median_minimum_and_tail_when_values_are_unordered() -> None:
    found = figures.figure([float(v) for v in range(100, 0, -1)], "us")
    assert found == {"median": 50.5, "min": 1.0, "p95": 96.0, "unit": "us", "n": 100}


def test_bandwidth_counts_powers_of_ten_when_bytes_are_given() -> None:
    assert figures.gb_per_s(50_000_000_000, [1.0, 2.0, 0.5])["median"] == 50.0


def test_interval_holds_the_median_and_shrinks_when_values_are_many() -> None:
    few, many = ([((7 * i) % n) / n for i in range(n)] for n in (10, 1000))
    widths = []
    for values in (few, many):
        low, high = figures.interval(values)
        assert low <= sorted(values)[len(values) // 2] <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def test_slope_is_that_of_the_line_when_the_points_lie_on_one() -> None:
    assert figures.slope([1, 8, 32, 128], [3.0, 17.0, 65.0, 257.0]) == pytest.approx(2.0)


def test_saved_figures_add_up_and_name_their_peers_when_these_come_in_any_order(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "results.json"
    figures.save(path, {"recovery_next_token": {"median": 0.5, "peer": {"recompute": 1.2}}})
    figures.save(path, {"driver_restore": {"median": 2.3, "peer": {}}})
    found = json.loads(path.read_text())["figures"]
    assert found["recovery_next_token"]["peer"] == {"recompute": 1.2, "driver_restore": 2.3}
    figures.save(path, {"recovery_next_token": {"median": 0.4, "peer": {"recompute": 1.1}}})
    found = json.loads(path.read_text())["figures"]
    assert found["recovery_next_token"] == {"median": 0.4, "peer": {"recompute": 1.1, "driver_restore": 2.3}}


# --- page and pictures

SAMPLE = {"min": 1.0, "p95": 2.0, "n": 5}


def sample() -> dict[str, dict[str, Any]]:
    """A figure for every goal, each just reached, with a peer."""
    made = {}
    for goal in goals.GOALS:
        median = goal.must * (0.99 if goal.is_most else 1.001)
        made[goal.key] = {**SAMPLE, "median": median, "unit": goal.unit, "interval_95": [median, median], "peer": {"recompute": 3.0}}
    made["cost_slope"] = slope.slope_figure([{1024: (30.0, 10.0), 8192: (31.0, 10.0)}, {1024: (31.0, 10.0), 8192: (30.0, 10.0)}], {})
    return made


def test_goal_is_met_on_its_own_side_alone_when_a_figure_lies_at_it() -> None:
    below, above = goals.BY_KEY["submit"], goals.BY_KEY["append_bandwidth"]
    assert [below.is_met(0.099), below.is_met(0.1), above.is_met(50.1), above.is_met(50.0)] == [True, False, True, False]


def test_table_has_every_key_and_says_what_is_missing_when_figures_are_few() -> None:
    full, empty = table.table(sample()), table.table({})
    for key in goals.KEYS:
        assert f"| `{key}` |" in full
        assert f"| `{key}` |" in empty
    assert full.count("| reached |") == len(goals.KEYS)
    assert empty.count("not yet") == len(goals.KEYS)
    assert "recompute 3" in full
    assert "GB/s, 4 CTAs |" in table.table({"append_bandwidth": {**SAMPLE, "median": 51.0, "unit": "GB/s", "ctas": 4, "peer": {}}})


def test_table_replaces_only_what_lies_between_its_marks() -> None:
    page = f"head\n{table.BEGIN}was here\n{table.END}tail\n"
    made = table.with_table(page, {})
    assert made.startswith("head\n")
    assert made.endswith(f"{table.END}tail\n")
    assert "was here" not in made
    assert table.with_table(made, {}) == made
    with pytest.raises(ValueError, match="no lines"):
        table.with_table("head\n", {})


@pytest.mark.parametrize(("us", "said"), [(0.087, "87 ns"), (6.486, "6.49 µs"), (771.561, "772 µs"), (999.96, "1 ms"), (405189.0, "405 ms"), (1.7e6, "1.7 s")])
def test_times_are_written_in_the_unit_that_suits_them(us: float, said: str) -> None:
    assert drawing.say_time(us) == said


def test_every_picture_is_drawn_with_its_digest_when_all_is_measured_and_removed_when_nothing_is(tmp_path: pathlib.Path) -> None:
    with drawing.styled():
        for name, (draw, _) in plot.PICTURES.items():
            drawing.save_picture(draw({plot.DEVICE: {"figures": sample()}}), tmp_path / name, "digest-of-it")
            assert b"digest-of-it" in (tmp_path / name).read_bytes()
        drawing.save_picture(None, tmp_path / "times.png", "")
        assert not (tmp_path / "times.png").exists()
        assert plot.times({plot.DEVICE: {"figures": {}}}) is None


def test_plots_end_with_2_when_a_file_holds_no_results(tmp_path: pathlib.Path) -> None:
    (tmp_path / plot.DEVICE).write_text("{}")
    done = run("plot.py", "--results", str(tmp_path), "--output", str(tmp_path))
    assert (done.returncode, list(tmp_path.glob("*.png"))) == (2, [])


# --- commands


@pytest.mark.parametrize("started", ["device_runtime.py", "gpu.py", "residency.py", "engine.py", "kernel_limits.py", "swap_storm.py --device cuda:0"])
def test_benchmark_of_the_gpu_ends_with_one_line_and_2_when_it_sees_none(started: str) -> None:
    script, *arguments = started.split()
    done = run(script, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(rf"{script}: (no CUDA driver on this machine: .*|no CUDA bindings .*|this process sees no NVIDIA GPU)", line)


WRONG = {
    "device_runtime.py": ["--only everything", "--only", "--frobnicate", "--output /nope/x.json"],
    "gpu.py": ["--ctas 0", "--ctas"],
    "kernel_limits.py": ["--scans 0", "--stores few", "--output /nope/x.json"],
    "residency.py": ["--output /"],
    "swap_storm.py": ["--swaps 0", "--tasks many", "--device foo", "--output OTHER"],
    "kill_rounds.py": ["--rounds 0", "--rounds -3", "--device cuda:99", "--output /nope/x.json", "--output OTHER"],
    "engine.py": ["--only all", "--pairs 0"],
    "cost.py": ["--starts 0", "--result /nope/x.json"],
    "soak.py": ["--faults 0"],
    "sanitize.py": ["--tool", "--output /nope/x.json"],
    "plot.py": ["--output /nope"],
    "table.py": ["--page /nope", "--page OTHER"],
}


@pytest.mark.parametrize("script", WRONG)
def test_benchmark_ends_with_one_line_and_2_when_arguments_are_wrong(script: str, tmp_path: pathlib.Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    for arguments in WRONG[script]:
        done = run(script, *arguments.replace("OTHER", str(other)).split())
        assert done.returncode == 2, f"{arguments}: {done.stderr}"
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"{script}: ")
    assert other.read_text() == "{}"
    assert not pathlib.Path("/nope").exists()


def test_results_are_added_to_a_file_that_has_some_and_to_a_new_one(tmp_path: pathlib.Path) -> None:
    path, wanted = tmp_path / "results.json", command.result_file("figures")
    assert wanted(str(path)) == path
    figures.save(path, {"submit": {"median": 0.5, "peer": {}}})
    assert wanted(str(path)) == path


@pytest.mark.parametrize(("arguments", "is_all"), [("", True), ("--only delta append", False)])
def test_make_runs_residency_and_storm_only_when_no_part_is_chosen(arguments: str, is_all: bool) -> None:
    done = subprocess.run(["make", "-n", "bench-gpu", f"ARGS={arguments}", "ENV_PYTHON=python3"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    assert f"device_runtime.py {arguments}" in done.stdout
    assert ("residency.py" in done.stdout, "swap_storm.py" in done.stdout) == (is_all, is_all)


def test_help_names_every_part_and_figure_when_it_is_asked_for() -> None:
    done = run("device_runtime.py", "--help")
    assert done.returncode == 0
    for word in ("submit", "ring_round_trip", "delta_write_set", "append_bandwidth", "restore_bandwidth", "hot_swap_pause", "protection_bytes"):
        assert word in done.stdout


# --- a real engine's figures, of answers with known stamps


class KnownClient:
    """Answers with a first token after `first_s` and one every `pace_us(tokens of context)` then."""

    def __init__(self, first_s: float, pace_us: Any) -> None:
        self._first_s, self._pace_us = first_s, pace_us

    async def ask_all(self, prompts: list[list[int]], tokens: int) -> list[Stream]:
        return [
            Stream([self._first_s + i * self._pace_us(len(prompt)) / 1e6 for i in range(tokens)], list(range(tokens)), 0.0)
            for prompt in prompts
        ]  # fmt: skip


def test_ratios_are_first_arm_over_second_when_their_speeds_are_known(tmp_path: pathlib.Path) -> None:
    options = engine.parse(["--pairs", "6", "--requests", "3", "--tokens", "50"])
    arms: Any = [KnownClient(0.55, lambda _: 10_200), KnownClient(0.5, lambda _: 10_000)]
    found = engine.measure_cost(arms, options)
    assert found["decode_ratio"]["median"] == pytest.approx(10_000 / 10_200, abs=1e-3)
    assert found["decode_p99_ratio"]["median"] == pytest.approx(1.02, abs=1e-3)
    assert found["prefill_ratio"]["median"] == pytest.approx(0.5 / 0.55, abs=1e-3)
    assert found["prefill_ratio"]["n"] == 12


def test_ratios_of_several_engines_are_one_figure_when_they_are_added(tmp_path: pathlib.Path) -> None:
    options = engine.parse(["--add", "--output", str(tmp_path / "results.json")])
    for values in ([0.97, 0.99, 0.98], [1.0, 1.01]):
        engine.save_cost(options, {"decode_ratio": figures.with_interval(values, "ratio")})
    found = figures.read_figures(options.output)["decode_ratio"]
    assert (found["median"], found["n"], found["values"]) == (0.99, 5, [0.97, 0.99, 0.98, 1.0, 1.01])
    options.add = False
    engine.save_cost(options, {"decode_ratio": figures.with_interval([0.5], "ratio")})
    assert figures.read_figures(options.output)["decode_ratio"]["n"] == 1


@pytest.mark.parametrize(("growth", "is_flat"), [(0.0, True), (2.0, False)])
def test_slope_is_the_growth_of_the_cost_with_the_context_when_both_arms_grow(growth: float, is_flat: bool) -> None:
    options = engine.parse(["--only", "slope", "--tokens", "64", "--slope-contexts", "1024", "8192", "32768"])
    noise = np.random.default_rng(4)
    plain = lambda tokens: 4000 + tokens / 16 + noise.normal(0, 0.5)  # noqa: E731
    arms: Any = [KnownClient(0.1, lambda n: plain(n) + 30 + growth * (n + 64) / 1024), KnownClient(0.1, plain)]
    known = {"delta_scan_burst": {"median": 160.0, "peer": {"host_scan_pinned_all_cores": 6000.0}}}
    found = slope.measure_slope(arms, options, known)["cost_slope"]
    assert found["median"] == pytest.approx(growth, abs=0.2)
    assert found["is_flat"] is is_flat
    assert found["by_context"]["8192"]["cost_us"] == pytest.approx(30 + 8 * growth, abs=2)
    assert found["peer"] == {"computed_device_scan": 80.0, "computed_host_scan_pinned_all_cores": 3000.0}


@pytest.mark.parametrize("arguments", [["--slope-contexts", "1024"], ["--slope-contexts", "100", "8192"], ["--only", "slope", "--tokens", "16"], ["--only", "all"]])
def test_engine_benchmark_ends_with_2_when_arguments_are_wrong(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        engine.parse(arguments)
    assert ended.value.code == 2


def test_engine_has_room_for_the_longest_context_when_the_slope_is_wanted() -> None:
    flags = engine.engine_flags(engine.parse(["--only", "slope"]))
    assert flags[flags.index("--max-model-len") + 1] == "131072"
    assert int(flags[flags.index("--kv-cache-memory-bytes") + 1]) > 131072 * slope.KV_BYTES_PER_TOKEN


def test_copying_connector_names_the_blocks_that_a_step_writes_but_for_requests_left_out() -> None:
    pytest.importorskip("vllm")
    from copy_connector import CopyConnector
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    as_object = types.SimpleNamespace
    group = as_object(kv_cache_spec=as_object(block_size=16))
    side = CopyConnector(as_object(kv_transfer_config=as_object()), KVConnectorRole.SCHEDULER, as_object(kv_cache_groups=[group], num_blocks=99))
    for name, wanted in (("a", None), ("b", {"copy": False})):
        side.update_state_after_alloc(as_object(request_id=name, kv_transfer_params=wanted), None, 0)

    def step(counts: dict[str, int], new: list[Any], cached: list[tuple[str, list[int] | None, int]], resumed: tuple[str, ...] = ()) -> list[int]:
        rows = as_object(
            req_ids=[name for name, _, _ in cached], resumed_req_ids=set(resumed),
            new_block_ids=[None if ids is None else (ids,) for _, ids, _ in cached], num_computed_tokens=[start for _, _, start in cached],
        )  # fmt: skip
        meta = side.build_connector_meta(as_object(num_scheduled_tokens=counts, scheduled_new_reqs=new, scheduled_cached_reqs=rows))
        return meta.blocks

    new = [as_object(req_id=name, block_ids=(ids,), num_computed_tokens=0) for name, ids in (("a", [5, 6, 7]), ("b", [8, 9]))]
    assert step({"a": 40, "b": 20}, new, []) == [5, 6, 7]
    assert step({"a": 8, "b": 1}, [], [("a", None, 40), ("b", None, 20)]) == [7]
    assert step({"a": 2}, [], [("a", [11], 48)]) == [11]
    assert step({"a": 20}, [], [("a", [21, 22], 0)], resumed=("a",)) == [21, 22]


# --- compiled loops


def test_pages_that_differ_are_found_once_when_a_shadow_is_compared() -> None:
    loops, generator = Loops(), np.random.default_rng(1)
    shadow = generator.integers(0, 256, 64 * 4096, dtype=np.uint8)
    copy = shadow.copy()
    for page, byte in ((0, 0), (17, 4095), (63, 2000)):
        copy[page * 4096 + byte] ^= 1
    assert loops.take_dirty(copy, shadow, page_bytes=4096, first=100) == [100, 117, 163]
    assert loops.take_dirty(copy, shadow, page_bytes=4096, first=100) == []


def test_copies_go_piece_by_piece_and_stop_when_the_driver_refuses_one() -> None:
    asked = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p)
    def copy(target: int, source: int, size: int, _stream: int) -> int:
        asked.append((target, source, size))
        return 7 if target == 3 else 0

    targets, sources = np.array([1, 2, 3, 4], np.uint64), np.array([11, 12, 13, 14], np.uint64)
    with pytest.raises(DeviceError, match="error 7"):
        Loops().copy_pieces(copy, targets, sources, 64, stream=0)
    assert asked == [(1, 11, 64), (2, 12, 64), (3, 13, 64)]


# --- parts, on the CPU device


@pytest.mark.parametrize("loops", [None, Loops()], ids=["python", "native"])
def test_every_swap_is_seen_when_tasks_flood_the_handler(host: HostDevice, loops: Loops | None) -> None:
    with Checkpointer(host, None) as checkpointer:
        found = swap.swap(checkpointer, count=3, loops=loops)
    assert found["swap_pause_us"]["n"] == found["swap_us"]["n"] == 3
    assert found["swap_pause_us"]["median"] > 0


@pytest.mark.parametrize("name", ["delta_write_set", "delta_scan_1cta"])
def test_delta_finds_just_the_dirty_pages_when_a_region_is_soiled(
    host: HostDevice, stream: lent_stream.Stream, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(delta, "REGION_BYTES", 8192 * 4096)
    monkeypatch.setattr(delta, "PAGES", 8192)
    monkeypatch.setattr(delta, "TURNS", 5)
    bench: Any = types.SimpleNamespace(device=host, stream=stream, loops=Loops())
    generator = np.random.default_rng(3)
    data = generator.integers(0, 256, 8192 * 4096, dtype=np.uint8).tobytes()
    found = delta._measure(bench, name, 1, data, generator)  # raises unless every answer was just that many
    if name != "delta_write_set":  # the CPU's executor may have left before a task: then it is not timed
        assert {dirty: len(times) for dirty, times in found.items()} == {1: 2, 8: 2, 32: 2}


def test_restored_blocks_are_proven_and_a_changed_byte_is_refused(host: HostDevice, stream: lent_stream.Stream) -> None:
    blocks = 12
    shapes = [dataclasses.replace(shape, block_count=blocks) for shape in (transfer.LARGE_PIECES, transfer.SMALL_PIECES)]
    with Checkpointer(host, stream.target()) as checkpointer:
        regions, caches = [], []
        for number, shape in enumerate(shapes):
            assert shape.raw_bytes() == 2 << 20
            size = blocks * shape.stride
            layers = [host.allocate(size) for _ in range(shape.layers)]
            for layer, address in enumerate(layers):
                host.write(address, np.random.default_rng([number, layer]).bytes(size))
            caches.append(layers)
            regions.append(checkpointer.register_kv(shape, layers))
        for region in regions:
            tasks = transfer.append_tasks(checkpointer, region, range(blocks))
            tickets = checkpointer.submit_many(tasks)
            transfer._require_records(checkpointer, tickets, blocks)
            with pytest.raises(DeviceError, match=f"{blocks} of {blocks + 1} records"):
                transfer._require_records(checkpointer, tickets, blocks + 1)
        records = stream.records(2 * blocks)
        assert [record.token_start // 16 for record in records] == 2 * list(range(blocks))
        pieces = [
            (region, [transfer.piece_of(stream, records[i + n * blocks], (i * 5 + 3) % blocks) for i in range(blocks)])
            for n, region in enumerate(regions)
        ]
        with pytest.raises(DeviceError, match="not what its record promised"):
            transfer._prove(checkpointer, pieces)
        transfer.restore_pieces(checkpointer, pieces)
        transfer._prove(checkpointer, pieces)
        stream.view[records[7].payload_offset + 99] ^= 1
        with pytest.raises(DeviceError, match="1 of 12 pieces"):
            transfer.restore_pieces(checkpointer, pieces)


def test_committed_records_are_fewer_than_wanted_when_a_stream_holds_fewer(host: HostDevice, stream: lent_stream.Stream) -> None:
    with Checkpointer(host, stream.target()) as checkpointer:
        checkpointer.wait(checkpointer.append_bytes(b"one", kind=abi.KIND_REQUEST, key=5, incarnation=1))
    assert [record.key for record in stream.records(2)] == [5]


def fake_cuda() -> types.SimpleNamespace:
    """The driver's copies where device memory is the host's: done when they are asked for."""

    def copy(target: int, source: int, size: int, _stream: int) -> tuple[int]:
        ctypes.memmove(target, source, size)
        return (0,)

    def done(*_: Any) -> tuple[int]:
        return (0,)

    return types.SimpleNamespace(
        CUevent_flags=types.SimpleNamespace(CU_EVENT_DISABLE_TIMING=2),
        cuStreamCreate=lambda flags: (0, 1), cuEventCreate=lambda flags: (0, object()), cuMemcpyDtoHAsync=copy,
        cuEventRecord=done, cuEventSynchronize=done, cuEventDestroy=done, cuStreamDestroy=done,
    )  # fmt: skip


def test_host_scan_finds_the_dirty_pages_of_all_chunks_when_cores_share_them(host: HostDevice) -> None:
    host._context = types.SimpleNamespace(current=lambda: contextlib.nullcontext(fake_cuda()))  # type: ignore[attr-defined]
    bench: Any = types.SimpleNamespace(device=host, loops=Loops())
    data = np.random.default_rng(2).integers(0, 256, 5 * host_scan.CHUNK_BYTES // 2, dtype=np.uint8)
    found = host_scan.host_scans(bench, data, page_bytes=4096)
    assert set(found) == {"host_scan_pinned_all_cores", "host_scan_pageable_one_thread"}
    assert min(found.values()) > 0


def test_host_scan_is_no_peer_when_it_misses_a_page() -> None:
    with pytest.raises(ConcordiaError, match="found 1 pages, 2 are dirty"):
        host_scan._median_us(lambda: [3], lambda: [3, 4], rounds=1)


# --- plain kernels


@pytest.mark.parametrize("architecture", ["sm_90", "sm_90a"])
def test_plain_kernels_compile_with_every_row_and_the_headers_as_they_stand(tmp_path: pathlib.Path, architecture: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings are not installed")
    text = kernel_limits.SOURCE.read_text()
    assert set(re.findall(r'^#include "(.*)"', text, re.MULTILINE)) == {"page_hash.h"}
    cubin = CudaCompiler(architecture, KernelCache(tmp_path)).kernel(HandlerSource.of("kernel_limits.cu", text=text)).cubin
    rows = {row.kernel: row.threads for row in (*kernel_limits.SCANS, *kernel_limits.STORES)}
    assert {name: int(threads) for threads, name in re.findall(r"^KERNEL\((\d+)\) (\w+)", text, re.MULTILINE)} == {**rows, "hold": 32}
    assert all(f".text.{kernel}\0".encode() in cubin for kernel in rows)


def test_rows_of_plain_kernels_are_those_of_the_committed_results() -> None:
    found = json.loads(kernel_limits.RESULT.read_text())
    assert found["what"] == kernel_limits.WHAT
    for rows, key, ctas, old in (
        (kernel_limits.SCANS, "scan_us", kernel_limits.SCAN_CTAS, set()),
        (kernel_limits.STORES, "store_gb_per_s", kernel_limits.STORE_CTAS, {"copy engine", "the same, stored behind its sums"}),
    ):
        assert {row.name for row in rows} == set(found[key]) - old
        assert all(set(found[key][row.name]) == {f"{n} CTAs" for n in ctas} for row in rows)


# --- recovery


def test_phases_of_a_kill_are_told_when_server_and_engine_have_both_spoken() -> None:
    server = {"where": "server", "failed": 0xABC, "detected_ns": 5_040_000_000, "answers": 2, "phases": {"seal": 0.01, "last_token": 0.5}}
    engine = {
        "where": "engine", "cohort": "abc-12", "loaded": 2, "phases": {"look_up": 0.2, "load": 0.1}, "cut_s_max": 0.01, "verify_s_max": 0.1,
        "is_mapped": True,
    }  # fmt: skip
    other = {**engine, "cohort": "abcd-12", "phases": {"look_up": 9.0}}
    assert recovery.phases_of([], 0xABC, 5.0) is None
    assert recovery.phases_of([server, other], 0xABC, 5.0) is None
    assert recovery.phases_of([engine], 0xABC, 5.0) is None
    found = recovery.phases_of([other, engine, server], 0xABC, 5.0)
    assert found == {
        "detect": pytest.approx(0.04), "seal": 0.01, "last_token": 0.5, "engine_look_up": 0.2, "engine_load": 0.1, "engine_cut_max": 0.01,
        "engine_verify_max": 0.1, "engine_pool_mapped": 1.0,
    }  # fmt: skip


def test_phase_is_the_median_of_the_kills_that_had_it() -> None:
    rounds = [{"seal": 0.1, "load": 1.0}, {"seal": 0.3}, {"seal": 0.2, "load": 3.0}]
    assert recovery.median_phases(rounds) == {"seal": 0.2, "load": 2.0}
