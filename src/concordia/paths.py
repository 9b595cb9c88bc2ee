"""Where things lie for one user, floor 1.

Owns: the folders that are used unless one is named. Promises: all of them are private to that user
once they are made; nothing is made, or looked for, here. Called from everywhere above.
"""

from __future__ import annotations

import os
import pathlib
import sys
from typing import NamedTuple


class Paths(NamedTuple):
    """The journal, and what is kept of compiled and rewritten code."""

    journal: pathlib.Path
    kernel_cache: pathlib.Path
    image_cache: pathlib.Path

    @staticmethod
    def default() -> Paths:
        """Journal on /dev/shm, compiled kernels in the user's cache folder."""
        cache = os.environ.get("CONCORDIA_CACHE") or os.environ.get("XDG_CACHE_HOME")
        root = pathlib.Path(cache) if cache else pathlib.Path.home() / ".cache"
        return Paths(
            journal=pathlib.Path("/dev/shm") / f"concordia-{os.getuid()}",
            kernel_cache=root / "concordia" / f"kernels-{sys.implementation.cache_tag}",
            image_cache=root / "concordia" / "images",
        )


def default_base() -> pathlib.Path:
    """Where servers and runs of this user have their folders. Short: Unix sockets have names of
    at most 107 bytes.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return pathlib.Path(runtime) / "concordia"
    return pathlib.Path(f"/tmp/concordia-{os.getuid()}")
