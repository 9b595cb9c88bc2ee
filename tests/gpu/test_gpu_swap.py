"""Own operators, self-tests and the swap storm on a GPU.

Invariants: a user's operator answers as on a CPU, whatever the number of CTAs; what the lint or a self-test refuses changes nothing, and a
candidate that hangs costs its bound and no more; in a storm of swaps no task is lost, none runs twice, each runs by the code of its time.
"""

from __future__ import annotations

import os
import secrets

import pytest
from child import run

DEVICE = "cuda:0"
SEED = int(os.environ.get("CONCORDIA_STORM_SEED", "0")) or secrets.randbits(32)
STORM_S = 40.0


@pytest.mark.parametrize("lanes", [1, 4])
def test_own_operator_answers_and_is_swapped_and_refused_with_reasons(lanes: int) -> None:
    answer = run("scenarios_swap:own_operator", device=DEVICE, lanes=lanes)
    assert answer["answers"] == [[1, 3 * n * (n - 1) // 2] for n in (0, 1, 1000, 8000)]
    assert answer["bare"] == 259
    assert "static shared memory" in answer["said"][0]
    assert "barriers other than 0: 4" in answer["said"][1]
    assert "its self-test failed: twice the sum of 0 to 9 is 90" in answer["said"][2]
    assert (answer["after"], answer["last"]) == ([1, 135], [1, 675])
    assert answer["same_opcode"]


def test_old_operator_stays_when_a_candidate_hangs() -> None:
    answer = run("scenarios_swap:hanging_candidate", device=DEVICE)
    assert answer["said"].startswith("HandlerRefused: sum: no answer within")
    assert 4 < answer["refused_after_s"] < 15
    assert "does not end" in answer["beside"]
    assert (answer["meanwhile"], answer["after"]) == (135, 270)


@pytest.mark.parametrize("lanes", [1, 4])
def test_handlers_of_pages_and_bytes_are_proven_before_use(lanes: int) -> None:
    answer = run("scenarios_swap:record_proofs", device=DEVICE, lanes=lanes)
    assert answer["proven"] == 3
    assert "is called" in answer["said"][0]
    assert "4 pages, expected 3" in answer["said"][1]


@pytest.mark.parametrize("lanes", [1, 4])
def test_no_task_is_lost_or_repeated_in_a_storm_of_swaps(lanes: int) -> None:
    print("seed", SEED)
    words = {"tasks": 50_000, "swaps": 100, "seed": SEED, "within_s": STORM_S}
    answer = run("scenarios_swap:storm", device=DEVICE, lanes=lanes, **words)
    found = [answer[name] for name in ("lost", "repeated", "out_of_order", "wrong_code")]
    assert found == [0, 0, 0, 0], answer
    assert answer["swaps"] == 100
    assert answer["generations_seen"] > 30
