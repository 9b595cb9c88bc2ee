"""The page by which the processes of a run are asked to pause, floor 7.

Owns: its name, its size and its making. Promises: it is this user's alone, and nobody is on it.
Called by launch, and by gate, which asks over it. The processes' side is native/gate_page.c. It
imports nothing that takes time to load, because a launcher waits for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

PAGE: Final = "gate"  # in the run folder
MAGIC: Final = 0x3130455441474E43  # "CNGATE01"
SLOT_BYTES: Final = 128
HEADER_BYTES: Final = 128
_SLOTS: Final = 256
PAGE_BYTES: Final = HEADER_BYTES + _SLOTS * SLOT_BYTES


def make_page(run: Path) -> None:
    """The page of a new run."""
    path = run / PAGE
    path.write_bytes(MAGIC.to_bytes(8, "little") + bytes(PAGE_BYTES - 8))
    path.chmod(0o600)
