"""Requests that are passed through to a replica as they are.

Owns: forwarding of what the router does not understand or cannot continue. Promises: the bytes go
both ways unchanged; a request that got no byte of its answer yet is put to another replica after a
fault, if it can be repeated; one that was cut off in its answer ends with one error that says so,
and was counted as unprotected when it began. Called by the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

import aiohttp
from starlette.types import Send

from concordia import config
from concordia.errors import RequestRefused, UpstreamBroken
from concordia.serving.admission import unavailable
from concordia.serving.flight import ReplicaLike
from concordia.serving.openai_format import error_event
from concordia.serving.router import Router

# RFC 9110 7.6.1, and what is about one connection only.
_HOP_HEADERS: Final = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "host",
        "content-length",
        "authorization",
    )
)

# Asking these twice changes nothing but the time it takes.
_REPEATABLE: Final = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/models",
    "/v1/score",
    "/v1/rerank",
    "/v2/rerank",
    "/tokenize",
    "/detokenize",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
)


class Passage:
    """One request on its way through; `run` sends the whole answer."""

    def __init__(
        self, router: Router, *, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> None:
        self._router = router
        self._method = method
        self._target = target
        self._headers = headers
        self._body = body
        self._has_started = False
        self._is_event_stream = False

    async def run(self, send: Send) -> None:
        """Forward and answer; raises RequestRefused while nothing has been sent."""
        self._router.admission.check()
        with self._router.entered():
            await self._run(send)

    async def _run(self, send: Send) -> None:
        is_repeatable = self._method in ("GET", "HEAD") or self._target.startswith(_REPEATABLE)
        attempts = config.ATTEMPTS_MAX if is_repeatable else 1
        while True:
            attempts -= 1
            replica = await self._router.admission.acquire()
            try:
                with self._router.admission.passing(replica):
                    await self._pass(replica, send, is_last=attempts == 0)
                return
            except UpstreamBroken as error:
                self._router.faults.report(replica, f"{self._target}: {error}")
                if self._has_started:
                    await self._end(send, str(error))
                    return
                if attempts == 0:
                    raise unavailable(f"the engine failed: {error}") from error
                await asyncio.sleep(config.SUSPECT_WAIT_S)

    async def _pass(self, replica: ReplicaLike, send: Send, *, is_last: bool) -> None:
        response = await self._router.upstream.forward(
            self._method, replica.base_url + self._target, data=self._body, headers=self._headers
        )
        try:
            if response.status in (500, 503) and not is_last:
                raise UpstreamBroken(f"HTTP {response.status}")
            content_type = response.headers.get("content-type", "")
            self._is_event_stream = content_type.startswith("text/event-stream")
            if self._is_event_stream:
                await self._start(send, response)
                async for data in response.content.iter_any():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                # Read before the first byte goes out: then a fault costs the client nothing but
                # time.
                data = await response.read()
                await self._start(send, response)
                await send({"type": "http.response.body", "body": data, "more_body": False})
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise UpstreamBroken(f"{type(error).__name__}: {error}") from error
        finally:
            response.close()

    async def _start(self, send: Send, response: aiohttp.ClientResponse) -> None:
        self._has_started = True
        headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in response.headers.items()
            if name.lower() not in _HOP_HEADERS
        ]
        await send({"type": "http.response.start", "status": response.status, "headers": headers})

    async def _end(self, send: Send, detail: str) -> None:
        """The engine died within an answer that nobody can continue."""
        body = b""
        if self._is_event_stream:
            message = f"the engine failed and this kind of request cannot be continued: {detail}"
            error = RequestRefused(message, status=500, kind="InternalServerError")
            body = error_event(error) + b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": False})


def forwarded_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The client's headers without those that concern its own connection."""
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_HEADERS}
