"""Whether what a journal holds stays in memory, floor 3.

Owns: the look at swap and at what may be locked, and the owner's lock on the pool. Promises: best
effort and never an error; what it says is said of this machine as it is now. Core dumps are kept
out by every mapping itself (device/memory). Called by the owner once, and by the doctor. It does
not lock the memory of engines or of the router.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Final

from concordia.device.memory import Mapping

_CAP_IPC_LOCK: Final = 1 << 14  # of linux/capability.h: without a limit


def lock(mapping: Mapping) -> bool:
    """Lock the pool, with all that this process may lock; whether it is locked."""
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    except (OSError, ValueError):
        pass  # then the limit is what it was
    return mapping.lock()


def has_swap() -> bool:
    """Whether this machine has somewhere to swap to; True when it does not say."""
    try:
        lines = Path("/proc/swaps").read_text(encoding="ascii").splitlines()
    except OSError:
        return True
    return len(lines) > 1  # the first names the columns


def lockable_bytes() -> int | None:
    """What a process of this user may lock, None for no limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY or _capabilities() & _CAP_IPC_LOCK:
        return None
    return hard


def _capabilities() -> int:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    except (OSError, ValueError):
        pass
    return 0
