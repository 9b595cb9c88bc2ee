"""What an executor is given, floor 3: memory, and the words that name it.

Owns: the sizes of an executor's scratch. Promises: what was taken is given back through the
caller's ExitStack, also when something after it fails. Called by executor.py.
"""

from __future__ import annotations

from contextlib import ExitStack

from concordia import abi, config
from concordia.device.driver import Device, ExecutorPlan
from concordia.device.memory import JournalTarget
from concordia.runtime.ring import Ring


def plan_executor(
    device: Device, ring: Ring, target: JournalTarget | None, lanes: int, undo: ExitStack
) -> ExecutorPlan:
    """Scratch for one payload: staged bytes, and what hashing them needs; `undo` gives it back."""
    segment = target.segment_bytes if target else config.SEGMENT_BYTES
    leaves = -(-segment // abi.LEAF_BYTES)
    stage = min(leaves * abi.LEAF_BYTES, device.stage_bytes)
    digest_bytes = max(leaves * 16, config.SCAN_PAGES * abi.ROOT_BYTES_MIN) + abi.ROOT_BYTES_MIN

    def share(address: int, size: int) -> int:
        found = device.share(address, size)
        undo.callback(device.unshare, address)
        return found

    def allocate(size: int) -> int:
        address = device.allocate(size)
        undo.callback(device.free, address)
        return address

    return ExecutorPlan(
        ring=ring.device_address,
        pool=share(target.pool_address, target.pool_bytes) if target else 0,
        pool_bytes=target.pool_bytes if target else 0,
        segment_bytes=segment,
        control=share(target.control_address, abi.STREAM_CONTROL.size) if target else 0,
        stage=allocate(stage),
        stage_bytes=stage,
        # as many as the executor takes for its stage: kernels/host.cpp, id_capacity
        ids=allocate(stage // abi.LEAF_BYTES * abi.IDS_PER_LEAF * 4),
        digests=allocate(digest_bytes),
        digest_bytes=digest_bytes,
        lanes=lanes,
    )
