"""serving/cohort.py: the answers of one replica, or of one client's cohort, go on together.

Invariants: a cohort keeps its order and is as large as those who are left; members go on after one token, or where each is when that cannot
be; a client's cohort sits on one replica; a request that kills every engine does not take the others along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from asking import ask, completion, engines, events, joined, run, unfailed, until
from concordia import config
from concordia.serving.recovery_times import PHASES
from concordia.serving.router import RouterSettings
from fake_engine import Failure, FakeEngine, free_token, served


def test_cohort_keeps_its_order_and_size_when_its_replica_fails() -> None:
    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(n + 1, "hang") for n in range(6)]
        async with served(first, second) as bench:
            tasks = []
            for n in range(6):
                body = completion(prompt=[n + 1, 5, 6], max_tokens=20)
                tasks.append(asyncio.create_task(ask(bench, **body)))
                await until(lambda n=n: len(first.bodies) == n + 1)
            await until(lambda: bench.router.metrics.totals()["tokens"] == 1 + 2 + 3 + 4 + 5 + 6)
            bench.replicas.notice(first)
            answers = [joined(text) for _, text in await asyncio.gather(*tasks)]
        assert [body["prompt"][0] for body in second.bodies] == [1, 2, 3, 4, 5, 6]
        cohorts = [b["kv_transfer_params"]["concordia"]["cohort"] for b in second.bodies]
        assert {c["id"] for c in cohorts} == {cohorts[0]["id"]}
        assert {c["size"] for c in cohorts} == {6}
        assert all(b["kv_transfer_params"]["concordia"]["restore"] for b in second.bodies)
        assert [len(answer["ids"]) for answer in answers] == [20] * 6
        (recovery,) = bench.router.status()["recoveries"]
        assert (recovery["where"], recovery["answers"], recovery["failed"]) == ("server", 6, first.incarnation)
        assert tuple(recovery["phases"]) == PHASES
        assert bench.router.metrics.totals()["recovery_seconds"] == pytest.approx(sum(recovery["phases"].values()))

    run(scenario)


def test_client_cohort_gathers_on_the_next_replica_when_the_first_fails_before_all_have_come() -> (
    None
):
    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(0, "hang"), Failure(0, "hang")]
        body = completion(prompt=[5, 6], max_tokens=4)
        body["concordia"] = {"cohort": {"id": "c", "size": 3}}
        async with served(first, second) as bench:
            tasks = []
            for n in range(2):
                tasks.append(asyncio.create_task(ask(bench, **body)))
                await until(lambda n=n: len(first.bodies) == n + 1)
            bench.replicas.notice(first)
            await until(lambda: len(second.bodies) == 2)
            tasks.append(asyncio.create_task(ask(bench, **body)))
            await asyncio.gather(*tasks)
        cohorts = [b["kv_transfer_params"]["concordia"]["cohort"] for b in second.bodies]
        assert [(c["id"], c["size"]) for c in cohorts] == [("client-c", 3)] * 3

    run(scenario)


def torn_cohort(first: FakeEngine, bench: Any, body: dict[str, Any]) -> Any:
    """Two answers of one client's cohort, of which the second has one token more when the engine dies."""

    async def asking() -> list[asyncio.Task[tuple[int, str]]]:
        tasks = []
        for n in range(2):
            asked = {**body, "prompt": [n + 1, 5, 6]}
            tasks.append(asyncio.create_task(ask(bench, **asked)))
            await until(lambda n=n: len(first.bodies) == n + 1)
        await until(lambda: bench.metrics.totals()["tokens"] == 4 + 5)
        bench.replicas.notice(first)
        return tasks

    return asking()


def test_members_go_on_after_the_same_token_when_a_step_was_handed_out_to_some_only() -> None:
    async def scenario() -> None:
        body = completion(max_tokens=12, logprobs=1, concordia={"cohort": {"id": "c", "size": 2}})
        wholes = [await unfailed("/v1/completions", {**body, "prompt": [n + 1, 5, 6], "concordia": {}}) for n in range(2)]
        first, second = engines(2)
        first.failures = [Failure(4, "hang"), Failure(5, "hang")]
        async with served(first, second) as bench:
            answers = await asyncio.gather(*await torn_cohort(first, bench, body))
            assert bench.metrics.totals()["stepped_back_tokens"] == 1
            assert bench.metrics.totals()["tokens"] == 2 * 12
        assert [joined(text) for _, text in answers] == [joined(text) for _, text in wholes]
        assert [len(b["prompt"]) for b in second.bodies] == [3 + 4, 3 + 4]
        assert [b["max_tokens"] for b in second.bodies] == [8, 8]
        own = [b["kv_transfer_params"]["concordia"] for b in second.bodies]
        assert [o["bounds"] for o in own] == [{"1": 7}, {"1": 7}]
        assert all(o["restore"] and o["tokens"] == 7 for o in own)

    run(scenario)


