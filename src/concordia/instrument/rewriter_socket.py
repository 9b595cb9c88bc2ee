"""The socket on which programs ask a rewriter, floor 3.

Owns: its name in a run folder, and who listens. Promises: it is this user's alone, and has its name
once it takes connections; whoever holds the descriptor may hand it to one rewriter after the other,
and those who connect between two, or before the first, wait for the next within their own bounds.
When the last descriptor is closed, all who still wait are told at once. Called by the launcher and
the rewriter. It reads no request.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

from concordia.errors import EnvironmentRefused, UsageError
from concordia.socket_name import short_name

NAME: Final = "rewriter.sock"
HANDED: Final = 3  # the descriptor under which a rewriter gets it from its launcher


def listen(path: Path) -> socket.socket:
    """A listener under this name; a dead one's is replaced. Raises EnvironmentRefused."""
    begun = path.with_name(f".{path.name}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with short_name(begun) as name:
            begun.unlink(missing_ok=True)
            listener.bind(name)
        begun.chmod(0o600)
        listener.setblocking(False)
        listener.listen(socket.SOMAXCONN)
        begun.rename(path)
    except OSError as error:
        listener.close()
        raise EnvironmentRefused(
            f"no socket in {path.parent}: {error.strerror}; name another --run-dir"
        ) from None
    return listener


def handed(descriptor: int) -> socket.socket:
    """The listener that a launcher has left here; raises UsageError when there is none."""
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise UsageError(f"--listener {descriptor}: {error.strerror}; leave it out") from None
    if (
        listener.family != socket.AF_UNIX
        or listener.type != socket.SOCK_SEQPACKET
        or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        listener.detach()
        raise UsageError(f"--listener {descriptor}: nobody can connect to that; leave it out")
    listener.setblocking(False)
    listener.set_inheritable(False)
    return listener
