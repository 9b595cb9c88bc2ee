"""Engines and a replica set that fail when and how a test says.

A FakeEngine speaks the part of vLLM's HTTP that the router uses, over a plain socket, so that it can end in the middle of a byte sequence.
Its next token depends on all tokens before it and on nothing else, as with a real engine whose state is exact; with a history (penalties)
it also depends on how many tokens *this request* has generated, so that prompt + emitted gives another answer than an unfailed run.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers
import uvicorn
from tokenizers import decoders, models, pre_tokenizers

from concordia.errors import ReplicaError
from concordia.recovery.fault import Fault, FaultKind
from concordia.serving.metrics import Metrics
from concordia.serving.recorder import Recorder
from concordia.serving.router import Router, RouterSettings
from concordia.serving.server import make_app
from concordia.serving.tokenizer import Tokenizer, from_json

EOS = 257
FINGERPRINT = "fake-1"
CONTEXT_TOKENS = 4096
HISTORY_FIELDS = ("presence_penalty", "frequency_penalty", "bad_words", "structured_outputs")


def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that most characters are split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    vocabulary |= {"<s>": 256, "</s>": EOS}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return from_json(backend.to_str())


TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    return list(TOKENIZER.backend.encode(text).ids)


def free_token(ids: Sequence[int], generated: int, body: dict[str, Any]) -> int:
    """The engine's next token: a hash of all ids, of the seed, and of the history where there is one."""
    state = json.dumps([list(ids), body.get("seed"), body.get("model")])
    if any(body.get(name) for name in HISTORY_FIELDS):
        state += f"history {generated}"
    return zlib.crc32(state.encode()) % 250


def scripted(text: str, prompt_count: int) -> Callable[[Sequence[int], int, dict[str, Any]], int]:
    """An engine that says `text` after a prompt of that many tokens, wherever it is resumed."""
    answer = [*encode(text), EOS]
    return lambda ids, generated, body: answer[min(len(ids) - prompt_count, len(answer) - 1)]


@dataclass
class Failure:
    """How one stream of an engine ends early.

    after: events that are sent whole before. mode: "close" (sends `cut` bytes of the next event, then ends), "hang" (silence),
    "error" (an error event with `code`), "abort" (vLLM's finish reason of an engine that shuts down), "status" (an HTTP error at once),
    "kill" (the whole engine ends, every stream with it), "finish" (the stream ends with [DONE] and no finish).
    """

    after: int
    mode: str = "close"
    cut: int = 0
    code: int = 500


