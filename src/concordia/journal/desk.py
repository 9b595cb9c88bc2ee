"""The socket at which the owner answers, floor 3.

Owns: connections, framing and bounds: one JSON object per line each way. Promises: only this user
is served (SO_PEERCRED); a line longer than the bound ends its connection; one slow reader holds up
nobody; no pickle. Called by the owner's loop through a selector. It does not know what the requests
mean: `answer` does.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from concordia import config, errors
from concordia.errors import ConcordiaError, JournalError
from concordia.socket_name import short_name

_PEER: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_CHUNK: Final = 1 << 18
_PEERS_MAX: Final = 1024  # engines, ranks, routers and tools of one user


class Peer:
    """One connection."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.incoming = bytearray()
        self.outgoing = bytearray()


class Desk:
    """Listens, reads lines, writes answers."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        path: Path,
        answer: Callable[[Peer, str, dict[str, Any]], Any],
    ) -> None:
        self.peers: set[Peer] = set()
        self._selector = selector
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with short_name(path) as name:
            path.unlink(missing_ok=True)
            self._listener.bind(name)
        path.chmod(0o600)
        self._listener.listen(128)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Say no more to anybody."""
        for peer in list(self.peers):
            self._flush(peer)
            self._drop(peer)
        self._selector.unregister(self._listener)
        self._listener.close()

    def _accept(self, _mask: int) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid, uid, _ = _PEER.unpack(raw)
        if uid != os.getuid() or len(self.peers) >= _PEERS_MAX:
            connection.close()
            return
        connection.setblocking(False)
        peer = Peer(connection, pid)
        self.peers.add(peer)
        self._watch(peer, selectors.EVENT_READ)

    def _watch(self, peer: Peer, events: int) -> None:
        def ready(mask: int) -> None:
            if mask & selectors.EVENT_WRITE:
                self._flush(peer)
            if mask & selectors.EVENT_READ and peer in self.peers:
                self._read(peer)

        try:
            self._selector.modify(peer.connection, events, ready)
        except KeyError:
            self._selector.register(peer.connection, events, ready)

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.connection.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(peer)
            return
        peer.incoming += data
        while (end := peer.incoming.find(b"\n")) >= 0:
            line = bytes(peer.incoming[:end])
            del peer.incoming[: end + 1]
            peer.outgoing += self._reply(peer, line)
        if len(peer.incoming) > config.SOCKET_MESSAGE_BYTES_MAX:
            self._drop(peer)
            return
        self._flush(peer)

    def _reply(self, peer: Peer, line: bytes) -> bytes:
        number = None
        try:
            message = json.loads(line)
            number, operation, arguments = message["id"], message["op"], message["args"]
            answer: dict[str, Any] = {"id": number, "ok": self._answer(peer, operation, arguments)}
        except ConcordiaError as error:
            answer = {"id": number, "error": type(error).__name__, "message": str(error)}
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # it was not a request
            answer = {"id": number, "error": "JournalError", "message": f"bad request: {error!r}"}
        packed = json.dumps(answer, separators=(",", ":")).encode()
        if len(packed) > config.SOCKET_MESSAGE_BYTES_MAX:
            answer = {
                "id": number,
                "error": "JournalError",
                "message": f"the answer has {len(packed)} bytes, and at most "
                f"{config.SOCKET_MESSAGE_BYTES_MAX} are sent: ask for less",
            }
            packed = json.dumps(answer).encode()
        return packed + b"\n"

    def _flush(self, peer: Peer) -> None:
        try:
            while peer.outgoing:
                del peer.outgoing[: peer.connection.send(peer.outgoing)]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(peer)
            return
        events = selectors.EVENT_READ
        if peer.outgoing:  # read no further requests from one who does not take the answers
            events = selectors.EVENT_WRITE
        self._watch(peer, events)

    def _drop(self, peer: Peer) -> None:
        if peer in self.peers:
            self.peers.remove(peer)
            self._selector.unregister(peer.connection)
            peer.connection.close()


class Line:
    """The other end: one connection to an owner, blocking, with a bound on every wait."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        self._number = 0
        self._incoming = bytearray()
        try:
            with short_name(path) as name:
                self._socket.connect(name)
        except OSError:
            self._socket.close()
            raise

    def ask(self, operation: str, arguments: dict[str, Any]) -> Any:
        """One request; raises OSError when the line breaks, or the error that the owner names."""
        self._number += 1
        request = {"id": self._number, "op": operation, "args": arguments}
        self._socket.sendall(json.dumps(request, separators=(",", ":")).encode() + b"\n")
        while True:
            answer = json.loads(self._receive())
            if answer["id"] == self._number:
                break
        if "error" in answer:
            kind = getattr(errors, answer["error"], JournalError)
            raise kind(answer["message"])
        return answer["ok"]

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _receive(self) -> bytes:
        at = 0
        while (end := self._incoming.find(b"\n", at)) < 0:
            at = len(self._incoming)
            data = self._socket.recv(_CHUNK)
            if not data:
                raise ConnectionResetError("the owner hung up")
            self._incoming += data
            if len(self._incoming) > config.SOCKET_MESSAGE_BYTES_MAX + _CHUNK:
                raise ConnectionResetError("the owner's answer is too long")
        line = bytes(self._incoming[:end])
        del self._incoming[: end + 1]
        return line
