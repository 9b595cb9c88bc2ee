"""The HTTP server, floor 6.

Owns: uvicorn, from the first accepted connection to the last answer. Promises: a signal does not
end it, the service does; while it is open connections are accepted, and at its end answers have a
bound to finish in. Called by the service. It knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.types import ASGIApp

from concordia import config
from concordia.errors import UsageError


@contextlib.asynccontextmanager
async def listening(app: ASGIApp, listener: socket.socket) -> AsyncIterator[None]:
    """Serve `app` on this socket. Raises UsageError when the server ends before it has started."""
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=config.HTTP_GRACE_S,
    )
    server = _Server(settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if serving.done():
                raise UsageError("the HTTP server ended while it started")
            await asyncio.sleep(config.REPLACE_POLL_S)
        yield
    finally:
        server.should_exit = True
        await serving


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
