"""How long the executor stays on a GPU.

Invariants: whatever the policy, tasks run once and in order, and all memory is given back; a call that waits for the whole GPU is held up
by a lease at most, or not at all where a resident executor is parked for it; a captured task appends exactly what the work before it in
its stream wrote, with no host on the way, and runs what its opcode means at that time; one kernel at a time appends.
"""

from __future__ import annotations

import json
import pathlib

import pytest
from child import run

from concordia import config

DEVICE = "cuda:0"
POLICIES = ("leased", "resident", "stream")
SLACK_S = 0.05
# Some calls wait more than once, some load code, and each maximum is of five on a busy machine.
LATE_S_MAX = 0.3


@pytest.mark.parametrize("residency", ["resident", "stream"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_tasks_run_once_in_order_when_the_executor_follows_a_policy(residency: str, lanes: int) -> None:
    answer = run("scenarios_ring:ring", device=DEVICE, lanes=lanes, count=2000, residency=residency)
    assert answer["in_order"]
    assert answer["full"]
    assert answer["nothing_ran_parked"]
    assert answer["all_ran_after"]
    assert answer["done"] == answer["submitted"]


@pytest.mark.parametrize("residency", ["resident", "stream"])
def test_tasks_run_once_when_four_threads_hand_in_under_a_policy(residency: str) -> None:
    answer = run("scenarios_ring:threads", device=DEVICE, lanes=1, each=1000, residency=residency)
    assert answer["each_once"]
    assert answer["rising"]


@pytest.mark.parametrize("residency", ["resident", "stream"])
def test_no_task_is_lost_when_handlers_are_swapped_under_a_policy(residency: str) -> None:
    answer = run("scenarios_ring:swap", device=DEVICE, swaps=20, residency=residency)
    assert answer["each_once"]
    assert answer["versions_rise"]
    assert answer["versions_seen"] >= 15


def test_backlog_is_done_when_launches_of_stream_end_and_nobody_waits() -> None:
    answer = run("scenarios_ring:backlog", device=DEVICE, residency="stream")
    assert answer["done"] == 60
    assert answer["launches"] >= 10  # 60 ms of work, launches of 2 ms


@pytest.mark.parametrize("residency", ["resident", "stream"])
def test_device_memory_is_given_back_when_a_policy_was_followed(residency: str) -> None:
    free = run("scenarios_ring:leftovers", device=DEVICE, residency=residency)["free"]
    assert free[1:] == [free[1]] * (len(free) - 1)


@pytest.mark.parametrize("residency", POLICIES)
def test_calls_that_wait_for_the_gpu_return_when_an_executor_is_live(residency: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    answer = run("scenarios_residency:beside", device=DEVICE, residency=residency)
    print(json.dumps(answer, indent=1))
    assert answer["wrong"] == []
    assert answer["residency"] == residency
    assert answer["done"] == answer["submitted"]
    bound_s = config.LEASE_NS / 1e9 + SLACK_S
    assert {name: s for name, s in answer["median_s"].items() if s > bound_s} == {}
    assert {name: s for name, s in answer["max_s"].items() if s > LATE_S_MAX} == {}


def test_resident_executor_stays_renews_its_lease_and_steps_aside() -> None:
    answer = run("scenarios_residency:stays", device=DEVICE)
    print(json.dumps(answer))
    for name in ("in_at_first", "stayed", "renewed", "back", "back_again", "other_ran", "still_works"):
        assert answer[name], name
    assert answer["forgotten_s"] < config.RESIDENT_LEASE_NS / 1e9 + 0.2
    assert answer["park_s"] < SLACK_S
    assert not answer["inside_parked"]
    assert answer["other_s"] < 0.5  # ours never waits for a lease of the resident one


@pytest.mark.parametrize("residency", POLICIES)
def test_interpreter_ends_when_an_executor_is_live(residency: str) -> None:
    answer = run("scenarios_residency:leaves", device=DEVICE, residency=residency)
    assert answer["code"] == 0, answer["said"]
    assert "Traceback" not in answer["said"]
    assert answer["seconds"] < 3


@pytest.mark.parametrize("lanes", [1, 2])
def test_captured_appends_see_their_step_when_a_graph_is_replayed(lanes: int, journal_path: pathlib.Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    answer = run("scenarios_residency:graph", device=DEVICE, path=str(journal_path), lanes=lanes)
    print(json.dumps(answer))
    assert answer["wrong"] == []
    assert "being captured" in answer["refused"]
    assert answer["replays_more"] == 1
    assert answer["pending"] == 0
    assert (answer["end"], answer["kv_records"]) == ("clean", 60)
    assert answer["ring_records"] == answer["ring_appends"] > 0


def test_replays_run_the_newest_handler_when_it_was_swapped_after_capture() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    answer = run("scenarios_residency:captured_swap", device=DEVICE, swaps=15)
    assert answer["each_once"]
    assert answer["ring"] == [version for version in range(1, 16) for _ in range(4)]
    assert answer["graph"] == [version for version in range(1, 16) for _ in range(8)]


def test_auto_chooses_within_its_bound_and_says_why() -> None:
    answer = run("scenarios_residency:chosen", device=DEVICE)
    print(json.dumps(answer, indent=1))
    assert set(answer["chosen"]) <= set(POLICIES)
    assert answer["more_s"] < 0.2
    assert all("round trip" in line and "neighbour" in line for line in answer["lines"])
    assert len(answer["lines"]) == 3
