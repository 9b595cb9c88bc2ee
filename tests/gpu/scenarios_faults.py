"""Scenarios of faults: illegal addresses, impossible tasks, hangs, a watchdog that ends the process; each runs in a child.

What was committed before a fault is told in lines "ACK n" or in the answer; the tests read the journal that is left. `device` is "host"
where the CPU device can be given the same fault.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

from scenarios_kv import SEGMENT, _pattern
from stage import JournalFile, counting, geometry, place

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import Region
from concordia.device.compiler import KERNELS, HandlerSource
from concordia.device.driver import Device
from concordia.device.memory import Buffer
from concordia.errors import ConcordiaError, WaitTimeout
from concordia.runtime.ring import Task, Ticket

BAD_ADDRESS = 1 << 46  # nobody has anything there, on either side
HANG_NS = 100_000_000_000  # what hangs here ends by itself, should everything else fail
LOOK_S = 0.5  # long against a task, short against the test

# What a framework may do beside us. Both kernels take words.
FOREIGN = """#include "portable.h"
extern "C" __global__ void poke(uint64_t at) { *reinterpret_cast<volatile uint64_t*>(at) = 1; }
extern "C" __global__ void spin(uint64_t stop, uint64_t most_ns) {
  const uint64_t started = now_ns();
  if (threadIdx.x == 0)
    while (load<kRelaxed, kSystem>(reinterpret_cast<const uint64_t*>(stop)) == 0 && now_ns() - started < most_ns)
      for (int i = 0; i < 20; ++i) pause_lane();
  __syncthreads();
}
"""
HANGING = """#include "call.h"
HANDLER {
  const uint64_t started = now_ns();
  if (lane == 0)
    while (load<kAcquire, kSystem>(reinterpret_cast<const uint64_t*>(call->task.arg)) == 0 && now_ns() - started < HANG_NS)
      yield_lane();
  grid_sync(call);
}
"""


class Foreign:
    """Kernels of somebody else in this context, in a stream of their own."""

    def __init__(self, device: Any) -> None:
        from concordia.device.cuda import CudaCompiler
        from concordia.device.cuda_call import checked

        self._context = device._context
        image = CudaCompiler(self._context.architecture()).kernel(HandlerSource.of("foreign.cu", text=FOREIGN))
        with self._context.current() as driver:
            module = checked(driver.cuModuleLoadData(image.cubin), "load foreign kernels")
            self._functions = {
                name: checked(driver.cuModuleGetFunction(module, name.encode()), f"find {name}") for name in ("poke", "spin")
            }
            self.stream = int(checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "create a stream"))
            name = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
            self.multiprocessors = int(checked(driver.cuDeviceGetAttribute(name, self._context.device), "count multiprocessors"))

    def launch(self, name: str, *words: int, ctas: int = 1, threads: int = 1) -> None:
        from concordia.device.cuda_call import checked

        values = (ctypes.c_uint64 * len(words))(*words)
        at = ctypes.addressof(values)
        arguments = (ctypes.c_void_p * len(words))(*(at + 8 * i for i in range(len(words))))
        with self._context.current() as driver:
            launched = driver.cuLaunchKernel(
                self._functions[name], ctas, 1, 1, threads, 1, 1, 0, self.stream, ctypes.addressof(arguments), 0
            )
            checked(launched, f"launch {name}")


class StopWord:
    """A word that host and device see; 0 holds what waits for it."""

    def __init__(self, device: Device) -> None:
        self._buffer = Buffer(4096)
        self.address = device.share(self._buffer.address, self._buffer.size)
        self._word = ctypes.c_uint64.from_address(self._buffer.address)

    def hold(self) -> None:
        self._word.value = 0

    def release(self) -> None:
        self._word.value = 1


def _begin(device: str, path: str, **changes: Any) -> tuple[Checkpointer, Region]:
    """A cache with the pattern 0, of which nothing is committed yet."""
    shape = geometry("flash", **changes)
    journal = JournalFile.create(pathlib.Path(path), segments=60, segment_bytes=SEGMENT)
    checkpointer = Checkpointer.open(device, journal.target())
    return checkpointer, checkpointer.register_kv(shape, place(checkpointer.device, _pattern(shape, 0)))


def _append(checkpointer: Checkpointer, region: Region, block: int, *, key: int = 0) -> Ticket:
    size = region.geometry.block_tokens
    return checkpointer.append_kv(
        region, kind=abi.KIND_KV_BLOCK, key=key, incarnation=1, token_start=block * size, token_end=(block + 1) * size, blocks=[block], step=0
    )


def _commit(checkpointer: Checkpointer, region: Region) -> int:
    """Every block, one after the other, each told when it is acknowledged."""
    count = region.geometry.block_count
    for block in range(count):
        assert checkpointer.wait(_append(checkpointer, region, block)).is_ok
        print(f"ACK {block + 1}", flush=True)
    return count


def _said(call: Callable[[], Any]) -> str:
    """What a call raised of ours, "" when it returned."""
    try:
        call()
    except ConcordiaError as error:
        return str(error)
    return ""


def _until_refused(checkpointer: Checkpointer) -> str:
    """A lost context shows at the next submission or wait, or at one soon after. Empty tasks: nothing more may be committed."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        said = _said(lambda: checkpointer.wait(checkpointer.runtime.submit(Task()), 1.0))
        if said and "not done after" not in said:
            return said
    return ""


