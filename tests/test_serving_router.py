"""Requests outlive replicas.

Invariants: a client gets each token of an answer once, in order, whatever dies when; what it reads (text, log-probabilities, usage, finish,
role, id, created) equals what it reads without a fault; no error reaches it while an engine comes back in time; who leaves is let go.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from asking import (
    PROMPT,
    ask,
    chat,
    completion,
    engines,
    events,
    health,
    joined,
    run,
    unfailed,
    until,
)
from concordia.serving.request import Sampler
from concordia.serving.router import RouterSettings
from fake_engine import EOS, Failure, encode, scripted, served

TEXT = "Grüße: 漢字 und 🎉 am Ende"


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
