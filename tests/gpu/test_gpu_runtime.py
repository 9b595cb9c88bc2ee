"""Ring, residency and hot swap on a GPU.

Invariants: every task runs exactly once and in order, whatever leaves, parks or is swapped meanwhile; nobody waits for a resident
executor longer than leases allow; a refused or hanging handler costs its own task only; all device memory is given back.
"""

from __future__ import annotations

import pytest
from child import run

DEVICE = "cuda:0"
CTAS = (1, 2, 4)
BLOCKED_S_MAX = 0.2  # a lease is 10 ms; the rest is for a busy machine


@pytest.mark.parametrize("lanes", CTAS)
def test_tasks_run_once_in_order_when_one_thread_hands_in(lanes: int) -> None:
    answer = run("scenarios_ring:ring", device=DEVICE, lanes=lanes, count=3000)
    assert answer["in_order"]
    assert answer["full"]
    assert answer["taken"] == 256
    assert answer["nothing_ran_parked"]
    assert answer["all_ran_after"]
    assert answer["bad_status"] == 5
    assert answer["done"] == answer["submitted"]


@pytest.mark.parametrize("lanes", [1, 2])
def test_tasks_run_once_when_four_threads_hand_in_and_the_executor_leaves(lanes: int) -> None:
    answer = run("scenarios_ring:threads", device=DEVICE, lanes=lanes, each=1500)
    assert answer["each_once"]
    assert answer["rising"]
    assert answer["launches"] > 3


def test_foreign_calls_return_when_the_executor_is_busy() -> None:
    answer = run("scenarios_ring:lease", device=DEVICE)
    assert answer["left_when_idle"]
    assert answer["done"] > 0
    assert {name: s for name, s in answer["slow_s"].items() if s > BLOCKED_S_MAX} == {}


def test_backlog_is_done_when_leases_end_and_nobody_waits() -> None:
    answer = run("scenarios_ring:backlog", device=DEVICE)
    assert answer["done"] == 60
    assert answer["launches"] >= 3  # 60 ms of work, leases of 10 ms


def test_waits_say_so_at_their_bound_when_a_handler_hangs() -> None:
    answer = run("scenarios_ring:hang", device=DEVICE)
    assert [text.split(":")[0] for text in answer["said"]] == ["wait", "park"]
    assert "not done after" in answer["said"][0]
    assert "did not leave" in answer["said"][1]
    assert answer["again"] == 1


def test_no_task_is_lost_or_repeated_when_handlers_are_swapped_under_load() -> None:
    answer = run("scenarios_ring:swap", device=DEVICE, swaps=25)
    assert answer["each_once"]
    assert answer["versions_rise"]
    assert answer["versions_seen"] >= 20
    assert answer["pause_ms_max"] < 100


def test_old_handler_stays_when_the_new_one_is_refused() -> None:
    answer = run("scenarios_ring:refused_swap", device=DEVICE)
    assert "barriers other than 0: 4" in answer["said"]
    assert answer["result"] == 1 << 16 | 1


@pytest.mark.parametrize("lanes", [1, 2])
def test_handler_has_its_registers_and_stack_when_it_uses_what_the_lint_allows(lanes: int) -> None:
    assert run("scenarios_ring:deep", device=DEVICE, lanes=lanes)["wrong"] == 0


def test_device_memory_is_given_back_when_closed() -> None:
    free = run("scenarios_ring:leftovers", device=DEVICE)["free"]
    assert free[1:] == [free[1]] * (len(free) - 1)