@dataclass
class FakeEngine:
    """One replica's API server. `failures` are taken in the order in which streams are posted; None is no failure."""

    name: str = "engine"
    token: Callable[[Sequence[int], int, dict[str, Any]], int] = free_token
    failures: list[Failure | None] = field(default_factory=list)
    segment: int = 0  # cut what is sent into TCP segments of this many bytes
    merge: int = 1  # tokens per event
    pace: float = 0.0  # seconds between events
    gate: asyncio.Event | None = None  # streams wait here before their first event
    pause: asyncio.Event | None = None  # streams wait here before every event after the first
    bodies: list[dict[str, Any]] = field(default_factory=list)
    tokenized: list[dict[str, Any]] = field(default_factory=list)
    others: list[tuple[str, str, bytes]] = field(default_factory=list)
    heads: list[dict[str, str]] = field(default_factory=list)
    passed_stream: list[bytes] | None = (
        None  # a passed-through request gets these bytes, then the connection ends
    )
    gone: int = 0  # streams whose client left
    is_dead: bool = False
    requests_in_flight: int = 0
    base_url: str = ""
    incarnation: int = field(default_factory=itertools.count(1).__next__)

    async def start(self) -> None:
        self._writers: set[asyncio.StreamWriter] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.base_url = f"http://127.0.0.1:{port}"

    def kill(self) -> None:
        """End everything, as a killed process does."""
        self.is_dead = True
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, _ = head[0].split(" ")
            headers = {k.lower(): v for k, _, v in (h.partition(": ") for h in head[1:]) if k}
            self.heads.append(headers)
            data = await reader.readexactly(int(headers.get("content-length", "0")))
            await self._route(method, path, data, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _route(
        self,
        method: str,
        path: str,
        data: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if path == "/v1/models":
            model = {"id": "fake", "object": "model", "max_model_len": CONTEXT_TOKENS}
            await self._json(writer, {"object": "list", "data": [model]})
        elif path == "/tokenize":
            body = json.loads(data)
            self.tokenized.append(body)
            text = body.get("prompt") or "".join(
                f"{m['role']}:{m['content']}\n" for m in body["messages"]
            )
            await self._json(writer, {"tokens": encode(text), "max_model_len": CONTEXT_TOKENS})
        elif path == "/v1/completions" and self._own(data) is False:
            await self._json(writer, {"system_fingerprint": FINGERPRINT})
        elif path == "/v1/completions" and self._own(data):
            await self._complete(json.loads(data), reader, writer)
        else:
            self.others.append((method, path, data))
            if self.passed_stream is not None:
                head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                writer.write(head.encode())
                for part in self.passed_stream:
                    await self._send(writer, b"%x\r\n%b\r\n" % (len(part), part))
                return
            failure = self.failures.pop(0) if self.failures else None
            if failure is not None:
                writer.transport.abort()
                return
            await self._json(writer, {"echo": path, "engine": self.name})

    def _own(self, data: bytes) -> Any:
        """What the router says of itself in a request; None in one that is passed through."""
        return (json.loads(data).get("kv_transfer_params") or {}).get("concordia")

    async def _json(self, writer: asyncio.StreamWriter, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()

    async def _complete(
        self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        failure = self.failures.pop(0) if self.failures else None
        self.bodies.append(body)
        if failure is not None and failure.mode == "status":
            error = {"message": "no", "type": "X", "param": None, "code": failure.code}
            await self._json(writer, {"error": error}, failure.code)
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
        )
        await writer.drain()
        leaving = asyncio.create_task(self._watch(reader))
        try:
            if self.gate is not None:
                await self.gate.wait()
            for count, event in enumerate(self._events(body)):
                if failure is not None and count >= failure.after:
                    await self._fail(failure, event, writer)
                    return
                if count and self.pause is not None:
                    await self.pause.wait()
                await self._send(writer, event)
                await asyncio.sleep(self.pace)
            await self._send(writer, b"data: [DONE]\n\n")
        except ConnectionError:
            await leaving  # noticed at a write, before the reader was looked at
        finally:
            leaving.cancel()

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read(1)
        self.gone += 1

    async def _fail(self, failure: Failure, event: bytes, writer: asyncio.StreamWriter) -> None:
        if failure.mode == "hang":
            await asyncio.Event().wait()
        elif failure.mode == "kill":
            await self._send(writer, event[: failure.cut])
            self.kill()
        elif failure.mode == "error":
            error = {
                "message": "EngineCore died",
                "type": "InternalServerError",
                "code": failure.code,
            }
            await self._send(writer, b"data: " + json.dumps({"error": error}).encode() + b"\n\n")
            await self._send(writer, b"data: [DONE]\n\n")
        elif failure.mode == "abort":
            end = self._chunk({"finish_reason": "abort", "stop_reason": None, "token_ids": []})
            await self._send(writer, end)
        elif failure.mode == "finish":
            await self._send(writer, b"data: [DONE]\n\n")
        else:
            await self._send(writer, event[: failure.cut])

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        size = self.segment or len(data) or 1
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])
            await writer.drain()
            await asyncio.sleep(0)  # the reader sees this segment by itself

    def _events(self, body: dict[str, Any]) -> list[bytes]:
        ids = list(body["prompt"])
        generated: list[int] = []
        finish: str | None = None
        while finish is None:
            token = self.token(ids, len(generated), body)
            ids.append(token)
            generated.append(token)
            is_end = token in (body.get("stop_token_ids") or ())
            if token == EOS and not body.get("ignore_eos"):
                is_end = True
            if is_end and len(generated) > body.get("min_tokens", 0):
                finish = "stop"
            elif len(generated) >= body["max_tokens"]:
                finish = "length"
        events = []
        for at in range(0, len(generated), self.merge):
            part = generated[at : at + self.merge]
            is_last = at + self.merge >= len(generated)
            choice: dict[str, Any] = {
                "index": 0,
                "text": "?",
                "logprobs": self._logprobs(part, body),
                "finish_reason": finish if is_last else None,
                "stop_reason": generated[-1]
                if is_last and finish == "stop" and generated[-1] != EOS
                else None,
                "prompt_token_ids": body["prompt"] if at == 0 else None,
                "token_ids": part,
            }
            has_usage = (body.get("stream_options") or {}).get("include_usage")
            events.append(self._chunk(choice, stamp=is_last and not has_usage))
        if has_usage:
            details = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(generated)}
            usage = {
                "choices": [],
                "model": "fake",
                "usage": details,
                "system_fingerprint": FINGERPRINT,
            }
            events.append(b"data: " + json.dumps(usage).encode() + b"\n\n")
        return events

    def _logprobs(self, part: Sequence[int], body: dict[str, Any]) -> dict[str, Any] | None:
        count = body.get("logprobs")
        if count is None:
            return None
        assert body["return_tokens_as_token_ids"]
        rows = [
            [(token, -token / 100), *(((token + k) % 250, -k - 0.5) for k in range(1, count + 1))]
            for token in part
        ]
        return {
            "text_offset": [0] * len(part),
            "tokens": [f"token_id:{token}" for token in part],
            "token_logprobs": [row[0][1] for row in rows],
            "top_logprobs": [{f"token_id:{t}": v for t, v in row} for row in rows],
        }

    def _chunk(self, choice: dict[str, Any], *, stamp: bool = False) -> bytes:
        event = {
            "id": "cmpl-x",
            "object": "text_completion",
            "created": 1,
            "model": "fake",
            "choices": [choice],
        }
        if stamp:
            event["system_fingerprint"] = FINGERPRINT
        return b"data: " + json.dumps(event).encode() + b"\n\n"


