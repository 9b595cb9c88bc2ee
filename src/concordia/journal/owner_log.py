"""What an owner says of itself, floor 3.

Owns: the log in the journal's folder. Promises: it is this user's alone and ends with the folder;
before `log_to` lines go where the owner's starter sees them. Called by the owner and its estate.
Events for a router are another matter (events.py).
"""

from __future__ import annotations

import os
import sys
import time

from concordia.journal.folder import Folder


def log_to(home: Folder) -> None:
    """Diagnostic lines go into the journal's folder, and end with it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(home.log, flags, 0o600)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def say(text: str) -> None:
    """One line, with the time and who says it."""
    print(
        f"{time.strftime('%Y-%m-%dT%H:%M:%S')} owner {os.getpid()}: {text}",
        file=sys.stderr,
        flush=True,
    )
