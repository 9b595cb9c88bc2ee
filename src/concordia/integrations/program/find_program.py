"""The file of a program by its name, floor 7.

Owns: the look along PATH. Promises: what a shell would start, or None; nothing is started. Called
by launch and native_build. The standard library's own look comes with what unpacks archives, and a
program's start waits for all that is loaded.
"""

from __future__ import annotations

import os


def find_program(name: str) -> str | None:
    """As a path, which is the name itself where that is one. An empty part of PATH is the working
    folder.
    """
    folders = (part or os.curdir for part in os.environ.get("PATH", os.defpath).split(os.pathsep))
    paths = (name,) if os.sep in name else (os.path.join(folder, name) for folder in folders)
    for path in paths:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None