def framework_fault(device: str, path: str, how: str) -> dict[str, Any]:
    """The framework's own kernel loses the context: whoever calls us hears why, and closing ends."""
    if how == "assert":
        import torch

        torch.ones(8, device=device).sum().item()
    checkpointer, region = _begin(device, path)
    foreign = Foreign(checkpointer.device)
    kept = _commit(checkpointer, region)
    if how == "assert":
        torch.zeros(4, device=device)[torch.tensor([1 << 30], device=device)]
    else:
        foreign.launch("poke", BAD_ADDRESS)
    said = _until_refused(checkpointer)
    started = time.monotonic()
    again = _said(lambda: checkpointer.append_bytes(b"x", kind=abi.KIND_REQUEST, key=1, incarnation=1))
    closing = _said(checkpointer.close)
    return {"kept": kept, "said": said, "again": again, "closing": closing, "closing_s": time.monotonic() - started}


def handler_fault(device: str, path: str) -> dict[str, Any]:
    """An append handler that passes lint and self-test, and stores to a bad address when it meets one request."""
    checkpointer, region = _begin(device, path)
    text = (KERNELS / "kv_append.cu").read_text("utf-8")
    faulting = "HANDLER {\n  if (call->task.key[0] == 0xbad) *reinterpret_cast<volatile uint64_t*>(BAD_ADDRESS) = lane;\n"
    assert text.count("HANDLER {\n") == 1
    constants = region.geometry.constants() | {"BAD_ADDRESS": BAD_ADDRESS}
    checkpointer.replace_append(region, HandlerSource.of("kv_append.cu", constants, text=text.replace("HANDLER {\n", faulting)))
    kept = _commit(checkpointer, region)
    behind = [_append(checkpointer, region, 0, key=0xBAD), *(_append(checkpointer, region, block) for block in range(3))]
    waited = [_said(lambda ticket=ticket: checkpointer.wait(ticket)) for ticket in behind]
    return {"kept": kept, "waited": waited, "said": _until_refused(checkpointer), "closing": _said(checkpointer.close)}


def bad_tasks(device: str, path: str, lanes: int) -> dict[str, Any]:
    """Whatever address, number or length a task names: an answer, no fault, nothing written; the next task is served."""
    shape = geometry("flash")
    journal = JournalFile.create(pathlib.Path(path), segments=60, segment_bytes=SEGMENT)
    checkpointer = Checkpointer.open(device, journal.target(), lanes=lanes)
    region = checkpointer.register_kv(shape, place(checkpointer.device, _pattern(shape, 0)))
    pages = checkpointer.register_pages(checkpointer.device.allocate(16 * 4096), size=16 * 4096, page_bytes=4096)
    runtime, target, size = checkpointer.runtime, journal.target(), shape.raw_bytes()
    pool, arena = target.pool_address, runtime.ring.load("arena")
    arena_end = arena + runtime.ring.load("arena_bytes")
    whole = {"kind": abi.KIND_KV_BLOCK, "token_start": 0, "token_end": shape.block_tokens, "blocks": [0]}

    def apply(address: int, length: int = size, **changes: Any) -> Ticket:
        return checkpointer.apply_kv(region, payload_address=address, payload_bytes=length, payload_hash=0, **(whole | changes))

    def append(**changes: Any) -> Ticket:
        return checkpointer.append_kv(region, key=1, incarnation=1, step=1, **(whole | changes))

    def append_from(source: int, length: int) -> Ticket:
        return runtime.submit(Task(opcode=checkpointer._bytes.opcode, kind=abi.TASK_APPEND, record_kind=abi.KIND_REQUEST, source=source, source_bytes=length))

    attempts: dict[str, Callable[[], Ticket]] = {
        **{f"opcode {n}": lambda n=n: runtime.submit(Task(opcode=n, kind=abi.TASK_COMPUTE)) for n in (0, 999, 1024, (1 << 32) - 1)},
        **{f"apply from {at:#x}": lambda at=at: apply(at) for at in (0, 16, BAD_ADDRESS, pool - 16, pool + 8, pool + target.pool_bytes - 16, arena_end - 16, (1 << 64) - 16)},
        **{f"apply of {n}": lambda n=n: apply(pool, n) for n in (0, size - 1, size + 16, 1 << 63)},
        **{f"block {n}": lambda n=n: append(blocks=[n]) for n in (shape.block_count, 1 << 31, (1 << 32) - 1)},
        **{f"hash of block {n}": lambda n=n: checkpointer.hash_kv(region, **(whole | {"blocks": [n]})) for n in (shape.block_count, (1 << 32) - 1)},
        **{f"tokens {a}..{b}": lambda a=a, b=b: append(token_start=a, token_end=b) for a, b in ((5, 5), (6, 5), (0, 17), (0, (1 << 32) - 1))},
        "no such kind": lambda: append(kind=abi.KIND_EVENT),
        **{f"{n} bytes at {at:#x}": lambda at=at, n=n: append_from(at, n) for at, n in ((0, 16), (BAD_ADDRESS, 16), (arena - 16, 16), (arena + 8, 16), (arena_end, 16), (arena, 1 << 63), (arena_end - 16, 32))},
        **{f"page {n}": lambda n=n: checkpointer.append_pages(pages, [n]) for n in (16, 1 << 31, (1 << 32) - 1)},
        **{f"pages {a}+{n}": lambda a=a, n=n: checkpointer.scan_pages(pages, first=a, count=n, is_burst=False) for a, n in ((0, 17), (16, 1), (3, 0))},
    }  # fmt: skip
    taken, broken = [], []
    for name, attempt in attempts.items():
        if checkpointer.wait(attempt()).status != abi.STATUS_BAD_TASK:
            taken.append(name)
        if not checkpointer.wait(_append(checkpointer, region, 1)).is_ok:
            broken.append(name)
    records, end = journal.records()
    checkpointer.close()
    return {"attempts": len(attempts), "taken": taken, "broken": broken, "records": len(records), "end": end.value}


