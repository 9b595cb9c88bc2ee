"""Requests outlive replicas.

Invariants: a client gets each token of an answer once, in order, whatever dies when; what it reads (text, log-probabilities, usage, finish,
role, id, created) equals what it reads without a fault; no error reaches it while an engine comes back in time; a regenerated answer that
differs ends with one error; who leaves is let go.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

import aiohttp
import pytest

from asking import PROMPT, ask, chat, completion, engines, events, health, joined, run, until
from concordia import config
from concordia.serving.need import Defaults
from concordia.serving.recovery_times import PHASES
from concordia.serving.request import Sampler
from concordia.serving.router import RouterSettings
from fake_engine import EOS, Failure, FakeEngine, encode, free_token, scripted, served

TEXT = "Grüße: 漢字 und 🎉 am Ende"


async def unfailed(path: str, body: dict[str, Any], **options: Any) -> tuple[int, str]:
    async with served(*engines(1, **options)) as bench:
        return await ask(bench, path, **body)


@pytest.mark.parametrize("mode", ["close", "error", "abort", "kill", "finish"])
def test_stream_is_as_unfailed_when_its_engine_ends_at_any_event(mode: str) -> None:
    async def scenario() -> None:
        body = completion(logprobs=2)
        async with served(*engines(1)) as bench:
            _, whole = await ask(bench, **body)
            for after in range(12):
                first, second = engines(2)
                await bench.renew(first, second)
                first.failures = [Failure(after, mode, cut=after * 7)]
                status, text = await ask(bench, **body)
                assert status == 200
                assert joined(text) == joined(whole), f"{mode} after {after} events"
                resumed = second.bodies[0]
                assert resumed["prompt"] == PROMPT + joined(whole)["ids"][:after]
                assert resumed["max_tokens"] == 12 - after

    run(scenario)


@pytest.mark.parametrize("segment", [1, 7, 64])
def test_stream_is_as_unfailed_when_events_come_in_pieces(segment: int) -> None:
    async def scenario() -> None:
        body = completion(logprobs=1)
        _, whole = await unfailed("/v1/completions", body)
        first, second = engines(2, segment=segment)
        first.failures = [Failure(5, cut=100)]
        async with served(first, second) as bench:
            _, text = await ask(bench, **body)
        assert joined(text) == joined(whole)

    run(scenario)


def test_chat_text_is_as_unfailed_when_a_character_is_split_by_the_seam() -> None:
    async def scenario() -> None:
        prompt_count = len(encode("user:hi\n"))
        body = chat(logprobs=True, top_logprobs=2)
        async with served(*engines(1, token=scripted(TEXT, prompt_count))) as bench:
            _, whole = await ask(bench, "/v1/chat/completions", **body)
            assert joined(whole)["text"] == TEXT
            assert joined(whole)["roles"] == ["assistant"]
            assert joined(whole)["finish"] == [("stop", None)]
            for after in range(len(encode(TEXT))):
                pair = engines(2, token=scripted(TEXT, prompt_count))
                await bench.renew(*pair)
                pair[0].failures = [Failure(after)]
                _, text = await ask(bench, "/v1/chat/completions", **body)
                assert joined(text) == joined(whole), f"after {after} tokens"
                assert "\ufffd" not in text

    run(scenario)


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_ends_the_answer_when_it_lies_across_the_seam(include: bool) -> None:
    async def scenario() -> None:
        prompt_count = len(encode("user:hi\n"))
        body = chat(stop=["🎉 am", "nie"], include_stop_str_in_output=include)
        end = TEXT.index("🎉 am")
        async with served(*engines(1, token=scripted(TEXT, prompt_count))) as bench:
            _, whole = await ask(bench, "/v1/chat/completions", **body)
            assert joined(whole)["text"] == TEXT[: end + (len("🎉 am") if include else 0)]
            assert joined(whole)["finish"] == [("stop", "🎉 am")]
            for after in range(len(encode(TEXT[: end + 4]))):
                pair = engines(2, token=scripted(TEXT, prompt_count))
                await bench.renew(*pair)
                pair[0].failures = [Failure(after)]
                _, text = await ask(bench, "/v1/chat/completions", **body)
                assert joined(text) == joined(whole)
                assert all("stop" not in posted for posted in pair[0].bodies + pair[1].bodies)

    run(scenario)


def test_engine_is_told_to_stop_when_a_stop_string_was_met() -> None:
    async def scenario() -> None:
        (engine,) = engines(1, token=scripted(TEXT, 3))
        engine.failures = [Failure(9, "hang")]  # it would go on, had nobody told it
        async with served(engine) as bench:
            _, text = await ask(bench, **completion(max_tokens=900, stop=["üße"]))
            await until(lambda: engine.gone == 1)
        assert joined(text)["text"] == "Gr"

    run(scenario)


def test_whole_response_is_as_unfailed_when_the_client_did_not_ask_for_a_stream() -> None:
    async def scenario() -> None:
        for path, body in (
            ("/v1/completions", completion(stream=False, stream_options=None, logprobs=2)),
            (
                "/v1/chat/completions",
                chat(stream=False, stream_options=None, logprobs=True, max_tokens=9),
            ),
        ):
            _, whole = await unfailed(path, body)
            first, second = engines(2)
            first.failures = [Failure(4)]
            async with served(first, second) as bench:
                status, text = await ask(bench, path, **body)
            assert (status, json.loads(text)) == (200, json.loads(whole))

    run(scenario)


def test_stream_is_as_unfailed_when_two_engines_die_in_it() -> None:
    async def scenario() -> None:
        body = completion(logprobs=0)
        _, whole = await unfailed("/v1/completions", body)
        for second_after in range(1, 6):
            three = engines(3)
            three[0].failures = [Failure(3, "kill")]
            three[1].failures = [Failure(second_after, "kill")]
            async with served(*three) as bench:
                _, text = await ask(bench, **body)
            assert joined(text) == joined(whole)
            posted = [engine.bodies[0]["kv_transfer_params"]["concordia"] for engine in three]
            assert [p["incarnation"] for p in posted] == [1, 2, 3]
            assert [p["tokens"] for p in posted] == [3, 6, 6 + second_after]
            assert len({p["request"] for p in posted}) == 1

    run(scenario)


@pytest.mark.parametrize("mode", ["kill", "hang", "status"])
def test_stream_is_as_unfailed_when_the_successor_fails_before_its_first_token(mode: str) -> None:
    async def scenario() -> None:
        body = completion()
        _, whole = await unfailed("/v1/completions", body)
        three = engines(3)
        three[0].failures = [Failure(3, "kill")]
        three[1].failures = [Failure(0, mode)]
        async with served(*three) as bench:
            asking = asyncio.create_task(ask(bench, **body))
            if mode == "hang":
                await until(lambda: bool(three[1].bodies))
                bench.replicas.notice(three[1])
            _, text = await asking
        assert joined(text) == joined(whole)

    run(scenario)


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


def test_new_requests_wait_behind_the_cohort_when_a_failover_runs() -> None:
    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(2, "hang")]
        async with served(first, second) as bench:
            bench.replicas.fail_over_gate = asyncio.Event()
            old = asyncio.create_task(ask(bench, **completion()))
            await until(lambda: bench.metrics.totals()["tokens"] == 2)
            bench.replicas.notice(first)
            new = asyncio.create_task(ask(bench, **completion(prompt=[9, 9])))
            await until(lambda: bench.router.admission.held_count == 1)
            assert await health(bench) == 200
            bench.replicas.fail_over_gate.set()
            await asyncio.gather(old, new)
        assert [body["prompt"][:1] for body in second.bodies] == [[10], [9]]
        assert second.bodies[1]["kv_transfer_params"]["concordia"]["cohort"] is None

    run(scenario)


def test_request_is_refused_when_too_many_wait() -> None:
    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(2, "hang")]
        settings = RouterSettings(requests_held_max=1)
        async with served(first, second, settings=settings) as bench:
            bench.replicas.fail_over_gate = asyncio.Event()
            old = asyncio.create_task(ask(bench, **completion()))
            await until(lambda: bench.metrics.totals()["tokens"] == 2)
            bench.replicas.notice(first)
            held = asyncio.create_task(ask(bench, **completion()))
            await until(lambda: bench.router.admission.held_count == 1)
            async with aiohttp.ClientSession() as session:
                posting = session.post(bench.url + "/v1/completions", json=completion())
                async with posting as response:
                    assert response.status == 503
                    assert response.headers["retry-after"]
                    assert (await response.json())["error"]["code"] == 503
            bench.replicas.fail_over_gate.set()
            for _, text in await asyncio.gather(old, held):
                assert len(joined(text)["ids"]) == 12

    run(scenario)


def test_one_error_event_ends_the_stream_when_nothing_came_back_in_time() -> None:
    async def scenario() -> None:
        (first,) = engines(1)
        first.failures = [Failure(3, "kill")]
        async with served(first, settings=RouterSettings(recovery_timeout_s=0.3)) as bench:
            status, text = await ask(bench, **completion())
        found = events(text)
        assert status == 200
        assert [e["error"]["code"] for e in found if "error" in e] == [503]
        assert "error" in found[-1]
        assert len([c for e in found[:-1] for c in e["choices"]]) == 3
        assert text.endswith("data: [DONE]\n\n")

    run(scenario)


def test_status_is_503_when_no_engine_came_back_before_the_answer_began() -> None:
    async def scenario() -> None:
        (first,) = engines(1)
        async with served(first, settings=RouterSettings(recovery_timeout_s=0.3)) as bench:
            first.kill()
            status, text = await ask(bench, **completion())
        assert status == 503
        assert json.loads(text)["error"]["type"] == "ServiceUnavailableError"

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


def test_engine_is_told_when_a_client_leaves() -> None:
    async def scenario() -> None:
        (engine,) = engines(1, pause=asyncio.Event())
        async with served(engine) as bench:
            for body in (completion(), completion(stream=False, stream_options=None)):
                before = engine.gone
                asking = asyncio.create_task(ask(bench, **body))
                await until(lambda: bench.router.in_flight == 1 and bool(engine.bodies))
                asking.cancel()
                await until(lambda before=before: engine.gone == before + 1)
                await until(lambda: bench.router.in_flight == 0)

    run(scenario)


def test_answer_is_regenerated_from_the_prompt_when_its_sampler_has_a_history() -> None:
    async def scenario() -> None:
        body = completion(presence_penalty=0.5, logprobs=1)
        _, whole = await unfailed("/v1/completions", body)
        for after in range(0, 12, 3):
            first, second = engines(2)
            second.merge = 2  # the end of what was sent lies within an event
            first.failures = [Failure(after, "kill")]
            async with served(first, second) as bench:
                _, text = await ask(bench, **body, concordia={"report": True})
            assert joined(text) == joined(whole)
            assert second.bodies[0]["prompt"] == PROMPT
            assert second.bodies[0]["max_tokens"] == 12
            report = [e["concordia"] for e in events(text) if "concordia" in e]
            assert [r["level"] for r in report] == ["regenerated" if after else "re-prefilled"]

    run(scenario)


def test_one_clear_error_ends_the_stream_when_the_regenerated_answer_differs() -> None:
    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(5, "kill")]
        second.token = lambda ids, generated, body: 77
        async with served(first, second) as bench:
            _, text = await ask(bench, **completion(frequency_penalty=0.5))
        found = events(text)
        assert sum(len(c["token_ids"]) for e in found[:-1] for c in e["choices"]) == 5
        assert found[-1]["error"]["type"] == "ContinuationError"

    run(scenario)


def test_request_tries_again_alone_when_its_replica_has_no_fault() -> None:
    async def scenario() -> None:
        body = completion()
        _, whole = await unfailed("/v1/completions", body)
        (engine,) = engines(1)
        engine.failures = [Failure(4, "error")]
        async with served(engine) as bench:
            bench.replicas.confirms = False
            _, text = await ask(bench, **body)
        assert joined(text) == joined(whole)
        assert len(bench.replicas.reports) == 1
        assert engine.bodies[1]["kv_transfer_params"]["concordia"]["incarnation"] == 2

    run(scenario)


def test_clients_own_mistake_is_an_error_at_once_when_vllm_says_so() -> None:
    async def scenario() -> None:
        (engine,) = engines(1)
        engine.failures = [Failure(0, "status", code=404), Failure(0, "error", code=400)]
        async with served(engine) as bench:
            status, text = await ask(bench, **completion())
            assert (status, json.loads(text)["error"]["code"]) == (404, 404)
            status, text = await ask(bench, **completion())
            assert (status, events(text)[0]["error"]["code"]) == (200, 400)
            assert bench.replicas.reports == []

    run(scenario)


def test_choices_are_single_requests_when_several_are_asked_for() -> None:
    async def scenario() -> None:
        body = completion(prompt=[[1, 2], [3, 4]], n=2, temperature=1.0, seed=100, max_tokens=6)
        _, whole = await unfailed("/v1/completions", body)
        first, second = engines(2)
        first.failures = [Failure(3, "hang"), None, Failure(2, "hang"), None]
        settings = RouterSettings(sampler=Sampler.POSITION)
        async with served(first, second, settings=settings) as bench:
            asking = asyncio.create_task(ask(bench, **body))
            await until(lambda: bench.metrics.totals()["tokens"] == 3 + 6 + 2 + 6)
            bench.replicas.notice(first)
            _, text = await asking
        choices: dict[bool, dict[int, list[int]]] = {True: {}, False: {}}
        for is_whole, stream in ((True, whole), (False, text)):
            for event in events(stream):
                for choice in event["choices"]:
                    choices[is_whole].setdefault(choice["index"], []).extend(choice["token_ids"])
        assert choices[True] == choices[False]
        assert sorted(choices[True]) == [0, 1, 2, 3]
        assert [b["seed"] for b in first.bodies] == [100, 101, 100, 101]
        assert joined(text)["usage"][0][0]["prompt_tokens"] == 4
        assert joined(text)["usage"][0][0]["completion_tokens"] == 24

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


@pytest.mark.parametrize("where", ["settings", "request"])
def test_restore_is_not_asked_for_when_it_is_switched_off(where: str) -> None:
    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(3, "kill")]
        settings = RouterSettings(restore=where != "settings")
        extension = {"report": True} | ({"restore": False} if where == "request" else {})
        async with served(first, second, settings=settings) as bench:
            _, text = await ask(bench, **completion(concordia=extension))
        assert not second.bodies[0]["kv_transfer_params"]["concordia"]["restore"]
        (report,) = [e["concordia"] for e in events(text) if "concordia" in e]
        assert report == {
            "level": "re-prefilled",
            "restored_tokens": 0,
            "recomputed_tokens": 6,
            "failovers": 1,
        }

    run(scenario)


def test_sampled_requests_have_a_seed_when_the_client_gave_none() -> None:
    async def scenario() -> None:
        (engine,) = engines(1)
        async with served(engine) as bench:
            await ask(bench, **completion(temperature=None))
            await ask(bench, **completion(temperature=0.5))
            await ask(bench, **completion(temperature=0.5, seed=7))
            await ask(bench, **completion())
        seeds = [body.get("seed") for body in engine.bodies]
        assert isinstance(seeds[0], int)
        assert isinstance(seeds[1], int)
        assert seeds[0] != seeds[1]
        assert seeds[2:] == [7, None]

    run(scenario)


def test_counter_sampler_is_asked_for_when_the_engine_has_it() -> None:
    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(2, "kill")]
        settings = RouterSettings(sampler=Sampler.COUNTER, defaults=Defaults(top_k=9))
        async with served(first, second, settings=settings) as bench:
            await ask(bench, **completion(temperature=0.7, top_p=0.9, seed=5))
        expected = {
            "concordia_seed": 5,
            "concordia_temperature": 0.7,
            "concordia_top_p": 0.9,
            "concordia_top_k": 9,
            "concordia_min_p": 0.0,
        }
        for engine in (first, second):
            assert engine.bodies[0]["temperature"] == 0
            assert engine.bodies[0]["vllm_xargs"] == expected

    run(scenario)


def test_minimum_length_is_kept_when_the_seam_lies_before_it() -> None:
    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(3, "kill")]
        async with served(first, second) as bench:
            await ask(bench, **completion(min_tokens=8))
        assert (first.bodies[0]["min_tokens"], second.bodies[0]["min_tokens"]) == (8, 5)

    run(scenario)


def test_nothing_is_admitted_and_all_ends_when_the_router_drains() -> None:
    async def scenario() -> None:
        (engine,) = engines(1, pause=asyncio.Event())
        async with served(engine) as bench:
            running = asyncio.create_task(ask(bench, **completion()))
            await until(lambda: bool(engine.bodies))
            draining = asyncio.create_task(bench.router.drain(20))
            await until(lambda: bench.router.admission.is_draining)
            status, _ = await ask(bench, **completion())
            assert (status, await health(bench)) == (503, 503)
            engine.pause.set()
            assert await draining == 0
            _, text = await running
        assert len(joined(text)["ids"]) == 12

    run(scenario)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", completion()),
        ("/v1/completions", completion(prompt="text")),
        ("/v1/chat/completions", chat(tools=[1], stream=False, stream_options=None)),
    ],
    ids=["ids", "rendered", "passed"],
)
def test_drain_waits_for_a_request_when_it_is_still_held(path: str, body: dict[str, Any]) -> None:
    async def scenario() -> None:
        first, second = engines(2)
        async with served(first, second) as bench:
            bench.replicas.fail_over_gate = asyncio.Event()
            bench.replicas.notice(first)
            await until(lambda: bench.router.faults.running_count == 1)
            held = asyncio.create_task(ask(bench, path, **body))
            await until(lambda: bench.router.admission.held_count == 1)
            assert bench.router.in_flight == 1
            assert await bench.router.drain(0.05) == 1
            bench.replicas.fail_over_gate.set()
            assert await bench.router.drain(20) == 0
            status, _ = await held
        assert status == 200

    run(scenario)


def test_load_is_spread_and_survivors_go_on_when_one_of_two_replicas_fails() -> None:
    async def scenario() -> None:
        first, second, third = engines(3)
        first.failures = [Failure(2, "hang")] * 2
        second.pause = asyncio.Event()
        async with served(first, second, third, replicas=2) as bench:
            tasks = []
            for n in range(4):
                tasks.append(asyncio.create_task(ask(bench, **completion(prompt=[n, 1]))))
                await until(lambda n=n: len(first.bodies) + len(second.bodies) == n + 1)
            assert (len(first.bodies), len(second.bodies)) == (2, 2)
            await until(lambda: bench.metrics.totals()["tokens"] == 6)
            bench.replicas.fail_over_gate = asyncio.Event()
            bench.replicas.notice(first)
            # New work goes to the survivor while the other's cohort moves.
            new = asyncio.create_task(ask(bench, **completion(prompt=[99])))
            await until(lambda: len(second.bodies) == 3)
            bench.replicas.fail_over_gate.set()
            second.pause.set()
            for _, text in await asyncio.gather(*tasks, new):
                assert len(joined(text)["ids"]) == 12
        assert len(third.bodies) == 2
        assert {b["kv_transfer_params"]["concordia"]["cohort"]["size"] for b in third.bodies} == {2}

    run(scenario)


def test_answer_ends_with_its_stop_token_when_the_seam_lies_right_before_it() -> None:
    async def scenario() -> None:
        text_ids = encode("abc")
        body = completion(max_tokens=50, ignore_eos=False)
        _, whole = await unfailed("/v1/completions", body, token=scripted("abc", 3))
        pair = engines(2, token=scripted("abc", 3))
        pair[0].failures = [Failure(3, "kill")]
        async with served(*pair) as bench:
            _, text = await ask(bench, **body)
        assert joined(text) == joined(whole)
        assert joined(text)["ids"] == [*text_ids, EOS]
        assert joined(text)["text"] == "abc"

    run(scenario)


def test_sampled_answer_says_that_its_sampler_was_lost_when_nothing_restores_it() -> None:
    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(4, "kill")]
        async with served(first, second) as bench:
            body = completion(temperature=0.8, seed=11, concordia={"report": True})
            _, text = await ask(bench, **body)
            assert bench.metrics.by_label("requests") == {"sampler not restorable": 1}
        assert len(joined(text)["ids"]) == 12
        assert first.bodies[0]["seed"] == 11
        assert second.bodies[0]["seed"] != 11, "the same noise again would bias what follows"
        (report,) = [e["concordia"] for e in events(text) if "concordia" in e]
        assert report["level"] == "re-prefilled"

    run(scenario)


def random_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Some request of any kind that can be continued."""
    body: dict[str, Any] = {"max_tokens": rng.randint(1, 40), "seed": rng.randrange(1000)}
    body |= {"temperature": rng.choice([0, 0.7]), "return_token_ids": True}
    if rng.random() < 0.3:
        body["stop"] = rng.choice([["a"], ["xyz"], ["é", "\n"]])
        body["include_stop_str_in_output"] = rng.random() < 0.5
    if rng.random() < 0.3:
        body["presence_penalty"] = 0.5
    if rng.random() < 0.3:
        body["min_tokens"] = rng.randint(1, body["max_tokens"])
    if body["temperature"] and rng.random() < 0.4:
        body["n"] = rng.randint(2, 3)
    if rng.random() < 0.7:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if rng.random() < 0.5:
        messages = [{"role": "user", "content": str(rng.randrange(10**6))}]
        return "/v1/chat/completions", {"messages": messages, "logprobs": True, **body}
    prompt = [rng.randrange(250) for _ in range(rng.randint(1, 9))]
    return "/v1/completions", {"prompt": prompt, "logprobs": 1, **body}


