"""Faults on a device: illegal addresses, impossible tasks, hangs, a watchdog, flipped bits, a full journal.

Invariants: what was committed before a fault is restored by another process, byte for byte, and the device serves it; a fault is heard
by whoever calls next, with its reason, within a bound; what is not the fault of the device is an answer, and the executor goes on; a
flipped bit is reported, never restored. tests/test_faults_device.py runs what it can of this on the CPU device.
"""

from __future__ import annotations

import pathlib
import random
import signal
import time
from typing import Any

import pytest
from child import Ended, end, run, start
from flips import judge_flips, places
from stage import JournalFile, geometry

from concordia import abi, config

SEGMENT = 1 << 20
SMALL_SEGMENT = 4096
SMALL_SIZES = [130, 7, 700, 0, 300, 1000, 1]  # five records in the first segment, two in the second


@pytest.fixture
def device() -> str:
    return "cuda:0"


@pytest.fixture
def seed() -> int:
    chosen = random.randrange(1 << 30)
    print(f"seed {chosen}")
    return chosen


def acknowledged(ended: Ended) -> int:
    """What a child had told before it ended."""
    return max((int(line.split()[1]) for line in ended.said.splitlines() if line.startswith("ACK ")), default=0)


def judge_survivors(device: str, path: pathlib.Path, *, kept: int) -> None:
    """Another process finds exactly what was committed, restores it, and the device serves it."""
    journal = JournalFile.open(path, segment_bytes=SEGMENT)
    records, how = journal.records()
    assert len(records) == kept
    assert how.value in {"clean", "torn"}
    answer = run("scenarios_kv:restorer", device=device, path=str(path), shape_name="flash", acknowledged=kept)
    assert (answer["lost"], answer["mismatches"], answer["wrong"]) == (0, 0, [])


@pytest.mark.parametrize(("how", "status"), [("address", "CUDA_ERROR_ILLEGAL_ADDRESS"), ("assert", "CUDA_ERROR_ASSERT")])
def test_committed_records_restore_when_the_framework_s_kernel_loses_the_context(device: str, how: str, status: str, journal_path: pathlib.Path) -> None:
    if how == "assert":
        pytest.importorskip("torch", reason="torch is not installed")
    before = run("scenarios_faults:framework_fault", device=device, path=str(journal_path), how=how)
    assert status in before["said"]
    assert status in before["again"]
    assert before["closing_s"] < 2 * (config.WAIT_TASK_S + config.WAIT_PARK_S)
    judge_survivors(device, journal_path, kept=before["kept"])


def test_committed_records_restore_when_a_handler_faults_at_one_task(device: str, journal_path: pathlib.Path) -> None:
    ended = end(start("scenarios_faults:handler_fault", device=device, path=str(journal_path)))
    if device == "host":  # what ends a thread ends its process
        assert ended.code == -signal.SIGSEGV
    else:
        assert ended.code == 0, ended.said
        assert "CUDA_ERROR_ILLEGAL_ADDRESS" in ended.answer["said"]
        assert all(ended.answer["waited"]), "a task behind the fault was answered"
    assert acknowledged(ended) == geometry("flash").block_count
    judge_survivors(device, journal_path, kept=acknowledged(ended))


@pytest.mark.parametrize("lanes", [1, 2])
def test_task_is_answered_and_the_next_one_served_when_it_names_what_does_not_exist(device: str, lanes: int, journal_path: pathlib.Path) -> None:
    answer = run("scenarios_faults:bad_tasks", device=device, path=str(journal_path), lanes=lanes)
    assert answer["taken"] == []
    assert answer["broken"] == []
    assert answer["records"] == answer["attempts"] > 30
    assert answer["end"] == "clean"


def test_appends_wait_and_say_so_when_a_kernel_of_the_framework_hangs(device: str, journal_path: pathlib.Path) -> None:
    answer = run("scenarios_faults:framework_hang", device=device, path=str(journal_path))
    assert answer["said"]["beside"] == ""
    assert "is not done after 0.5 s" in answer["said"]["before"]
    assert "is not done after 0.5 s" in answer["said"]["everywhere"]
    assert set(answer["statuses"]) == {abi.STATUS_OK}
    assert max(answer["enqueue_s"]) < 0.1
    judge_survivors(device, journal_path, kept=answer["kept"])