def framework_hang(device: str, path: str) -> dict[str, Any]:
    """A kernel of the framework that does not end: beside us, before us in order, and on every multiprocessor."""
    checkpointer, region = _begin(device, path)
    foreign, stop = Foreign(checkpointer.device), StopWord(checkpointer.device)
    everywhere = {"ctas": 2 * foreign.multiprocessors, "threads": 1024}
    said: dict[str, str] = {}
    statuses, enqueue_s = [], []
    for how in ("beside", "before", "everywhere"):
        stop.hold()
        foreign.launch("spin", stop.address, HANG_NS, **(everywhere if how == "everywhere" else {}))
        time.sleep(0.05)  # it runs
        started = time.monotonic()
        if how == "before":
            checkpointer.order_after(foreign.stream)
        tickets = [_append(checkpointer, region, block) for block in range(4)]
        enqueue_s.append(time.monotonic() - started)
        said[how] = _said(lambda tickets=tickets: checkpointer.wait(tickets[-1], LOOK_S))
        stop.release()
        statuses += [checkpointer.wait(ticket).status for ticket in tickets]
    kept = _commit(checkpointer, region)
    checkpointer.close()
    return {"said": said, "statuses": statuses, "enqueue_s": enqueue_s, "kept": kept + 12}


def handler_hang(device: str, path: str) -> dict[str, Any]:
    """A handler that does not end: each call that would wait for it says so at its bound; afterwards all goes on."""
    checkpointer, region = _begin(device, path)
    runtime, stop = checkpointer.runtime, StopWord(checkpointer.device)
    operator = runtime.install("hang", HandlerSource.of("hang", {"HANG_NS": HANG_NS}, text=HANGING))
    image = checkpointer.device.build(counting(3))
    ticket = runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=stop.address))
    started = time.monotonic()
    behind = [_append(checkpointer, region, block) for block in range(4)]
    enqueue_s = time.monotonic() - started
    said = {
        "wait": _said(lambda: checkpointer.wait(ticket, LOOK_S)),
        "behind": _said(lambda: checkpointer.wait(behind[-1], LOOK_S)),
        "park": _said(lambda: runtime.parked().__enter__()),
        "swap": _said(lambda: runtime.adopt("count", image)),
        "drain": _said(lambda: runtime.drain(LOOK_S)),
    }
    said_s = time.monotonic() - started
    stop.release()
    statuses = [checkpointer.wait(each).status for each in (ticket, *behind)]
    word = checkpointer.device.allocate(8)
    again = runtime.adopt("count", image)
    result = runtime.wait(runtime.submit(Task(opcode=again.opcode, kind=abi.TASK_COMPUTE, arg=word))).result
    kept = _commit(checkpointer, region)
    checkpointer.close()
    return {"said": said, "said_s": said_s, "enqueue_s": enqueue_s, "statuses": statuses, "result": result, "kept": kept + 4}


def watchdog(device: str, path: str, who: str) -> None:
    """Something hangs for good: the bounded wait says who waits for what, and the process ends itself, executor included."""
    checkpointer, region = _begin(device, path)
    stop = StopWord(checkpointer.device)
    operator = checkpointer.runtime.install("hang", HandlerSource.of("hang", {"HANG_NS": HANG_NS}, text=HANGING))
    foreign = Foreign(checkpointer.device) if who == "framework" else None
    _commit(checkpointer, region)
    if foreign is not None:
        foreign.launch("spin", stop.address, HANG_NS, ctas=2 * foreign.multiprocessors, threads=1024)
        time.sleep(0.05)
    else:
        checkpointer.runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=stop.address))
    try:
        checkpointer.wait(_append(checkpointer, region, 0), LOOK_S)
    except WaitTimeout as error:
        print(f"WATCHDOG {error}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
