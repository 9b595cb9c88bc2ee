"""HTTP to one replica's vLLM server.

Owns: the client session and the event stream of one upstream answer. Promises: an event is given
whole or not at all, however TCP cuts it; what the engine did wrong is UpstreamBroken, what the
client did wrong is RequestRefused with vLLM's own words; nothing is retried here. Called by the
router. A connection is used once: a server that closes an idle one must not look like a fault.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import aiohttp
from yarl import URL

from concordia import config
from concordia.errors import RequestRefused, UpstreamBroken

_FIELD: Final = b"data: "
_DONE: Final = b"[DONE]"
_BROKEN: Final = (aiohttp.ClientError, ConnectionError, TimeoutError, asyncio.IncompleteReadError)


class EventStream:
    """The events of one answer; ends after [DONE], raises UpstreamBroken when the connection ends
    before.
    """

    __slots__ = ("_buffer", "_is_broken_off", "_response", "is_silent")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._buffer = b""
        self._is_broken_off = False
        self.is_silent = False  # somebody reads, and nothing has come yet

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        self.is_silent = not self._buffer
        while True:
            end = self._buffer.find(b"\n\n")
            while end < 0:
                await self._fill()
                end = self._buffer.find(b"\n\n")
            line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
            if not line.startswith(_FIELD):
                continue  # a comment: vLLM's keep-alive
            if line[len(_FIELD) :] == _DONE:
                return
            yield _event(line[len(_FIELD) :])

    def break_off(self, reason: str) -> None:
        """Wake whoever reads with UpstreamBroken and close the connection; what was not read yet is
        never given.
        """
        self._is_broken_off = True
        self._buffer = b""
        self._response.content.set_exception(UpstreamBroken(reason))
        self._response.close()

    def close(self) -> None:
        """Close the connection; vLLM aborts the request if it still runs."""
        self._response.close()

    async def _fill(self) -> None:
        try:
            data = await self._response.content.readany()
        except _BROKEN as error:
            raise UpstreamBroken(f"{type(error).__name__}: {error}") from error
        if self._is_broken_off or not data:
            raise UpstreamBroken("the connection ended before the answer did")
        self.is_silent = False
        self._buffer += data
        if len(self._buffer) > config.EVENT_BYTES_MAX:
            raise UpstreamBroken(f"an event of more than {config.EVENT_BYTES_MAX} bytes")


class Upstream:
    """One client session for all replicas; `headers` go with every request (the replicas' own API
    key).
    """

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        self._headers = dict(headers or {})
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Open the session; needs the running event loop."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.UPSTREAM_CONNECT_S)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=self._headers, auto_decompress=False
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def post_stream(
        self, url: str, body: Mapping[str, Any], *, headers: Mapping[str, str]
    ) -> EventStream:
        """Post a streaming request; returns once vLLM has accepted it."""
        response = await self._send("POST", url, data=_json(body), headers=headers)
        if response.status == 200:
            return EventStream(response)
        raise await _refusal(response)

    async def post(self, url: str, body: Mapping[str, Any], *, headers: Mapping[str, str]) -> Any:
        """Post and read one JSON answer."""
        return await self._read(await self._send("POST", url, data=_json(body), headers=headers))

    async def get(self, url: str) -> Any:
        """Read one JSON answer."""
        return await self._read(await self._send("GET", url, data=None, headers={}))

    async def _read(self, response: aiohttp.ClientResponse) -> Any:
        if response.status != 200:
            raise await _refusal(response)
        try:
            return json.loads(await response.read())
        except (*_BROKEN, ValueError) as error:
            raise UpstreamBroken(f"{type(error).__name__}: {error}") from error

    async def forward(
        self, method: str, url: str, *, data: bytes, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """Send a request as it is; the caller reads and closes the response."""
        # As it is: what resolves `..` here would lead past the paths that the API key guards.
        return await self._send(method, URL(url, encoded=True), data=data, headers=headers)

    async def _send(
        self, method: str, url: str | URL, *, data: bytes | None, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        assert self._session is not None, "start() comes first"
        try:
            return await self._session.request(
                method, url, data=data, headers=headers, allow_redirects=False
            )
        except _BROKEN as error:
            raise UpstreamBroken(f"{type(error).__name__}: {error}") from error


def json_headers(extra: Mapping[str, str]) -> dict[str, str]:
    """Headers of a JSON request."""
    return {**extra, "content-type": "application/json"}


def refused(error: Mapping[str, Any]) -> RequestRefused:
    """vLLM's error object as the client shall see it."""
    code = error.get("code")
    return RequestRefused(
        str(error.get("message", "the engine refused the request")),
        status=code if isinstance(code, int) else 400,
        kind=str(error.get("type", "BadRequestError")),
        param=error.get("param"),
    )


def _event(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise UpstreamBroken(f"an event that is not JSON: {data[:80]!r}") from error
    if not isinstance(found, dict):
        raise UpstreamBroken(f"an event that is no object: {data[:80]!r}")
    said = found.get("error")
    if said is not None:
        # The status went out as 200 long ago; the code inside tells whose fault it is.
        if isinstance(said, dict) and isinstance(said.get("code"), int) and said["code"] < 500:
            raise refused(said)
        raise UpstreamBroken(f"the engine says: {str(said)[:200]}")
    return found


async def _refusal(response: aiohttp.ClientResponse) -> Exception:
    try:
        data = await response.read()
    except _BROKEN as error:
        return UpstreamBroken(f"{type(error).__name__}: {error}")
    if response.status >= 500 and response.status != 501:
        return UpstreamBroken(f"HTTP {response.status}: {data[:200]!r}")
    try:
        said = json.loads(data)["error"]
        return refused(said if isinstance(said, dict) else {"message": said})
    except (ValueError, KeyError, TypeError):
        return RequestRefused(data.decode("utf-8", "replace")[:500], status=response.status)


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
