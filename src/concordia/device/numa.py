"""Which memory node of the machine pages lie on, floor 2.

Owns: the nodes as sysfs names them, the wish where pages of a mapping shall come to lie, and the
look at where they do. Promises: a wish (`place`) says whether it was taken; a check (`check_node`)
is made of a sample of pages as they lie now, and its error says how many lie elsewhere. Called by
the journal, and by whoever has registered a mapping with a device: registering pins pages, and
pages of movable memory, such as CXL memory often is, are moved to another node by that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from concordia import config
from concordia.errors import EnvironmentRefused

_SYS: Final = Path("/sys")
# system calls of x86-64, which Board.create insists on; the C library has no wrappers for them
_MBIND: Final = 237
_MOVE_PAGES: Final = 279
_PREFERRED: Final = 1  # elsewhere once the node is full
_BIND: Final = 2  # there or not at all
_PAGE: Final = 4096


def find_nodes(sys: Path = _SYS) -> tuple[int, ...]:
    """Nodes that have memory; empty where the kernel does not say."""
    try:
        text = (sys / "devices/system/node/has_memory").read_text().strip()
    except OSError:
        return ()
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def find_pci_node(bus_id: str, sys: Path = _SYS) -> int | None:
    """The node that a device such as "00000000:1B:00.0" hangs on; None where that is not known."""
    named = re.fullmatch(r"(?:([0-9a-fA-F]+):)?([0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7])", bus_id)
    if named is None:
        return None
    domain = int(named[1] or "0", 16)
    return _read_node(sys / f"bus/pci/devices/{domain:04x}:{named[2].lower()}/numa_node")


def find_device_node(path: Path, sys: Path = _SYS) -> int | None:
    """The node of the memory behind a devdax device; None for anything else."""
    state = path.stat()
    if not stat.S_ISCHR(state.st_mode):
        return None
    device = sys / f"dev/char/{os.major(state.st_rdev)}:{os.minor(state.st_rdev)}"
    target = _read_node(device / "target_node")  # of the memory; numa_node is what it is near to
    return _read_node(device / "numa_node") if target is None else target


def device_bytes(path: Path, sys: Path = _SYS) -> int | None:
    """The size of a devdax device, which its file does not have."""
    state = path.stat()
    try:
        name = f"dev/char/{os.major(state.st_rdev)}:{os.minor(state.st_rdev)}/size"
        return int((sys / name).read_text())
    except (OSError, ValueError):
        return None


def place(address: int, size: int, node: int, *, is_bound: bool) -> bool:
    """Wish that pages of this mapping which are not there yet come to lie on `node`, for all who
    map the file; False where that is not allowed. With `is_bound` there or not at all.
    """
    words = node // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    mask[node // 64] = 1 << node % 64
    policy = _BIND if is_bound else _PREFERRED
    done: int = _libc().syscall(
        _MBIND,
        ctypes.c_void_p(address),
        ctypes.c_size_t(size),
        policy,
        mask,
        ctypes.c_ulong(64 * words + 1),  # the kernel looks at one bit less
        0,
    )
    return done == 0


def find_page_nodes(addresses: Sequence[int]) -> list[int]:
    """The node of the page at each address, or a negative errno (no page there, a device's own);
    raises EnvironmentRefused where the kernel does not tell.
    """
    pages = np.array(addresses, np.uint64)
    found = np.full(len(pages), -errno.ENOENT, np.int32)
    done: int = _libc().syscall(
        _MOVE_PAGES,
        0,  # this process
        ctypes.c_ulong(len(pages)),
        ctypes.c_void_p(pages.ctypes.data),
        None,  # to nowhere: only ask
        ctypes.c_void_p(found.ctypes.data),
        0,
    )
    if done != 0:
        reason = os.strerror(ctypes.get_errno())
        raise EnvironmentRefused(f"the kernel does not tell where pages lie (move_pages: {reason})")
    return [int(node) for node in found]


def check_node(address: int, size: int, node: int) -> None:
    """Raise EnvironmentRefused unless this populated mapping lies on `node`.

    Pages of a devdax device itself have no node of the kernel's, and never move: they pass.
    """
    step = max(_PAGE, size // config.PAGES_SAMPLED // _PAGE * _PAGE)
    places = range(address, address + size, step)
    nodes = Counter(n for n in find_page_nodes(places) if n != -errno.ENOENT)
    astray = nodes.total() - nodes[node]
    if astray:
        where = ", ".join(f"{count} on node {other}" for other, count in sorted(nodes.items()))
        raise EnvironmentRefused(
            f"{astray} of {len(places)} sampled pages of the journal do not lie on node {node} "
            f"({where}): they were allocated elsewhere, or moved when they were registered. Use a "
            "devdax device in devdax mode, or memory that is online as online_kernel"
        )


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _read_node(path: Path) -> int | None:
    try:
        node = int(path.read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # -1: the firmware does not say
