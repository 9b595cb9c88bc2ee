"""integrations/vllm/late_blocks.py: blocks that fill in one step follow over the next ones.

Invariants: few go out at once, and all of them soon; one that may hold other bytes by now is never read; a key names a whole block only; whoever
shares one that is late appends it itself.
"""

from __future__ import annotations

from typing import Any

import pytest

from concordia import config
from concordia.integrations.vllm.step_writes import StepWrites
from concordia.integrations.vllm.write_set import WriteSet
from write_set_steps import SIZE, more, new, track


def fill_together(held: WriteSet, count: int) -> StepWrites:
    """Requests whose next block is full after this step, all in one."""
    for i in range(count):
        held.tracks[f"r{i}"] = track(f"r{i}", [i, 1, 2, 3])
    held.step([new(f"r{i}", [10 + i], 3) for i in range(count)], step=1)
    return held.step([more(f"r{i}", 3, 4) for i in range(count)], step=2)


def test_blocks_that_fill_together_follow_over_the_next_steps_when_tails_are_rows() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.spread(True)
    done = fill_together(held, 12)
    assert sum(len(write.full) for write in done.writes) == config.FULL_BLOCKS_AT_ONCE
    assert [write.tail for write in done.writes if write.tail] == [(3, 4, 10 + i) for i in range(2, 12)]
    # a key names a whole block only
    assert {note.request for note in done.notes} == {"r0", "r1"}
    sent = {block for write in done.writes for _, block in write.full}
    for i in range(12):
        held.tracks[f"r{i}"].tokens += [9]  # type: ignore[operator]
    for step in range(3, 9):
        done = held.step([more(f"r{i}", step + 1, step + 2, (100 * step + i,) if step % 4 == 3 else ()) for i in range(12)], step=step)
        late = [write for write in done.writes if write.full == write.full[:1] and write.tail is None and write.full]
        assert len(late) <= 4
        sent |= {block for write in late for _, block in write.full}
    assert sent >= set(range(10, 22))
    assert all(not held.tracks[f"r{i}"].late or held.tracks[f"r{i}"].late[0] > 0 for i in range(12))


def test_block_goes_out_at_once_when_its_tail_would_be_the_block() -> None:
    held = WriteSet(block_tokens=SIZE)
    done = fill_together(held, 12)
    assert sum(len(write.full) for write in done.writes) == 12


@pytest.mark.parametrize("how", ["preempted", "back elsewhere", "gone", "lost", "resting", "rewound", "other model"])
def test_late_block_is_never_read_when_it_may_hold_other_bytes(how: str) -> None:
    held = WriteSet(block_tokens=SIZE)
    held.spread(True)
    fill_together(held, 6)
    assert held.tracks["r5"].late == [0]
    others = [more(f"r{i}", 4, 5, (50 + i,)) for i in range(5)]
    if how == "gone":
        held.finish("r5", step=3)
    elif how == "lost":
        held.lose("r5")
    elif how == "resting":
        held.rewind("r5", 0)
        held.tracks["r5"].is_resting = True
    elif how == "rewound":
        held.rewind("r5", 2)
    elif how == "other model":
        held.forget_blocks(7)
    elif how == "back elsewhere":
        others.append(new("r5", [99], 3))
    written: list[Any] = []
    for step in range(3, 12):
        done = held.step(others, step=step, given=[15] if how == "preempted" else [])
        written += [w for w in done.writes if any(block == 15 for _, block in w.full) or (w.tail and w.tail[2] == 15)]
        others = []
    assert written == []


def test_late_block_follows_when_its_request_runs_again() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.spread(True)
    fill_together(held, 6)
    for step in range(3, 9):
        assert held.step([], step=step).writes == []
    done = held.step([more("r5", 4, 5, (55,))], step=9)
    done.writes += held.step([more("r5", 5, 6)], step=10).writes
    assert ((0, 15),) in [write.full for write in done.writes]


def test_whoever_shares_a_late_block_appends_it_itself() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.spread(True)
    fill_together(held, 6)
    held.tracks["b"] = track("b", [5, 1, 2, 3, 9])
    done = held.step([new("b", [15, 60], 5, start=4, hit=4)], step=3)
    (write,) = [write for write in done.writes if write.request == "b"]
    assert write.full == ((0, 15),)
    assert not [write for write in done.writes if write.request == "r5"]
