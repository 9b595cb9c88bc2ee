"""A storm of hot swaps on the CPU device, at widths 1 and 4; the full size is benchmarks/swap_storm.py's.

Invariants: no task is lost, none runs twice, each runs in its turn by the code of its generation, and generations only rise; the verdict
sees it when that is not so; old code is all unloaded at the end.
"""

import os
import secrets
from dataclasses import replace

import pytest

from concordia import config
from concordia.device.host import HostDevice
from concordia.errors import WaitTimeout
from concordia.runtime.executor import Runtime
from concordia.runtime.op_table import OperatorTable
from concordia.testing import swap_storm
from concordia.testing.swap_storm import SwapStorm

SEED = int(os.environ.get("CONCORDIA_STORM_SEED", "0")) or secrets.randbits(32)


@pytest.mark.parametrize("needs_parking", [False, True], ids=["beside", "parked"])
@pytest.mark.parametrize("lanes", [1, 4])
def test_no_task_is_lost_or_repeated_in_a_storm_of_swaps(lanes: int, needs_parking: bool) -> None:
    print("seed", SEED)
    device = HostDevice()
    device.needs_parking = needs_parking  # as a GPU does: the table changes between two stays of the executor
    runtime = Runtime(device, lanes=lanes)
    verdict = SwapStorm(runtime, tasks=100_000, swaps=300, seed=SEED, within_s=60).run()
    assert verdict.is_clean, replace(verdict, swap_ms=())
    assert (verdict.swaps, len(verdict.swap_ms)) == (300, 300)
    assert verdict.generations_seen > 30  # the storm was one: tasks ran between swaps
    assert runtime.operators.retired_count <= (config.RETIRED_MAX if needs_parking else 0)
    assert runtime.stats().rescues == 0
    runtime.close()
    device.close()


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("add_device(mine, 1);", "if (call->task.arg != 77) add_device(mine, 1);", "lost"),
        ("add_device(mine, 1);", "add_device(mine, call->task.arg == 77 ? 2 : 1);", "repeated"),
        ("const uint64_t when = add_device(total, 1);", "const uint64_t when = add_device(total, call->task.arg == 77 ? 2 : 1);", "out_of_order"),
        ("| VERSION;", "| (call->task.arg == 77 ? 9 : VERSION);", "wrong_code"),
        ("call->result = mine[1];", "call->result = mine[1] + 1;", "wrong_code"),
    ],
)  # fmt: skip
def test_verdict_says_what_is_wrong_when_tasks_go_astray(
    monkeypatch: pytest.MonkeyPatch, old: str, new: str, field: str
) -> None:
    assert old in swap_storm.STORM
    monkeypatch.setattr(swap_storm, "STORM", swap_storm.STORM.replace(old, new))
    device = HostDevice()
    runtime = Runtime(device)
    verdict = SwapStorm(runtime, tasks=500, swaps=5, seed=SEED, within_s=60).run()
    assert getattr(verdict, field) > 0
    assert not verdict.is_clean
    runtime.close()
    device.close()


def test_verdict_says_wrong_code_when_a_swap_publishes_what_it_did_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, codes = OperatorTable.prepare, []

    def stale(self: OperatorTable, name: str, image: object, code: object, **words: int) -> object:
        codes.append(code)
        return prepare(self, name, image, codes[0], **words)  # type: ignore[arg-type]

    monkeypatch.setattr(OperatorTable, "prepare", stale)
    monkeypatch.setattr(OperatorTable, "unload_retired", lambda self: None)
    device = HostDevice()
    runtime = Runtime(device)
    verdict = SwapStorm(runtime, tasks=500, swaps=5, seed=SEED, within_s=60).run()
    assert (verdict.lost, verdict.repeated, verdict.out_of_order) == (0, 0, 0)
    assert verdict.wrong_code > 0
    device.close()


def test_storm_ends_when_its_time_is_over() -> None:
    device = HostDevice()
    runtime = Runtime(device)
    with pytest.raises(WaitTimeout, match=r"within 0\.0 s"):
        SwapStorm(runtime, tasks=2_000_000, swaps=1000, seed=SEED, within_s=0.0).run()
    runtime.close()
    device.close()
