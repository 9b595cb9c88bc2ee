"""A name for a socket in a folder, floor 1.

Owns: how a socket is called whose path is longer than an address has room for. Promises: the name
holds inside the `with` and no longer; nothing is made. Called by whoever binds or connects a socket
in a folder. native/rewriter.c does the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """A name of this socket that fits sockaddr_un (108 bytes), however long its path is. Raises
    OSError.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