def test_member_goes_on_from_all_its_tokens_when_the_one_that_comes_again_differs() -> None:
    async def scenario() -> None:
        body = completion(max_tokens=12, concordia={"cohort": {"id": "c", "size": 2}})
        wholes = [await unfailed("/v1/completions", {**body, "prompt": [n + 1, 5, 6], "concordia": {}}) for n in range(2)]
        first, second = engines(2)
        first.failures = [Failure(4, "hang"), Failure(5, "hang")]

        def rounded_differently(ids: Sequence[int], generated: int, asked: dict[str, Any]) -> int:
            is_again = asked["kv_transfer_params"]["concordia"]["incarnation"] == 2 and ids[0] == 2 and len(ids) == 3 + 4
            return 251 if is_again else free_token(ids, generated, asked)

        second.token = rounded_differently
        async with served(first, second) as bench:
            bench.replicas.confirms = False
            answers = await asyncio.gather(*await torn_cohort(first, bench, body))
        assert [joined(text) for _, text in answers] == [joined(text) for _, text in wholes]
        assert len(second.bodies) == 3
        assert second.bodies[2]["prompt"] == [2, 5, 6, *joined(wholes[1][1])["ids"][:5]]
        # What the second incarnation wrote after the token that differs is of another answer: only 3 + 4 tokens of it count.
        assert second.bodies[2]["kv_transfer_params"]["concordia"]["bounds"] == {"1": 7, "2": 7}

    run(scenario)


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"temperature": 0.8, "seed": 3}, "its draws would be others"),
        ({"concordia": {}}, "its members never shared their steps"),
        ({"presence_penalty": 0.5}, "it is generated from the prompt anyway"),
    ],
)
def test_members_go_on_where_they_are_when_they_cannot_step_back(own: dict[str, Any], why: str) -> None:
    async def scenario() -> None:
        body = {**completion(max_tokens=12, concordia={"cohort": {"id": "c", "size": 2}}), **own}
        first, second = engines(2)
        first.failures = [Failure(4, "hang"), Failure(5, "hang")]
        async with served(first, second) as bench:
            await asyncio.gather(*await torn_cohort(first, bench, body))
            assert bench.metrics.totals()["stepped_back_tokens"] == 0, why
        expected = [3, 3] if "presence_penalty" in own else [3 + 4, 3 + 5]
        assert [len(b["prompt"]) for b in second.bodies] == expected

    run(scenario)


def test_members_go_on_where_they_are_when_they_lie_too_far_apart_for_one_step() -> None:
    async def scenario() -> None:
        counts = [7, 8, 7, 3]  # some of them lie within a step's tokens of the last
        body = completion(max_tokens=12, concordia={"cohort": {"id": "c", "size": 4}})
        first, second = engines(2)
        first.failures = [Failure(count, "hang") for count in counts]
        async with served(first, second) as bench:
            tasks = []
            for n in range(4):
                tasks.append(asyncio.create_task(ask(bench, **{**body, "prompt": [n + 1, 5, 6]})))
                await until(lambda n=n: len(first.bodies) == n + 1)
            await until(lambda: bench.metrics.totals()["tokens"] == sum(counts))
            bench.replicas.notice(first)
            answers = await asyncio.gather(*tasks)
            assert bench.metrics.totals()["stepped_back_tokens"] == 0
        assert [len(b["prompt"]) for b in second.bodies] == [3 + count for count in counts]
        assert [len(joined(text)["ids"]) for _, text in answers] == [12] * 4

    run(scenario)


