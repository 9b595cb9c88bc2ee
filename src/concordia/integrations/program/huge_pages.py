"""Whether a program's copies of images should lie on huge pages, floor 7.

Owns: the answer for this machine. Promises: it reads what the system says, and nothing else; what
cannot be read is no reason against them. Called by launch, which tells the shim. What the shim does
with it is native/cache_file.c's.

Why not always: a virtual machine that reports free memory gives large free pieces back to its host,
and a huge page is such a piece. It comes back at 1 GB/s where that was measured; small pages of
what the machine has kept come at 3, and huge ones of it at 21.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_BALLOONS: Final = Path("/sys/bus/virtio/drivers/virtio_balloon")
_REPORTING: Final = 5  # VIRTIO_BALLOON_F_REPORTING; a digit for each feature, from the first


def are_huge_pages_cheap(balloons: Path = _BALLOONS) -> bool:
    """False where free memory is given back to a host."""
    try:
        found = [path.read_text() for path in balloons.glob("virtio*/features")]
    except OSError:
        return True
    return all(features[_REPORTING : _REPORTING + 1] != "1" for features in found)