def comparable(text: str) -> Any:
    """A stream without the way it was cut and its choices were mixed; a whole response as it is."""
    if not text.startswith("data:"):
        return json.loads(text)
    found: dict[Any, Any] = {}
    assert text.count("data: [DONE]") == 1
    for event in events(text):
        assert "error" not in event, event
        for choice in event["choices"]:
            mine = found.setdefault(choice["index"], {"ids": [], "text": "", "end": None})
            delta = choice.get("delta")
            mine["ids"] += choice.get("token_ids") or []
            mine["text"] += delta.get("content") or "" if delta is not None else choice["text"]
            mine["end"] = (choice["finish_reason"], choice.get("stop_reason"))
        if event.get("usage"):
            found["usage"] = event["usage"]
    return found


@pytest.mark.parametrize("seed", range(6))
def test_all_answers_are_as_unfailed_when_engines_fail_at_random(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"seed {seed}")
    # Every other engine fails here before all its requests have a token: some are set aside, and must come back all the same.
    monkeypatch.setattr(config, "SET_ASIDE_S", 0.1)
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(24)]

    async def scenario() -> None:
        settings = RouterSettings(sampler=Sampler.POSITION)
        async with served(*engines(1), settings=settings) as bench:
            expected = [await ask(bench, path, **body) for path, body in requests]
        many = engines(60)
        for engine in many:
            engine.pace = 0.002
            engine.merge = rng.choice([1, 1, 3])
            engine.failures = [
                Failure(
                    rng.randrange(10),
                    rng.choice(["close", "error", "abort"]),
                    cut=rng.randrange(200),
                )
                if rng.random() < 0.1
                else None
                for _ in range(20)
            ]
        async with served(*many, replicas=2, settings=settings) as bench:

            async def late(path: str, body: dict[str, Any], delay: float) -> tuple[int, str]:
                await asyncio.sleep(delay)
                return await ask(bench, path, **body)

            tasks = [asyncio.create_task(late(p, b, rng.uniform(0, 0.3))) for p, b in requests]
            for _ in range(6):
                seen = bench.metrics.totals()["tokens"] + rng.randrange(120)
                await until(
                    lambda seen=seen: (
                        bench.metrics.totals()["tokens"] >= seen or all(t.done() for t in tasks)
                    )
                )
                if not bench.replicas.active:
                    continue
                victim = rng.choice(bench.replicas.active)
                if rng.random() < 0.7:
                    victim.kill()
                bench.replicas.notice(victim)
                rng.choice(tasks).cancel()  # a client that leaves at any moment
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            await until(
                lambda: bench.router.in_flight == 0 and bench.router.faults.running_count == 0
            )
        stayed = 0
        for answer, (_, whole), request in zip(answers, expected, requests, strict=True):
            if isinstance(answer, asyncio.CancelledError):
                continue
            assert not isinstance(answer, BaseException), answer
            stayed += 1
            status, text = answer
            assert status == 200, text
            assert comparable(text) == comparable(whole), request
        assert stayed >= len(requests) - 6

    run(scenario)