@pytest.mark.parametrize("heals", [False, True])
def test_others_go_on_first_when_a_request_kills_every_engine(heals: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SET_ASIDE_S", 0.5)

    async def scenario() -> None:
        many = engines(config.ATTEMPTS_MAX + 1)
        for engine in many[:-1]:
            engine.failures = [Failure(1, "hang"), Failure(0, "kill")]
        many[-1].failures = [None, None if heals else Failure(0, "hang")]
        settings = RouterSettings(recovery_timeout_s=3.0)
        async with served(*many, settings=settings) as bench:
            other = asyncio.create_task(ask(bench, **completion()))
            await until(lambda: bench.metrics.totals()["tokens"] == 1)
            suspect = asyncio.create_task(ask(bench, **completion(prompt=[66])))
            _, whole = await other
            assert len(many[-1].bodies) == 1, "the others are served by the engine that the suspect has not met"
            _, text = await suspect
        assert len(joined(whole)["ids"]) == 12
        assert [len(engine.bodies) for engine in many] == [2] * len(many)
        errors = [event["error"]["type"] for event in events(text) if "error" in event]
        assert errors == ([] if heals else ["ServiceUnavailableError"])
        if heals:
            assert len(joined(text)["ids"]) == 12

    run(scenario)


def test_cohort_shrinks_when_a_client_leaves_during_the_failover() -> None:
    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(2, "hang"), Failure(2, "hang")]
        async with served(first, second) as bench:
            bench.replicas.fail_over_gate = asyncio.Event()
            stays = asyncio.create_task(ask(bench, **completion()))
            await until(lambda: len(first.bodies) == 1)
            leaves = asyncio.create_task(ask(bench, **completion(prompt=[7, 7])))
            await until(lambda: bench.metrics.totals()["tokens"] == 4)
            bench.replicas.notice(first)
            leaves.cancel()
            await until(lambda: bench.router.in_flight == 1)
            bench.replicas.fail_over_gate.set()
            _, text = await stays
        assert len(joined(text)["ids"]) == 12
        assert [b["prompt"][0] for b in second.bodies] == [10]
        assert second.bodies[0]["kv_transfer_params"]["concordia"]["cohort"]["size"] == 1

    run(scenario)


def test_client_cohort_is_named_to_the_engine_in_order_when_a_client_asks_for_one() -> None:
    async def scenario() -> None:
        (engine,) = engines(1)
        async with served(engine) as bench:
            tasks = []
            for n in range(4):
                extension = {"cohort": {"id": "c", "size": 4}}
                # The first prompts are text, which takes a turn through the renderer.
                prompt: Any = f"{n} text" if n < 2 else [60 + n, 1]
                body = completion(prompt=prompt, concordia=extension)
                tasks.append(asyncio.create_task(ask(bench, **body)))
                await until(lambda n=n: bench.router.in_flight > n or len(engine.bodies) > n)
            await asyncio.gather(*tasks)
        cohorts = [b["kv_transfer_params"]["concordia"]["cohort"] for b in engine.bodies]
        assert {(c["id"], c["size"]) for c in cohorts} == {("client-c", 4)}
        assert [b["prompt"][0] for b in engine.bodies[2:]] == [62, 63]

    run(scenario)


@pytest.mark.parametrize("is_held", [False, True])
def test_client_cohort_sits_on_one_replica_when_several_serve(is_held: bool) -> None:
    async def scenario() -> None:
        pair = engines(2, gate=asyncio.Event())
        body = completion(concordia={"cohort": {"id": "c", "size": 4}})
        async with served(*pair, replicas=2) as bench:
            if is_held:
                bench.replicas.active = []
            # Those of one request all wait side by side; members that come as requests of their own take turns.
            bodies = [{**body, "prompt": [[n, 1] for n in range(4)]}] if is_held else [body] * 4
            tasks = [asyncio.create_task(ask(bench, **one)) for one in bodies]
            if is_held:
                await until(lambda: bench.router.admission.held_count == 4)
                bench.replicas.active = pair
            await until(lambda: sum(len(engine.bodies) for engine in pair) == 4)
            assert sorted(len(engine.bodies) for engine in pair) == [0, 4]
            tasks.append(asyncio.create_task(ask(bench, **completion())))
            await until(lambda: sum(len(engine.bodies) for engine in pair) == 5)
            assert sorted(len(engine.bodies) for engine in pair) == [1, 4]
            for engine in pair:
                assert engine.gate is not None
                engine.gate.set()
            await asyncio.gather(*tasks)

    run(scenario)
