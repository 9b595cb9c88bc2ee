"""Where the pool of a journal lies: on which file system or device, on which memory nodes, floor 3.

Owns: `Place`. Promises: `node` is a promise, kept or refused with a reason, by the owner when the
pool is made and by every writer once it has registered it; `near` is a wish: each of these nodes
gets an equal share of the segments, best effort, and writers that say where their device hangs are
lent the near ones; on a machine of one node wishes do nothing, and `put` says so. Called by owner
and spawn. It does not decide how large a pool is, nor look at pages after they were made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from concordia.device import numa
from concordia.errors import EnvironmentRefused, JournalRefused

_HUGETLBFS: Final = "hugetlbfs"
_HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages")


@dataclass(frozen=True, slots=True)
class Place:
    """As the owner is told; `pool` is a devdax device, or a file to be made elsewhere."""

    pool: Path | None = None
    node: int | None = None
    near: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.pool is not None:  # the owner has another working folder
            object.__setattr__(self, "pool", self.pool.absolute())

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Place:
        """Out of the owner's settings. A device promises the node of its memory by itself."""
        pool = Path(settings["pool"]) if settings["pool"] else None
        node = settings["node"]
        if node is None and pool is not None and pool.exists():
            node = numa.find_device_node(pool)
        return Place(pool, node, tuple(settings["near"]))

    def to_settings(self) -> dict[str, Any]:
        """The inverse, as JSON."""
        return {"pool": str(self.pool) if self.pool else None, "node": self.node, "near": self.near}

    def check_pool(self, link: Path) -> None:
        """Raise JournalRefused unless the pool can be made there. What `link` names already, the
        owner before us made: that is adopted or removed.
        """
        pool = self.pool
        if pool is None or (link.is_symlink() and link.readlink() == pool):
            return
        if pool.is_char_device():
            if numa.device_bytes(pool) is None:
                raise JournalRefused(f"{pool} is no devdax device: name another --journal-pool")
        elif os.path.lexists(pool):
            raise JournalRefused(
                f"{pool} is there already, and is left as it is: --journal-pool names a devdax "
                "device, or a file that is yet to be made"
            )
        elif not pool.parent.is_dir():
            raise JournalRefused(f"there is no folder {pool.parent} for the file of --journal-pool")

    def folder(self, home: Path) -> Path:
        """Where the pool of the journal in `home` takes its room."""
        return home if self.pool is None else self.pool.parent

    def own_bytes(self) -> int | None:
        """What there is for nobody else: a device, or huge pages that were set aside; None for a
        file in the memory that all share.
        """
        if self.pool is None:
            return None
        if self.pool.is_char_device():
            return numa.device_bytes(self.pool)
        if _file_system(self.pool.parent) != _HUGETLBFS:
            return None
        page_bytes = os.statvfs(self.pool.parent).f_bsize
        free = _HUGE_PAGES / f"hugepages-{page_bytes >> 10}kB/free_hugepages"
        return page_bytes * int(free.read_text())

    def put(self, address: int, size: int, *, unit: int) -> str:
        """Before its pages are there: wish, or insist, where those of this pool of segments of
        `unit` bytes come to lie; what was done, in words. Raises EnvironmentRefused where a promise
        cannot be made.
        """
        nodes = numa.find_nodes()
        wanted = self.near if self.node is None else (self.node,)
        if self.node is not None and self.node not in nodes:
            raise EnvironmentRefused(f"there is no memory on node {self.node}, only on {nodes}")
        if not wanted or len(nodes) < 2:
            return "this machine has one memory node" if len(nodes) < 2 else "nobody said where"
        share = -(-size // unit // len(wanted)) * unit
        for index, node in enumerate(wanted):
            start, end = index * share, min(size, (index + 1) * share)
            must = self.node is not None
            if start < end and not numa.place(address + start, end - start, node, is_bound=must):
                said = f"the kernel refused node {node} (mbind): give it CAP_SYS_NICE"
                if must:
                    raise EnvironmentRefused(said)
                return said
        return f"segments are shared out to nodes {wanted}"

    def check(self, address: int, size: int) -> None:
        """After its pages are there: raise JournalRefused where the promise is not kept."""
        if self.node is not None:
            try:
                numa.check_node(address, size, self.node)
            except EnvironmentRefused as error:
                raise JournalRefused(str(error)) from error


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on, "" where that is not said."""
    found, longest = "", -1
    wanted = folder.resolve()
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split(" ")
        if wanted.is_relative_to(place) and len(place) >= longest:
            found, longest = kind, len(place)
    return found
