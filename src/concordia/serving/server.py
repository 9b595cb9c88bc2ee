"""The HTTP face: what an OpenAI client talks to.

Owns: the ASGI application, its paths, the API key and the watch over clients that leave. Promises:
completions and chats go through the router, everything else but /health and /metrics to a replica
as it is; an error before the first byte has its HTTP status, one after it is the stream's last
event; a client that leaves cancels what it asked for, at any moment. Run by the command line under
uvicorn. Does not keep state of its own, and does nothing for the operator: status and drain are the
control socket's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Final

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from concordia import config
from concordia.errors import RequestRefused
from concordia.serving.need import Level
from concordia.serving.openai_format import error_body
from concordia.serving.passage import Passage, forwarded_headers
from concordia.serving.request import Endpoint, GenerationRequest, parse
from concordia.serving.router import Router

# What vLLM's server guards.
GUARDED_PREFIXES: Final = ("/v1", "/v2", "/inference", "/cohere")
_STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]
_JSON_HEADERS: Final = [(b"content-type", b"application/json")]


def make_app(router: Router, *, api_keys: Sequence[str] = ()) -> Starlette:
    """The application."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await router.start()
        yield
        await router.stop()

    async def health(_: Request) -> Response:
        return Response(status_code=200 if router.admission.is_open else 503)

    async def metrics(_: Request) -> Response:
        return Response(router.metrics.page(), media_type="text/plain; version=0.0.4")

    return Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            *(Route(e.value, _Generating(router, e), methods=["POST"]) for e in Endpoint),
            Mount("/", _Passing(router)),
        ],
        middleware=[
            Middleware(
                CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"]
            ),
            Middleware(_Keys, keys=api_keys),
        ],
        lifespan=lifespan,
    )


class _Keys:
    """Bearer authentication as vLLM has it."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            self._digests
            and scope["type"] == "http"
            and scope["method"] != "OPTIONS"
            and scope["path"].startswith(GUARDED_PREFIXES)
            and not self._is_known(Headers(scope=scope).get("authorization", ""))
        ):
            error = RequestRefused("Unauthorized", status=401, kind="AuthenticationError")
            await _send_error(send, error)
            return
        await self._app(scope, receive, send)

    def _is_known(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        if scheme.lower() != "bearer":
            return False
        digest = hashlib.sha256(key.encode()).digest()
        # Every key is compared, so that the time tells nothing.
        return sum(secrets.compare_digest(digest, known) for known in self._digests) > 0


class _Generating:
    """POST of a completion or a chat."""

    def __init__(self, router: Router, endpoint: Endpoint) -> None:
        self._router = router
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            data = await _read_body(Request(scope, receive), headers)
            await _until_left(receive, self._answer(data, headers, send))
        except RequestRefused as error:
            await _send_error(send, error)
        except ClientDisconnect:
            return

    async def _answer(self, data: bytes, headers: Headers, send: Send) -> None:
        router = self._router
        request = parse(
            self._endpoint,
            _load(data, headers),
            defaults=router.settings.defaults,
            sampler=router.settings.sampler,
            chat_blocker=router.chat_blocker,
        )
        if request.need is Level.PASS_THROUGH or router.tokenizer is None:
            router.metrics.unprotected(request.reason or "tokenizer")
            passage = Passage(
                router,
                method="POST",
                target=self._endpoint.value,
                headers=forwarded_headers(headers),
                body=_without_extension(request, data),
            )
            await passage.run(send)
            return
        client_id = headers.get("x-request-id") or request.body.get("request_id")
        client_id = str(client_id or secrets.token_hex(8))
        generation = await router.generate(
            request, client_id=client_id, headers=_upstream_headers(headers)
        )
        named = (b"x-request-id", client_id.encode("latin-1", "replace"))
        if not request.is_stream:
            body = await generation.whole()
            await _send(send, 200, [*_JSON_HEADERS, named], body)
            return
        await send(
            {"type": "http.response.start", "status": 200, "headers": [*_STREAM_HEADERS, named]}
        )
        async with contextlib.aclosing(generation.events()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Passing:
    """Everything else."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1011})
            return
        request = Request(scope, receive)
        # As it came: decoded, a slash within a name would be one between names.
        path = scope["raw_path"].decode("latin-1")
        query = scope["query_string"].decode("latin-1")
        passage = Passage(
            self._router,
            method=scope["method"],
            target=path + (f"?{query}" if query else ""),
            headers=forwarded_headers(request.headers),
            body=await _read_body(request, None),
        )
        try:
            await _until_left(receive, passage.run(send))
        except RequestRefused as error:
            await _send_error(send, error)
        except ClientDisconnect:
            return


async def _until_left(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; cancel it and raise ClientDisconnect when the client leaves before."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    leaving = asyncio.create_task(leave())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _read_body(request: Request, headers: Headers | None) -> bytes:
    if headers is not None:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestRefused("Unsupported Media Type: Only 'application/json' is allowed")
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > config.BODY_BYTES_MAX:
            raise RequestRefused(
                f"the request body exceeds {config.BODY_BYTES_MAX} bytes", status=413
            )
        parts.append(part)
    return b"".join(parts)


def _load(data: bytes, headers: Headers) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(f"the request body is not JSON: {error}") from error


def _without_extension(request: GenerationRequest, data: bytes) -> bytes:
    if "concordia" not in request.body:
        return data
    return json.dumps({k: v for k, v in request.body.items() if k != "concordia"}).encode()


def _upstream_headers(headers: Headers) -> dict[str, str]:
    """What vLLM may want to know of the client's headers: priority, session, tracing."""
    dropped = ("accept", "accept-encoding", "content-type", "x-request-id")
    return {k: v for k, v in forwarded_headers(headers).items() if k not in dropped}


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _send_error(send: Send, error: RequestRefused) -> None:
    headers = list(_JSON_HEADERS)
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    await _send(send, error.status, headers, error_body(error))
