"""Invariants: whatever order the records of neighbouring steps come in, a walk applies no byte that a later step wrote over; without
rewriting it ends where all in order would; what is not wanted is said once.
"""

from __future__ import annotations

import random

import pytest

from concordia import abi
from concordia.journal.coverage import Coverage
from concordia.journal.ledger import Held, Source
from concordia.journal.record import Record

BLOCK = 8
SOURCE = Source(1, abi.WRITER_RANK, 0, 1, 7, 5)


def held(kind: int, start: int, end: int, step: int) -> Held:
    return Held(Record(kind, 1, step, 0, 9, 1, 0, BLOCK, start, end, 0, 0, 0, 5, step, 0, 0, 0, 0, 0), SOURCE)


def tail(start: int, end: int, step: int) -> Held:
    return held(abi.KIND_KV_TAIL, start, end, step)


def block(start: int, step: int) -> Held:
    return held(abi.KIND_KV_BLOCK, start, start + BLOCK, step)


def walked(coverage: Coverage) -> tuple[int, dict[int, int]]:
    """Where the walk ends, and the step whose bytes each token has when its pieces are applied in order."""
    end, used = coverage.walk(lambda _: None, is_readable=lambda _: True)
    bytes_of = {}
    for one in used:
        for token in range(one.record.token_start, one.record.token_end):
            bytes_of[token] = one.record.step
    return end, {token: step for token, step in bytes_of.items() if token < end}


def test_walk_goes_on_when_a_tail_comes_after_the_block_that_has_it() -> None:
    coverage = Coverage()
    for one in [tail(t, t + 1, t) for t in range(7)]:
        coverage.add(one)
    late = tail(7, 8, 7)
    assert coverage.add(block(0, 9)) != []
    assert coverage.add(tail(8, 9, 8)) == []
    assert coverage.add(late) == [late]
    assert walked(coverage)[0] == 9


def test_walk_goes_on_when_tails_change_places() -> None:
    coverage = Coverage()
    for start in (0, 2, 1, 4, 3):
        assert coverage.add(tail(start, start + 1, start + 1)) == []
    assert walked(coverage) == (5, {t: t + 1 for t in range(5)})


def test_tokens_are_written_again_when_the_step_is_later() -> None:
    coverage = Coverage()
    old = [tail(t, t + 1, t + 1) for t in range(5)]
    for one in old:
        coverage.add(one)
    assert sorted(one.record.token_start for one in coverage.add(tail(2, 3, 9))) == [2, 3, 4]
    assert walked(coverage) == (3, {0: 1, 1: 2, 2: 9})


def test_block_is_not_wanted_when_one_of_its_tokens_was_written_later() -> None:
    coverage = Coverage()
    coverage.add(tail(0, 8, 1))
    coverage.add(tail(3, 4, 5))
    late = block(0, 4)
    assert coverage.add(late) == [late]
    assert walked(coverage) == (4, {0: 1, 1: 1, 2: 1, 3: 5})


@pytest.mark.parametrize("rewrites", [False, True])
def test_no_byte_that_was_written_over_is_applied_when_steps_come_out_of_order(rewrites: bool) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(400):
        sent: list[tuple[Held, dict[int, int]]] = []  # with the step that wrote each of its tokens
        version: dict[int, int] = {}
        due: list[tuple[int, int]] = []  # step, block that goes out whole then
        reached = step = 0
        while reached < 40:
            step += 1
            if rewrites and reached and rng.random() < 0.1:
                reached = rng.randrange(reached)
                due = [(at, start) for at, start in due if start + BLOCK <= reached]
            end = min(reached + rng.choice([1, 1, 1, 3]), reached // BLOCK * BLOCK + BLOCK)  # a tail lies in one block
            version = {t: at for t, at in version.items() if t < reached} | dict.fromkeys(range(reached, end), step)
            sent.append((tail(reached, end, step), dict.fromkeys(range(reached, end), step)))
            if end % BLOCK == 0:
                due.append((step + rng.randrange(4), end - BLOCK))
            reached = end
            sent += [(block(start, step), {t: version[t] for t in range(start, start + BLOCK)}) for at, start in due if at <= step]
            due = [(at, start) for at, start in due if at > step]
        sent.sort(key=lambda one: one[0].record.step + rng.choice([0, 0, 0, 1.5, 2.5]))
        coverage, dropped = Coverage(), 0
        for one, _ in sent:
            dropped += len(coverage.add(one))
        assert dropped + len(coverage.held()) == len(sent)
        contents = {id(one): versions for one, versions in sent}
        end, used = coverage.walk(lambda _: None, is_readable=lambda _: True)
        applied: dict[int, int] = {}
        for one in used:
            applied |= contents[id(one)]
        assert {t: at for t, at in applied.items() if t < end} == {t: version[t] for t in range(end)}
        if not rewrites:
            assert end == reached
