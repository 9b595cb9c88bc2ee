"""The router beside the engine it speaks for.

Invariant: what a client of the router gets, from a real vLLM on the CPU, equals what a client of that vLLM gets: text, ids, log-probabilities,
usage, finish and stop reasons, roles, fingerprint, and the shape of every event; the openai client is the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import uvicorn

from asking import events, until
from concordia.serving import tokenizer as tokenizers
from concordia.serving.metrics import Metrics
from concordia.serving.router import Router, RouterSettings
from concordia.serving.server import make_app
from concordia.testing.model import make_model
from concordia.testing.served import free_port

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
START_S = 180.0
MESSAGES = [{"role": "user", "content": "hello there, tell me"}]


@dataclass
class Only:
    """A replica set of one engine that never fails."""

    name: str
    base_url: str
    incarnation: int = 1
    requests_in_flight: int = 0

    @property
    def active(self) -> list[Only]:
        return [self]

    def subscribe(self, callback: Any) -> None: ...

    def report_fault(self, replica: Any, kind: Any, detail: str) -> None:
        raise AssertionError(f"nothing failed here: {detail}")

    def fail_over(self, replica: Any, fault: Any) -> Any:
        raise AssertionError("nothing failed here")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, shape="tiny")
    return folder


@pytest.fixture(scope="module")
def engine(model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a real server."""
    port = free_port()
    log = tmp_path_factory.mktemp("log") / "engine.log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "1024", "--kv-cache-memory-bytes", str(256 << 20), "--enforce-eager"),
        *("--dtype", "float32"),  # small bfloat16 models are ended by SIGILL on a CPU with AMX
    ]
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        asyncio.run(_ready(f"http://127.0.0.1:{port}", process, log))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()  # it removes its shared memory itself when it is asked
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


async def _ready(url: str, process: subprocess.Popen[bytes], log: pathlib.Path) -> None:
    bound = time.monotonic() + START_S
    async with aiohttp.ClientSession() as session:
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < bound, log.read_text()[-2000:]
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def routed(engine: str, model: pathlib.Path) -> AsyncIterator[str]:
    """The base URL of a router before that engine."""
    tokenizer = tokenizers.load(str(model))
    assert tokenizer is not None
    router = Router(Only("only", engine), None, tokenizer, RouterSettings(), Metrics())
    config = uvicorn.Config(make_app(router), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started or task.done())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


CHATS: list[dict[str, Any]] = [
    {"max_tokens": 20},
    {"max_tokens": 20, "logprobs": True},
    {
        "max_tokens": 20,
        "logprobs": True,
        "top_logprobs": 5,
        "extra_body": {"return_token_ids": True},
    },
    {"max_tokens": 20, "logprobs": True, "extra_body": {"return_tokens_as_token_ids": True}},
    {"max_tokens": 60, "stop": ["x4", "!"], "logprobs": True, "top_logprobs": 1},
    {"max_tokens": 60, "stop": ["x4", "!"], "extra_body": {"include_stop_str_in_output": True}},
    {"max_tokens": 60, "stop": ["x4", "!"], "extra_body": {"min_tokens": 20}},
    {"max_tokens": 40, "extra_body": {"stop_token_ids": [379, 15]}},
    {
        "max_tokens": 40,
        "extra_body": {"stop_token_ids": [379, 15], "include_stop_str_in_output": True},
    },
    {"max_tokens": 20, "logit_bias": {"257": 100}},
    {
        "max_tokens": 20,
        "logit_bias": {"257": 100},
        "extra_body": {"ignore_eos": True, "skip_special_tokens": False},
    },
    {"max_tokens": 20, "temperature": 0.9, "seed": 5, "top_p": 0.9},
    {"max_tokens": 20, "presence_penalty": 1.0, "extra_body": {"repetition_penalty": 1.2}},
    {"max_tokens": 5, "extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}},
    {"max_tokens": 5, "extra_body": {"add_generation_prompt": False}},
    {"max_tokens": 5, "extra_body": {"echo": True}},
    {"logit_bias": {"257": 9}},  # no limit: up to the end of the context, had it no end of its own
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "hello"},
    {"prompt": "hello", "logprobs": 0, "max_tokens": 30},
    {"prompt": "hello", "logprobs": 3, "max_tokens": 30, "extra_body": {"return_token_ids": True}},
    {"prompt": "hello", "logprobs": 2, "max_tokens": 60, "stop": ["x4"]},
    {"prompt": [10, 20, 30], "max_tokens": 10, "extra_body": {"ignore_eos": True}},
    {"prompt": [[10, 20, 30], [40, 50]], "max_tokens": 10, "logprobs": 1},
    {"prompt": "abc", "n": 2, "temperature": 0.8, "seed": 3, "max_tokens": 10, "logprobs": 1},
    {"prompt": "abc", "max_tokens": 3, "echo": True},
]
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a", "model": "none"}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}),
    ("/v1/completions", {"prompt": "a", "temperature": -1}),
    ("/v1/completions", {"prompt": "a", "top_p": 7}),
    ("/v1/completions", {"prompt": [99_999]}),
    ("/v1/completions", {"prompt": "a" * 2000}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 99_999}),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": MESSAGES, "n": 2, "temperature": 0}),
    ("/v1/chat/completions", {"messages": MESSAGES, "tools": [], "max_tokens": 3}),
]


