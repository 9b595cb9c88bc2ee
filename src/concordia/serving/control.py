"""The control socket: what `concordia status` and `concordia drain` talk to, floor 6.

Owns: a Unix socket of mode 0600, one JSON line in and one out per connection. Promises: only this
user gets an answer; a request has a size and a time limit; an unknown command or a failing one is
answered, never raised into the server. Called by the service (server side) and the command line
(`ask`).
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from concordia import config
from concordia.errors import ConcordiaError, UsageError

Handler = Callable[[Mapping[str, Any]], Awaitable[Any]]


class ControlServer:
    """Answers commands until closed."""

    def __init__(self, path: pathlib.Path, handlers: Mapping[str, Handler]) -> None:
        self._path = path
        self._handlers = handlers
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; the folder is private already, the socket is made so before anybody can
        connect.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(str(self._path))
        finally:
            os.umask(before)
        self._server = await asyncio.start_unix_server(
            self._answer, sock=listener, limit=config.CONTROL_BYTES_MAX
        )

    async def close(self) -> None:
        """Stop listening and remove the socket."""
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if _peer(writer) == os.getuid():
                line = await asyncio.wait_for(reader.readline(), config.CONTROL_LINE_S)
                writer.write(json.dumps(await self._run(line)).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError, TimeoutError):
            return  # whoever asked has gone, or never said anything
        finally:
            writer.close()

    async def _run(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            handler = self._handlers[request["command"]]
        except (ValueError, KeyError, TypeError):
            return {"error": f"no such command: {line[:80]!r}"}
        try:
            return {"answer": await handler(request)}
        except ConcordiaError as error:
            return {"error": str(error)}


def ask(path: pathlib.Path, command: str, *, timeout_s: float, **arguments: Any) -> Any:
    """One command to a running server; raises UsageError when nobody answers, ConcordiaError with
    the server's own words.
    """
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.settimeout(timeout_s)
    try:
        with line:
            line.connect(str(path))
            line.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            with line.makefile("rb") as file:
                text = file.readline()
    except OSError as error:
        raise UsageError(f"the server does not answer on {path}: {error}") from None
    if not text:
        raise UsageError(f"the server at {path} hung up")
    found = json.loads(text)
    if "error" in found:
        raise ConcordiaError(found["error"])
    return found["answer"]


def _peer(writer: asyncio.StreamWriter) -> int:
    raw = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, user, _ = struct.unpack("iII", raw)
    return int(user)
