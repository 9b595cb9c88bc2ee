"""A rewriter for tests of the shim: it answers as it is told, and what it "rewrites" is the image with a known slot in it."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from concordia.instrument.cache import ImageCache
from concordia.instrument.report import KernelReport, Rewritten, Slot, SlotKind
from concordia.instrument.request import (
    REQUEST_BYTES,
    Request,
    Status,
    check_memory,
    pack_reply,
)
from concordia.socket_name import short_name

TAIL = b"\n// hooked: 0x0000000000000000\n"


def hooked(image: bytes) -> Rewritten:
    """The image with the address of the control block behind it, as text."""
    offset = len(image) + TAIL.index(b"0x") + 2
    return Rewritten(image + TAIL, (Slot(offset, SlotKind.TEXT),), (KernelReport("add", 5, 40, ""),), is_changed=True)


class StandInRewriter:
    """Serves in a thread until closed; `behaviour` is ready, refused, later, silent, garbage or hang_up."""

    def __init__(self, run: Path, cache: ImageCache, behaviour: str = "ready") -> None:
        self.behaviour = behaviour
        self.requests: list[Request] = []
        self.images: list[bytes] = []
        self._cache = cache
        self._kept: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with short_name(run / "rewriter.sock") as name:
            self._listener.bind(name)
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        for kept in self._kept:
            kept.close()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:
                return
            line.settimeout(10)
            data, descriptors, _, _ = socket.recv_fds(line, REQUEST_BYTES, 1)
            request = Request.parse(data)
            check_memory(descriptors[0], request.image_bytes)
            with open(descriptors[0], "rb") as file:
                file.seek(0)
                image = file.read()
            self.requests.append(request)
            self.images.append(image)
            self._answer(line, request, image)

    def _answer(self, line: socket.socket, request: Request, image: bytes) -> None:
        if self.behaviour == "ready":
            self._cache.store(request.key, hooked(image))
        statuses = {"ready": Status.READY, "refused": Status.REFUSED, "later": Status.LATER, "lie": Status.READY}
        try:
            if self.behaviour in statuses:
                line.send(pack_reply(statuses[self.behaviour]))
            elif self.behaviour == "garbage":
                line.send(b"nonsense")
        except OSError:  # who only looks does not wait for the answer
            pass
        if self.behaviour == "silent":
            self._kept.append(line)
        else:
            line.close()
