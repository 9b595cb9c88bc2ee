"""How an answer draws after a fault.

Invariants: a request without a seed gets one; where the engine can draw by position the answer goes on exactly, and where it cannot the report
says so; an answer whose sampler has a history is generated again from its prompt, and one that then differs ends with one error.
"""

from __future__ import annotations

from asking import PROMPT, ask, completion, engines, events, joined, run, unfailed
from concordia.serving.need import Defaults
from concordia.serving.request import Sampler
from concordia.serving.router import RouterSettings
from fake_engine import Failure, served


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