def test_every_wait_says_so_and_work_goes_on_when_a_handler_hangs(device: str, journal_path: pathlib.Path) -> None:
    answer = run("scenarios_faults:handler_hang", device=device, path=str(journal_path))
    said: dict[str, Any] = answer["said"]
    assert "is not done after 0.5 s" in said["wait"]
    assert "is not done after 0.5 s" in said["behind"]
    assert "is not done after" in said["drain"]
    assert "the executor did not leave within" in said["park"]
    if device != "host":  # a CPU loads beside whatever runs
        assert "no code is loaded beside the executor" in said["swap"]
    assert answer["said_s"] < 5 * (0.5 + config.WAIT_PARK_S)
    assert answer["enqueue_s"] < 0.1
    assert set(answer["statuses"]) == {abi.STATUS_OK}
    assert answer["result"] == 3
    judge_survivors(device, journal_path, kept=answer["kept"])


def judge_watchdog(device: str, path: pathlib.Path, who: str) -> None:
    """The process said what it waited for and ended itself; another goes on where it was."""
    ended = end(start("scenarios_faults:watchdog", device=device, path=str(path), who=who))
    assert ended.code == -signal.SIGKILL, ended.said
    assert "WATCHDOG task" in ended.said
    assert "is not done after 0.5 s" in ended.said
    started = time.monotonic()
    judge_survivors(device, path, kept=acknowledged(ended))
    assert time.monotonic() - started < 40, "a dead executor still holds the device"


def test_committed_records_restore_when_the_watchdog_ends_a_hung_handler(device: str, journal_path: pathlib.Path) -> None:
    judge_watchdog(device, journal_path, "handler")


def test_committed_records_restore_when_the_watchdog_ends_a_hung_framework(device: str, journal_path: pathlib.Path) -> None:
    judge_watchdog(device, journal_path, "framework")


def test_flipped_bit_is_found_where_it_lies_when_a_device_wrote_the_journal(device: str, seed: int, journal_path: pathlib.Path) -> None:
    run("scenarios_flips:small_records", device=device, lanes=1, seed=seed, path=str(journal_path), sizes=SMALL_SIZES, segment_bytes=SMALL_SEGMENT)
    journal = JournalFile.open(journal_path, segment_bytes=SMALL_SEGMENT)
    known = places(journal)
    bits = [8 * at + bit for at in known for bit in range(8)]
    if device != "host":  # the CPU device takes all of them, of the same bytes
        chance = random.Random(seed)
        by_place: dict[tuple[str, int], list[int]] = {}
        for bit in bits:
            by_place.setdefault(known[bit // 8], []).append(bit)
        bits = [bit for each in by_place.values() for bit in chance.sample(each, min(len(each), 64))]
    counts, wrong = judge_flips(journal, bits)
    print(counts)
    assert wrong == []
    assert set(counts) == {"segment", "header", "payload", "padding", "commit"}


def test_flipped_kv_is_reported_and_healed_when_it_is_hashed_and_restored(device: str, seed: int, journal_path: pathlib.Path) -> None:
    answer = run("scenarios_flips:flipped_kv", device=device, path=str(journal_path), seed=seed, count=100)
    assert answer["records"] == 8
    assert answer["unseen"] == []
    assert answer["unhealed"] == []


def test_nothing_is_written_when_any_bit_flips_between_journal_and_restore(device: str, seed: int, journal_path: pathlib.Path) -> None:
    count = 0 if device == "host" else 300
    answer = run("scenarios_flips:flipped_payload", device=device, path=str(journal_path), seed=seed, count=count)
    assert answer["bits"] == (count or answer["payload_bits"]) > 0
    assert answer["accepted"] == []
    assert answer["written"] == []
    assert answer["status"] == abi.STATUS_OK
    assert answer["wrong"] == []


@pytest.mark.parametrize("lanes", [1, 4])
def test_all_or_nothing_is_written_when_a_byte_flips_during_the_restore(device: str, lanes: int, seed: int, journal_path: pathlib.Path) -> None:
    answer = run("scenarios_flips:racing_flips", device=device, path=str(journal_path), lanes=lanes, seed=seed)
    assert answer["torn"] == []
    assert answer["other"] == {}
    assert answer["ok"] > 0
    assert answer["refused"] > 0


@pytest.mark.parametrize("lanes", [1, 2])
def test_losses_are_answered_and_appends_go_on_when_the_journal_was_full(device: str, lanes: int, journal_path: pathlib.Path) -> None:
    answer = run("scenarios_flips:exhausted", device=device, path=str(journal_path), lanes=lanes)
    fits = 3  # records of 300,000 bytes in a segment
    ok, full = abi.STATUS_OK, abi.STATUS_JOURNAL_FULL
    first, second = [ok] * 2 * fits + [full] * (10 - 2 * fits), [ok] * 4
    assert answer["statuses"] == first * 2 + second
    assert answer["dropped"] == answer["statuses"].count(full)
    assert answer["kept"] == [number for number, status in enumerate(answer["statuses"]) if status == ok]
    assert (answer["wrong"], answer["end"]) == ([], "clean")
