"""How an image is handed to the rewriter, floor 3.

Owns: request and reply, as the shim writes and reads them, and the look at the memory that comes
along. Promises: what was accepted is of one version, has a size within the bound, and its bytes can
no longer change: the memory is sealed. Called by the rewriter, and by whoever asks one from Python.
It reads no image.

One message each way, on a SOCK_SEQPACKET socket, the image beside the first in a sealed memory file
by SCM_RIGHTS ("CNAS" instead for a text that an assembler gets):
    request   "CNRQ" | u32 version | u64 bytes | u64 key, high | u64 low
    reply     "CNRP" | u32 status
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from concordia import config
from concordia.errors import ImageRefused, WaitTimeout
from concordia.instrument.cache import image_key, key_halves
from concordia.socket_name import short_name

VERSION: Final = 3
_REQUEST: Final = struct.Struct("<4sIQQQ")
_REPLY: Final = struct.Struct("<4sI")
_MAGIC: Final = b"CNRQ"
_MAGIC_ASSEMBLER: Final = b"CNAS"
REQUEST_BYTES: Final = _REQUEST.size
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Status(enum.IntEnum):
    """What a rewriter says of an image."""

    READY = 0  # its file is in the cache
    REFUSED = 1  # there will be none in this run
    LATER = 2  # it is still at work: the next start finds the file


@dataclass(frozen=True, slots=True)
class Request:
    """An image, by its key. Where it came from is not said: it decides nothing of the result."""

    image_bytes: int
    key: str
    is_for_assembler: bool = False

    def pack(self) -> bytes:
        """The message."""
        magic = _MAGIC_ASSEMBLER if self.is_for_assembler else _MAGIC
        return _REQUEST.pack(magic, VERSION, self.image_bytes, *key_halves(self.key))

    @classmethod
    def parse(cls, data: bytes) -> Request:
        """What a message says; raises ImageRefused."""
        if len(data) != REQUEST_BYTES:
            raise ImageRefused(f"a request of {len(data)} bytes")
        magic, version, image_bytes, low, high = _REQUEST.unpack(data)
        if magic not in (_MAGIC, _MAGIC_ASSEMBLER) or version != VERSION:
            raise ImageRefused(f"no request of version {VERSION}: {data[:8]!r}")
        if not 0 < image_bytes <= config.IMAGE_BYTES_MAX:
            raise ImageRefused(f"an image of {image_bytes} bytes")
        return cls(image_bytes, f"{low:016x}{high:016x}", magic == _MAGIC_ASSEMBLER)


def pack_reply(status: Status) -> bytes:
    """The message that a rewriter answers with."""
    return _REPLY.pack(b"CNRP", status)


def parse_reply(data: bytes) -> Status:
    """What a rewriter said; raises ImageRefused."""
    try:
        magic, status = _REPLY.unpack(data)
        if magic == b"CNRP":
            return Status(status)
    except (struct.error, ValueError):
        pass
    raise ImageRefused(f"no reply: {data[:16]!r}")


def check_memory(descriptor: int, image_bytes: int) -> None:
    """Raises ImageRefused unless this is memory of that size that nobody can change any more."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        about = os.fstat(descriptor)
    except OSError as error:
        raise ImageRefused(f"the image is no sealed memory: {error}") from None
    if seals & _SEALS != _SEALS or not stat.S_ISREG(about.st_mode):
        raise ImageRefused(f"the image can still change: seals {seals:#x}, wanted {_SEALS:#x}")
    if about.st_size != image_bytes:
        raise ImageRefused(f"an image of {about.st_size} bytes, said to have {image_bytes}")


def ask(
    path: Path,
    image: bytes,
    *,
    is_for_assembler: bool = False,
    timeout_s: float,
) -> Status:
    """Hand an image to the rewriter at this socket, as the shim does. Raises OSError, ImageRefused
    or WaitTimeout.
    """
    request = Request(len(image), image_key(image), is_for_assembler)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
        sealed_memory(image) as memory,
    ):
        connection.settimeout(timeout_s)
        try:
            with short_name(path) as name:
                connection.connect(name)
            socket.send_fds(connection, [request.pack()], [memory])
            return parse_reply(connection.recv(_REPLY.size + 1))
        except TimeoutError:
            raise WaitTimeout(f"no answer of the rewriter at {path} in {timeout_s} s") from None


@contextlib.contextmanager
def sealed_memory(image: bytes) -> Iterator[int]:
    """A memory file with these bytes that can no longer change."""
    memory = os.memfd_create("concordia-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(memory), "wb") as file:
            file.write(image)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
        yield memory
    finally:
        os.close(memory)
