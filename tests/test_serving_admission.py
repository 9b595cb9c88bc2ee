"""Which replica new work may use.

Invariants: a failed replica takes nothing more; a promoted one only after its cohort has moved; the least loaded is chosen; waiting is
bounded; a closed cohort keeps the order in which its members came.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from asking import run
from concordia.errors import RequestRefused
from concordia.serving.admission import Admission, Turnstile


@dataclass(frozen=True)
class Fake:
    incarnation: int
    name: str = "r"
    base_url: str = "http://x"


def admission(active: list[Fake], *, wait_s: float = 5.0, held_max: int = 10) -> Admission:
    loads = {1: 5, 2: 3, 3: 0}
    return Admission(
        active=lambda: active, load=lambda r: loads[r.incarnation], wait_s=wait_s, held_max=held_max
    )


def test_least_loaded_replica_is_chosen() -> None:
    async def scenario() -> None:
        found = admission([Fake(1), Fake(2)])
        assert found.choose() == Fake(2)
        with found.passing(Fake(2)), found.passing(Fake(2)), found.passing(Fake(2)):
            assert found.choose() == Fake(1)
        assert found.choose() == Fake(2)

    run(scenario)


def test_promoted_replica_takes_new_work_only_after_its_cohort() -> None:
    async def scenario() -> None:
        active = [Fake(1)]
        found = admission(active)
        assert found.choose() == Fake(1)
        found.close(1)
        active[:] = [Fake(2)]
        assert found.choose() is None
        assert found.is_open
        waiting = asyncio.create_task(found.acquire())
        await asyncio.sleep(0)
        assert found.held_count == 1
        found.open(Fake(2))
        assert await waiting == Fake(2)
        assert found.held_count == 0

    run(scenario)


def test_promoted_replica_takes_nothing_when_the_fault_has_not_been_heard_of_yet() -> None:
    async def scenario() -> None:
        active = [Fake(1), Fake(2)]
        found = admission(active)
        assert found.choose() == Fake(2)
        active[:] = [Fake(1), Fake(3)]  # 3 has the least to do
        assert found.choose() == Fake(1)
        active[:] = [Fake(3)]
        assert found.choose() is None
        assert found.is_open
        found.close(1)
        found.close(2)
        found.open(None)
        assert found.choose() is None, "another cohort still moves"
        found.open(Fake(3))
        assert found.choose() == Fake(3)

    run(scenario)


def test_others_are_admitted_when_nobody_waits_for_the_one_that_failed() -> None:
    async def scenario() -> None:
        active = [Fake(1)]
        found = admission(active)
        assert found.choose() == Fake(1)
        active[:] = [Fake(3)]
        assert found.choose() is None
        found.exclude(1)
        assert found.choose() == Fake(3)

    run(scenario)


def test_failed_replica_takes_nothing_though_it_still_looks_active() -> None:
    async def scenario() -> None:
        found = admission([Fake(1), Fake(2)])
        found.close(2)
        assert found.choose() == Fake(1)
        found.open(None)
        assert found.choose() == Fake(1)

    run(scenario)


def test_waiting_ends_with_an_error_when_nobody_comes() -> None:
    async def scenario() -> None:
        found = admission([], wait_s=0.05)
        assert not found.is_open
        with pytest.raises(RequestRefused) as caught:
            await found.acquire()
        assert caught.value.status == 503
        assert found.held_count == 0

    run(scenario)


def test_replica_is_found_when_it_appears_without_a_failover() -> None:
    async def scenario() -> None:
        active: list[Fake] = []
        found = admission(active)
        waiting = asyncio.create_task(found.acquire())
        await asyncio.sleep(0)
        active.append(Fake(3))
        assert await waiting == Fake(3)

    run(scenario)


def test_order_of_arrival_is_kept_when_the_first_takes_longest() -> None:
    async def scenario() -> None:
        turnstile, order = Turnstile(), []
        gates = [asyncio.Event() for _ in range(4)]

        async def member(number: int) -> None:
            with turnstile.enter("c") as turn:
                await gates[number].wait()
                await turn.wait()
                order.append(number)

        tasks = []
        for number in range(4):
            tasks.append(asyncio.create_task(member(number)))
            await asyncio.sleep(0)
        for gate in reversed(gates):
            gate.set()
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3]

    run(scenario)


def test_others_go_on_when_a_member_leaves_before_its_turn() -> None:
    async def scenario() -> None:
        turnstile, order = Turnstile(), []

        async def member(number: int, gate: asyncio.Event) -> None:
            with turnstile.enter("c") as turn:
                await gate.wait()
                await turn.wait()
                order.append(number)

        never, open_gate = asyncio.Event(), asyncio.Event()
        open_gate.set()
        first = asyncio.create_task(member(0, never))
        await asyncio.sleep(0)
        second = asyncio.create_task(member(1, open_gate))
        await asyncio.sleep(0)
        first.cancel()
        await second
        assert order == [1]
        with turnstile.enter(None) as turn:
            assert turn.is_set()

    run(scenario)
