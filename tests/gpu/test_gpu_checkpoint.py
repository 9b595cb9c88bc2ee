"""Handlers, journal, framework and faults on a GPU.

Invariants: what is appended, hashed and restored equals numpy byte for byte; a step's KV is read only after the step's work; a journal
written by a GPU is whole for every acknowledged record after SIGKILL and after an illegal address, and restores on a fresh context.
"""

from __future__ import annotations

import json
import pathlib
import random

import pytest
from child import end, gpu_count, kill, run, start
from stage import JournalFile
from writing_ranks import check_ranks

DEVICE = "cuda:0"
SHAPES = ("flash", "interleaved", "transposed", "tiled", "latent", "fp8", "odd")


@pytest.fixture
def seed() -> int:
    chosen = random.randrange(1 << 30)
    print(f"seed {chosen}")
    return chosen


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_handlers_equal_numpy_when_run_on_the_gpu(shape: str, lanes: int, seed: int, journal_path: pathlib.Path) -> None:
    answer = run("scenarios_kv:handlers", device=DEVICE, lanes=lanes, shape_name=shape, seed=seed, path=str(journal_path))
    assert answer["wrong"] == []
    assert answer["refused_status"] == 5


@pytest.mark.parametrize(("shape", "lanes"), [("flash", 1), ("flash", 4), ("tiled", 1), ("odd", 2)])
def test_tokens_of_many_requests_are_a_record_each_in_their_order(shape: str, lanes: int, seed: int, journal_path: pathlib.Path) -> None:
    answer = run("scenarios_kv:tokens", device=DEVICE, lanes=lanes, shape_name=shape, seed=seed, path=str(journal_path))
    assert answer == {"wrong": [], "undone": 0}


@pytest.mark.parametrize(("shape", "lanes", "segment"), [("flash", 1, 1 << 20), ("flash", 4, 1 << 18), ("latent", 4, 1 << 20), ("odd", 1, 1 << 15)])
def test_blocks_of_one_task_are_records_of_their_own(shape: str, lanes: int, segment: int, seed: int, journal_path: pathlib.Path) -> None:
    answer = run("scenarios_kv:grouped", device=DEVICE, lanes=lanes, shape_name=shape, seed=seed, path=str(journal_path), segment_bytes=segment)
    assert answer["wrong"] == []
    assert answer["full"] == [2]  # the journal has no room
    assert answer["odd"] == 5  # half a block is none


@pytest.mark.parametrize("shape", ["flash", "odd", "tiled"])
def test_pieces_are_restored_in_their_order_when_they_lie_on_each_other(shape: str, seed: int, journal_path: pathlib.Path) -> None:
    answer = run("scenarios_kv:restored", device=DEVICE, shape_name=shape, seed=seed, path=str(journal_path), count=5000)
    assert answer["wrong"] == []
    assert answer["said"]
    assert answer["named"] == list(range(0, 24, 3))
    assert answer["refused"] == [False, False]


@pytest.mark.parametrize("lanes", [1, 2])
def test_bytes_equal_when_appended_and_a_full_journal_is_said(lanes: int, seed: int, journal_path: pathlib.Path) -> None:
    answer = run("scenarios_kv:appended_bytes", device=DEVICE, lanes=lanes, seed=seed, path=str(journal_path))
    assert answer["wrong"] == []
    assert answer["end"] == "clean"
    assert answer["statuses"][-1] == 2
    assert answer["dropped"] == answer["statuses"].count(2)


@pytest.mark.parametrize("size", [4096, 16384])
@pytest.mark.parametrize("lanes", [1, 2])
def test_exactly_changed_pages_are_appended_when_scanned(lanes: int, size: int, seed: int, journal_path: pathlib.Path) -> None:
    answer = run("scenarios_kv:pages", device=DEVICE, lanes=lanes, seed=seed, path=str(journal_path), size=size)
    assert answer["results"] == [40, 0, 7, 5, 0, 9]
    assert answer["burst"] == answer["turned"]
    assert answer["appended"] == answer["changed"]
    assert answer["last"] == answer["named"]
    assert answer["wrong"] == []


def test_appends_see_the_step_when_torch_hosts_the_executor(seed: int, journal_path: pathlib.Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    answer = run("scenarios_kv:framework", device=DEVICE, path=str(journal_path), seed=seed)
    assert answer["stale"] == []
    assert answer["graph_wrong"] == []
    assert answer["calls_ms_max"] < 200


def test_acknowledged_records_restore_when_the_writer_is_killed(journal_path: pathlib.Path) -> None:
    child = start("scenarios_kv:writer", device=DEVICE, path=str(journal_path), shape_name="flash")
    acknowledged = 0
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("ACK "):
            step, kept = json.loads(line[4:])
            acknowledged += len(kept)
            if step == 23:
                kill(child)
                break
    ended = end(child)
    assert ended.code == -9
    assert acknowledged == 24 * 12
    answer = run("scenarios_kv:restorer", device=DEVICE, path=str(journal_path), shape_name="flash", acknowledged=acknowledged)
    assert answer["lost"] == 0
    assert answer["end"] in {"clean", "torn"}
    assert answer["wrong"] == []
    assert answer["mismatches"] == 0


def test_committed_records_restore_when_a_handler_stores_to_an_illegal_address(journal_path: pathlib.Path) -> None:
    before = run("scenarios_kv:poisoned", device=DEVICE, path=str(journal_path))
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in before["said"]
    journal = JournalFile.open(journal_path, segment_bytes=1 << 20)
    records, _ = journal.records()
    assert len(records) == before["kept"] == 12
    answer = run("scenarios_kv:restorer", device=DEVICE, path=str(journal_path), shape_name="flash", acknowledged=before["kept"])
    assert answer["lost"] == 0
    assert answer["wrong"] == []
    assert run("scenarios_kv:counted", device=DEVICE) == 5


def test_ranks_write_one_journal_when_each_has_a_gpu_of_its_own(journal_path: pathlib.Path) -> None:
    if gpu_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    check_ranks(journal_path.with_name(journal_path.name + "-ranks"), ["cuda:0", "cuda:1"], count=2000)