def plain(chunks: list[Any]) -> dict[str, Any]:
    """What chunks say together: how tokens are spread over events depends on the engine's pace."""
    found: dict[str, Any] = {"keys": set(), "rest": set()}
    for chunk in chunks:
        body = chunk.model_dump()
        for choice in body.pop("choices"):
            name = choice["index"]
            one = found.setdefault(
                name, {"text": "", "ids": [], "logprobs": [], "finish": [], "role": []}
            )
            delta = choice.get("delta")
            one["text"] += (delta["content"] or "") if delta else choice["text"]
            one["role"] += [delta["role"]] if delta and delta["role"] else []
            one["ids"] += choice.get("token_ids") or []
            rows = choice["logprobs"] or {}
            columns = [v for v in rows.values() if v]
            one["logprobs"] += rows.get("content") or list(zip(*columns, strict=True))
            if choice["finish_reason"]:
                one["finish"].append((choice["finish_reason"], choice.get("stop_reason")))
            found["keys"] |= set(choice)
        del body["id"], body["created"]
        found["rest"].add(repr(body))
    return found


async def streamed(client: Any, kind: str, body: dict[str, Any]) -> dict[str, Any]:
    create = client.chat.completions.create if kind == "chat" else client.completions.create
    options = {"include_usage": True}
    stream = await create(model="tiny", stream=True, stream_options=options, **body)
    return plain([chunk async for chunk in stream])


async def whole(client: Any, kind: str, body: dict[str, Any]) -> dict[str, Any]:
    create = client.chat.completions.create if kind == "chat" else client.completions.create
    found: dict[str, Any] = (await create(model="tiny", **body)).model_dump()
    del found["id"], found["created"]
    return found


def test_router_says_what_the_engine_says_when_asked_by_the_openai_client(
    engine: str, model: pathlib.Path
) -> None:
    from openai import AsyncOpenAI

    async def scenario() -> None:
        async with routed(engine, model) as router:
            direct, through = (
                AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
                for url in (engine, router)
            )
            cases = [("chat", {"messages": MESSAGES, **c}) for c in CHATS]
            cases += [("completion", c) for c in COMPLETIONS]
            for kind, case in cases:
                body = {"temperature": 0, **case}
                for ask in (whole, streamed):
                    expected = await ask(direct, kind, body)
                    assert await ask(through, kind, body) == expected, (ask.__name__, case)
            await direct.close()
            await through.close()

    asyncio.run(asyncio.wait_for(scenario(), 200))


def test_router_refuses_what_the_engine_refuses(engine: str, model: pathlib.Path) -> None:
    async def scenario() -> None:
        async with routed(engine, model) as router, aiohttp.ClientSession() as session:
            for path, body in WRONG:
                for is_stream in (False, True):
                    found = []
                    for url in (engine, router):
                        posting = session.post(
                            url + path, json={"model": "tiny", **body, "stream": is_stream}
                        )
                        async with posting as response:
                            data = await response.text()
                            error = (
                                events(data)[0]
                                if data.startswith("data:")
                                else await response.json()
                            )["error"]
                            found.append((response.status, error["code"]))
                    assert found[0] == found[1], (path, body, is_stream)

    asyncio.run(asyncio.wait_for(scenario(), 60))