@dataclass
class FakeReplicaSet:
    """The first engine is active, the others stand by; a fault is found when its engine is dead or `confirms` says so."""

    engines: list[FakeEngine]
    replicas: int = 1
    confirms: bool = True
    fail_over_gate: asyncio.Event | None = None
    faults: list[Fault] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)
    callback: Callable[[Fault], None] | None = None
    loop: asyncio.AbstractEventLoop | None = None

    def __post_init__(self) -> None:
        self.active: list[FakeEngine] = self.engines[: self.replicas]
        self.standbys: list[FakeEngine] = self.engines[self.replicas :]

    def subscribe(self, callback: Callable[[Fault], None]) -> None:
        self.callback = callback

    def report_fault(self, replica: FakeEngine, kind: FaultKind, detail: str) -> None:
        self.reports.append(detail)
        if self.confirms and replica in self.active:
            self.notice(replica, kind, detail)

    def notice(
        self, replica: FakeEngine, kind: FaultKind = FaultKind.STEP_OVERDUE, detail: str = "test"
    ) -> None:
        """What the detector does when it sees a fault."""
        assert self.callback is not None
        if replica in self.active:
            self.active.remove(replica)  # told once, and not offered for new work
        fault = Fault(kind, replica.incarnation, time.monotonic_ns(), detail)
        self.faults.append(fault)
        self.callback(fault)

    def failover_times(self, failed: FakeEngine) -> dict[str, float]:
        return {"sealed": 0.0, "struck": 0.0, "replaced": 0.0}

    def fail_over(self, replica: FakeEngine, fault: Fault) -> FakeEngine:
        """Runs in a thread, as the real one does."""
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(self._fail_over(replica), self.loop).result(30)

    async def _fail_over(self, replica: FakeEngine) -> FakeEngine:
        if not replica.is_dead:
            replica.kill()
        if self.fail_over_gate is not None:
            await self.fail_over_gate.wait()
        if not self.standbys:
            raise ReplicaError("no standby")
        promoted = self.standbys.pop(0)
        self.active.append(promoted)
        return promoted


@dataclass
class Bench:
    """A router under uvicorn on a port of its own, in the test's event loop."""

    url: str
    router: Router
    replicas: FakeReplicaSet
    metrics: Metrics

    async def renew(self, *engines: FakeEngine) -> None:
        """Put other engines in the place of those that were there."""
        for engine in engines:
            await engine.start()
        for engine in self.replicas.active:
            self.router.admission.exclude(engine.incarnation)
        self.replicas.active, self.replicas.standbys = [engines[0]], list(engines[1:])


@contextlib.asynccontextmanager
async def served(
    *engines: FakeEngine,
    replicas: int = 1,
    settings: RouterSettings | None = None,
    recorder: Recorder | None = None,
    api_keys: Sequence[str] = (),
    tokenizer: Tokenizer | None = TOKENIZER,
) -> AsyncIterator[Bench]:
    """Start engines, router and server; end them whatever happens."""
    for engine in engines:
        await engine.start()
    fakes = FakeReplicaSet(list(engines), replicas, loop=asyncio.get_running_loop())
    metrics = Metrics()
    router = Router(fakes, recorder, tokenizer, settings or RouterSettings(), metrics)
    app = make_app(router, api_keys=api_keys)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(10):
            while not server.started:
                assert not task.done(), "the server ended at its start"
                await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Bench(f"http://127.0.0.1:{port}", router, fakes, metrics)
    finally:
        server.should_exit = True
        server.force_exit = True
        async with asyncio.timeout(10):
            await task
            await router.stop()  # a server that is forced to exit does not end its application
        for engine in engines:
            if not engine.is_dead:
                engine.kill()
