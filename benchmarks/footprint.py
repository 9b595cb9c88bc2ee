"""GPU memory that protection takes, as a share of what is protected.

Owns: protection_bytes (a KV cache of 12 GiB) and protection_bytes_pages (256 MiB of pages, found by
hash). Promises: it is what the driver has less of, with code and what loading it took; what only
the first executor of a process takes is in the first figure. Run before all other parts. Called by
device_runtime.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

from bench import Bench
from delta import PAGE_BYTES, REGION_BYTES
from figures import figure
from transfer import SMALL_PIECES

from concordia.checkpoint.checkpointer import Checkpointer
from concordia.device.cuda_call import checked
from concordia.runtime.ring import Task

KV_BYTES: Final = 12 << 30


def footprint(bench: Bench) -> None:
    """Both figures, of one writer each."""
    bench.say("GPU memory of protection")
    blocks = KV_BYTES // SMALL_PIECES.raw_bytes()
    shape = dataclasses.replace(SMALL_PIECES, block_count=blocks)
    layers = [bench.device.allocate(blocks * shape.stride) for _ in range(shape.layers)]
    _report(bench, "protection_bytes", KV_BYTES, lambda c: c.register_kv(shape, layers))
    for layer in layers:
        bench.device.free(layer)
    base = bench.device.allocate(REGION_BYTES)
    words = {"size": REGION_BYTES, "page_bytes": PAGE_BYTES}
    name = "protection_bytes_pages"
    _report(bench, name, REGION_BYTES, lambda c: c.register_pages(base, **words))
    bench.device.free(base)


def _report(
    bench: Bench, key: str, protected: int, register: Callable[[Checkpointer], Any]
) -> None:
    stream = bench.stream
    stream.restart()
    free, held = _free_bytes(bench), sum(bench.device._memory._allocated.values())
    checkpointer = Checkpointer(bench.device, stream.target(), lanes=1)
    register(checkpointer)
    checkpointer.wait(checkpointer.runtime.submit(Task()))
    taken = free - _free_bytes(bench)
    allocated = sum(bench.device._memory._allocated.values()) - held
    checkpointer.close()
    value = figure([taken / protected], "ratio", digits=5)
    sizes = {"bytes": taken, "bytes_allocated": allocated, "protected_bytes": protected}
    bench.report(key, {**value, **sizes}, peer={})


def _free_bytes(bench: Bench) -> int:
    with bench.device._context.current() as driver:
        free, _ = checked(driver.cuMemGetInfo(), "ask for free memory")
    return int(free)
