"""The HTTP face.

Invariants: errors have OpenAI's form and the right status; the key guards what vLLM guards; what the router does not know goes to a replica
and back unchanged, survives a fault where it can, and ends with one clear error where it cannot; ids that a client gives are honoured.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from asking import ask, chat, completion, engines, events, health, run, until
from concordia import config
from concordia.serving import router
from concordia.serving.flight import Flight
from concordia.serving.router import RouterSettings
from fake_engine import Bench, Failure, served


async def raw(
    bench: Bench, method: str, path: str, *, data: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(
            method,
            bench.url + path,
            data=data,
            headers={k.replace("_", "-"): v for k, v in headers.items()},
        ) as response,
    ):
        return (
            response.status,
            {k.lower(): v for k, v in response.headers.items()},
            await response.read(),
        )


JSON = {"content_type": "application/json"}


@pytest.mark.parametrize("data", [b"{", b"", b"[]", b'"text"', b"[" * 100_000, b"\xff\xfe"])
def test_bad_body_is_a_400_when_it_is_no_json_object(data: bytes) -> None:
    async def scenario() -> None:
        async with served(*engines(1)) as bench:
            for path in ("/v1/chat/completions", "/v1/completions"):
                status, _, body = await raw(bench, "POST", path, data=data, **JSON)
                error = json.loads(body)["error"]
                assert (status, error["code"]) == (400, 400)
                assert set(error) == {"message", "type", "param", "code"}

    run(scenario)


@pytest.mark.parametrize("token", [1 << 32, 1 << 70, -1, True])
def test_prompt_is_refused_and_forgotten_when_it_holds_what_is_no_token_id(token: int) -> None:
    async def scenario() -> None:
        async with served(*engines(1)) as bench:
            for prompt in ([5, token], [[5], [token]]):
                status, text = await ask(bench, **completion(prompt=prompt))
                assert (status, json.loads(text)["error"]["param"]) == (400, "prompt")
                assert "token id" in json.loads(text)["error"]["message"]
            assert bench.router.in_flight == 0

    run(scenario)


def test_nothing_is_kept_of_a_request_when_one_of_its_answers_cannot_be_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []

    def second_fails(*arguments: Any, **facts: Any) -> Flight:
        made.append(facts)
        if len(made) == 2:
            raise OverflowError("whatever a tokenizer says of an id")
        return Flight(*arguments, **facts)

    monkeypatch.setattr(router, "Flight", second_fails)

    async def scenario() -> None:
        async with served(*engines(1)) as bench:
            status, _ = await ask(bench, **completion(prompt=[[5], [6]]))
            assert status == 500
            assert bench.router.in_flight == 0

    run(scenario)


def test_body_is_refused_when_it_does_not_say_that_it_is_json() -> None:
    async def scenario() -> None:
        async with served(*engines(1)) as bench:
            data = json.dumps(completion()).encode()
            status, _, _ = await raw(
                bench, "POST", "/v1/completions", data=data, content_type="text/plain"
            )
            assert status == 400

    run(scenario)


def test_body_is_refused_when_it_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "BODY_BYTES_MAX", 1000)

    async def scenario() -> None:
        async with served(*engines(1)) as bench:
            status, _, _ = await raw(bench, "POST", "/v1/completions", data=b" " * 2000, **JSON)
            assert status == 413

    run(scenario)


def test_key_is_asked_for_where_vllm_asks_for_it() -> None:
    async def scenario() -> None:
        async with served(*engines(1), api_keys=["one", "two"]) as bench:
            for path in ("/v1/models", "/v1/other"):
                assert (await raw(bench, "GET", path))[0] == 401
                assert (await raw(bench, "GET", path, authorization="Bearer wrong"))[0] == 401
                assert (await raw(bench, "GET", path, authorization="one"))[0] == 401
                for key in ("one", "two"):
                    assert (await raw(bench, "GET", path, authorization=f"Bearer {key}"))[0] == 200
            status, _, body = await raw(bench, "POST", "/v1/completions", data=b"{}", **JSON)
            assert (status, json.loads(body)["error"]["code"]) == (401, 401)
            assert await health(bench) == 200
            assert (await raw(bench, "GET", "/metrics"))[0] == 200

    run(scenario)


def test_clients_key_never_reaches_the_replica() -> None:
    async def scenario() -> None:
        (engine,) = engines(1)
        settings = RouterSettings(upstream_headers={"authorization": "Bearer inner"})
        async with served(engine, api_keys=["outer"], settings=settings) as bench:
            await raw(bench, "GET", "/v1/other", authorization="Bearer outer")
        assert engine.heads[-1]["authorization"] == "Bearer inner"

    run(scenario)


def test_other_paths_are_passed_through_unchanged() -> None:
    async def scenario() -> None:
        (engine,) = engines(1)
        async with served(engine) as bench:
            status, headers, body = await raw(
                bench, "POST", "/v1/embeddings?a=b%20c", data=b"\x00raw"
            )
            assert status == 200
            assert headers["content-type"] == "application/json"
            assert json.loads(body) == {"echo": "/v1/embeddings?a=b%20c", "engine": "e0"}
            assert engine.others[-1] == ("POST", "/v1/embeddings?a=b%20c", b"\x00raw")
            status, _, body = await raw(bench, "GET", "/v1/models")
            assert json.loads(body)["data"][0]["id"] == "fake"

    run(scenario)


@pytest.mark.parametrize("path", ["/v1/models/org%2Fm", "/v1/%C3%A9?q=%2f", "/v1/a//b", "/x/../v1/secret"])
def test_path_is_passed_through_as_it_was_written(path: str) -> None:
    async def scenario() -> None:
        (engine,) = engines(1)
        async with served(engine) as bench:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(bench.url.rpartition(":")[2]))
            writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            assert b" 200 " in await reader.readline()
            writer.close()
            assert engine.others[-1][:2] == ("GET", path)

    run(scenario)


def test_passed_request_goes_to_the_next_replica_when_the_first_dies_before_its_answer() -> None:
    async def scenario() -> None:
        first, second = engines(2)
        async with served(first, second) as bench:
            first.failures = [Failure(0)]
            body = chat(tools=[{"type": "function"}], stream=False, stream_options=None)
            status, text = await ask(bench, "/v1/chat/completions", **body)
            assert (status, json.loads(text)["engine"]) == (200, "e1")
            assert bench.metrics.by_label("requests") == {"tools": 1}

    run(scenario)


def test_passed_request_is_asked_once_when_repeating_it_could_change_something() -> None:
    async def scenario() -> None:
        first, second = engines(2)
        async with served(first, second) as bench:
            first.failures = [Failure(0)]
            status, _, body = await raw(bench, "POST", "/v1/load_lora_adapter", data=b"{}")
            assert (status, json.loads(body)["error"]["code"]) == (503, 503)
            assert second.others == []

    run(scenario)


def test_passed_stream_ends_with_one_error_when_its_replica_dies_in_it() -> None:
    async def scenario() -> None:
        (engine,) = engines(1)
        engine.passed_stream = [b'data: {"choices":[]}\n\n']
        async with served(engine) as bench:
            status, text = await ask(bench, "/v1/chat/completions", **chat(tools=[1]))
        assert status == 200
        assert events(text)[-1]["error"]["code"] == 500
        assert text.endswith("data: [DONE]\n\n")

    run(scenario)


def test_extension_is_taken_out_when_a_request_is_passed_through() -> None:
    async def scenario() -> None:
        (engine,) = engines(1)
        async with served(engine) as bench:
            body = chat(tools=[1], concordia={"report": True}, stream=False, stream_options=None)
            await ask(bench, "/v1/chat/completions", **body)
        assert "concordia" not in json.loads(engine.others[-1][2])

    run(scenario)


def test_everything_is_passed_through_when_there_is_no_tokenizer() -> None:
    async def scenario() -> None:
        (engine,) = engines(1)
        async with served(engine, tokenizer=None) as bench:
            await ask(bench, **completion(stream=False, stream_options=None))
            assert bench.metrics.by_label("requests") == {"tokenizer": 1}
        assert json.loads(engine.others[-1][2])["prompt"] == [10, 20, 30]

    run(scenario)


def test_request_id_of_the_client_is_honoured_when_it_gives_one() -> None:
    async def scenario() -> None:
        (engine,) = engines(1)
        data = json.dumps(completion()).encode()
        async with served(engine) as bench:
            _, headers, body = await raw(
                bench, "POST", "/v1/completions", data=data, x_request_id="mine", **JSON
            )
            assert headers["x-request-id"] == "mine"
            assert {event["id"] for event in events(body.decode())} == {"cmpl-mine"}
            data = json.dumps(completion(request_id="other")).encode()
            _, _, body = await raw(bench, "POST", "/v1/completions", data=data, **JSON)
            assert {event["id"] for event in events(body.decode())} == {"cmpl-other"}
        names = [b["kv_transfer_params"]["concordia"]["request"] for b in engine.bodies]
        assert len(set(names)) == 2, "a client's id is no identity: it may be used twice"

    run(scenario)


def test_stream_has_one_id_and_time_when_it_is_resumed() -> None:
    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(3, "kill")]
        data = json.dumps(completion()).encode()
        async with served(first, second) as bench:
            _, _, body = await raw(bench, "POST", "/v1/completions", data=data, **JSON)
        found = events(body.decode())
        assert len({event["id"] for event in found}) == 1
        assert len({event["created"] for event in found}) == 1

    run(scenario)


def test_status_and_metrics_tell_of_a_failover_when_there_was_one() -> None:
    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(3, "kill")]
        async with served(first, second) as bench:
            await ask(bench, **completion())
            status = bench.router.status()
            assert [fault["kind"] for fault in status["faults"]] == ["engine-error"]
            assert status["counters"]["failovers"] == 1
            assert status["in_flight"] == 0
            page = (await raw(bench, "GET", "/metrics"))[2].decode()
        for line in (
            'concordia_faults_total{kind="engine-error"} 1.0',
            'concordia_requests_total{protection="protected",reason=""} 1.0',
            "concordia_tokens_total 12.0",
            "concordia_detection_seconds_count 1.0",
            "concordia_time_to_next_token_seconds_count 1.0",
            "concordia_requests_held 0.0",
        ):
            assert line in page.splitlines(), page

    run(scenario)


@pytest.mark.parametrize(("method", "path"), [("POST", "/concordia/drain"), ("GET", "/concordia/status")])
def test_operators_commands_are_not_there_when_asked_over_http(method: str, path: str) -> None:
    async def scenario() -> None:
        (engine,) = engines(1)
        async with served(engine) as bench:
            status, _, _ = await raw(bench, method, path, origin="http://elsewhere")
            assert (status, engine.others[-1][:2]) == (200, (method, path)), "it is vLLM's to say that it knows no such path"
            assert await health(bench) == 200

    run(scenario)


def test_browsers_may_ask_from_anywhere_as_with_vllm() -> None:
    async def scenario() -> None:
        async with served(*engines(1), api_keys=["k"]) as bench:
            status, headers, _ = await raw(
                bench,
                "OPTIONS",
                "/v1/completions",
                origin="http://a",
                access_control_request_method="POST",
            )
            assert (status, headers["access-control-allow-origin"]) == (200, "*")

    run(scenario)


def test_openai_client_reads_a_resumed_chat_when_it_streams() -> None:
    openai = pytest.importorskip("openai", reason="the openai client is not installed")

    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(4, "kill")]
        async with served(first, second) as bench:
            client = openai.AsyncOpenAI(base_url=f"{bench.url}/v1", api_key="x", max_retries=0)
            ids: list[int] = []
            reports: list[Any] = []
            stream = await client.chat.completions.create(
                model="fake",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=10,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={
                    "return_token_ids": True,
                    "concordia": {"report": True},
                    "ignore_eos": True,
                },
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    ids += (choice.model_extra or {}).get("token_ids") or []
                if (chunk.model_extra or {}).get("concordia"):
                    reports.append(chunk.model_extra["concordia"])
                    assert chunk.usage.completion_tokens == 10
            await client.close()
        assert len(ids) == 10
        assert [report["failovers"] for report in reports] == [1]

    run(scenario)


def test_engine_owes_a_first_event_only_while_somebody_waits_for_it() -> None:
    async def scenario() -> None:
        (engine,) = engines(1, gate=asyncio.Event(), pause=asyncio.Event())
        async with served(engine) as bench:
            asking = asyncio.create_task(ask(bench, **completion()))
            await until(lambda: engine.requests_in_flight == 1)
            assert engine.gate is not None
            assert engine.pause is not None
            engine.gate.set()
            await until(lambda: engine.requests_in_flight == 0)
            assert bench.router.in_flight == 1
            engine.pause.set()
            await asking

    run(scenario)
