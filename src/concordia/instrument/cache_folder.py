"""Where rewritten images lie, floor 3.

Owns: the folder `<root>/<options key>` and the name of an image's file in it. Promises: both
folders are this user's alone; what is no key names no file. Called by cache, which writes and reads
the files, and by whoever names the folder to a program. It imports nothing that takes time to load,
because a launcher waits for it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from concordia.errors import ImageRefused
from concordia.private_folder import make_private

SUFFIX: Final = ".image"
_KEY: Final = re.compile(r"[0-9a-f]{32}")
_SHOWN_MAX: Final = 64  # characters of what is none


class CacheFolder:
    """The folder of one set of options."""

    def __init__(self, root: Path, options_key: str) -> None:
        self.root = root
        self.path = root / options_key
        for folder in (root, self.path):
            make_private(folder, "set CONCORDIA_CACHE to another")

    def file(self, key: str) -> Path:
        """Where the file of an image lies, or would; raises ImageRefused."""
        check_key(key)
        return self.path / f"{key}{SUFFIX}"


def is_key(key: str) -> bool:
    """Whether this is the key of an image, as cache makes it."""
    return _KEY.fullmatch(key) is not None


def check_key(key: str) -> None:
    """Raises ImageRefused: keys come from requests and from programs' logs, too."""
    if not is_key(key):
        raise ImageRefused(f"{key[:_SHOWN_MAX]!r} is no key of an image: 32 hexadecimal digits")
