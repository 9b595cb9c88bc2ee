"""Scenarios of ring, residency, hot swap and coexistence; each runs in a child and answers plain values."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from stage import COUNTING, counting

from concordia import abi, config
from concordia.device.compiler import HandlerSource
from concordia.device.driver import Device, open_device
from concordia.errors import HandlerRefused, RingFull, WaitTimeout
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task, Ticket


def _submit(runtime: Runtime, task: Task) -> Ticket:
    """Hand in, and wait where the ring is full."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            return runtime.submit(task)
        except RingFull:
            time.sleep(0.0002)
    raise WaitTimeout("the ring stayed full for 10 s")


def _word(device: Device, address: int) -> int:
    return int.from_bytes(device.read(address, 8), "little")


def ring(device: str, lanes: int, count: int, residency: str = "leased") -> dict[str, Any]:
    """Tasks of one thread run in order, each once; a full ring is said; parked, nothing runs."""
    opened = open_device(device)
    runtime = Runtime(opened, lanes=lanes, slots=256, residency=residency)
    word = opened.allocate(8)
    operator = runtime.install("count", counting(7))
    task = Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word)
    for _ in range(3):
        runtime.wait(_submit(runtime, Task()))
    results = []
    for start in range(0, count, 128):
        tickets = [_submit(runtime, task) for _ in range(min(128, count - start))]
        results += [runtime.wait(ticket).result for ticket in tickets]
    in_order = results == [i << 16 | 7 for i in range(count)]
    bad = runtime.wait(runtime.submit(Task(opcode=999, kind=abi.TASK_COMPUTE)))
    full = False
    with runtime.parked():
        before = _word(opened, word)
        waiting = []
        try:
            for _ in range(300):
                waiting.append(runtime.submit(task))
        except RingFull:
            full = True
        pending = all(runtime.result(ticket) is None for ticket in waiting)
        parked_word = _word(opened, word)
    last = runtime.wait(waiting[-1]).result >> 16
    stats = runtime.stats()
    runtime.close()
    opened.close()
    return {
        "in_order": in_order,
        "bad_status": bad.status,
        "full": full,
        "taken": len(waiting),
        "nothing_ran_parked": pending and parked_word == before == count,
        "all_ran_after": last == count + len(waiting) - 1,
        "done": stats.done,
        "submitted": stats.submitted,
    }


def threads(device: str, lanes: int, each: int, residency: str = "leased") -> dict[str, Any]:
    """Four producers at once: none lost, none twice."""
    opened = open_device(device)
    runtime = Runtime(opened, lanes=lanes, residency=residency)
    word = opened.allocate(8)
    operator = runtime.install("count", counting(1))
    task = Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word)
    found: list[list[int]] = [[] for _ in range(4)]

    def produce(index: int) -> None:
        for at in range(each):
            ticket = _submit(runtime, task)
            found[index].append(runtime.wait(ticket).result >> 16)
            if at % 50 == index * 10:
                time.sleep(0.0005)  # long enough that the executor leaves in between

    workers = [threading.Thread(target=produce, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    everything = sorted(value for part in found for value in part)
    rising = all(part == sorted(part) for part in found)
    launches = runtime.stats().launches
    runtime.close()
    opened.close()
    return {"each_once": everything == list(range(4 * each)), "rising": rising, "launches": launches}


def lease(device: str) -> dict[str, Any]:
    """An idle executor leaves by itself; foreign calls beside a busy one end within a bound."""
    from cuda.bindings import driver

    opened = open_device(device)
    runtime = Runtime(opened)
    word = opened.allocate(8)
    operator = runtime.install("count", counting(1))
    image = opened.build(counting(2))
    task = Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word)
    runtime.wait(runtime.submit(task))
    until = time.monotonic() + 1
    while runtime.stats().is_inside and time.monotonic() < until:
        time.sleep(0.001)
    left_when_idle = not runtime.stats().is_inside
    busy = threading.Event()
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            tickets = [_submit(runtime, task) for _ in range(64)]
            busy.set()
            runtime.wait(tickets[-1])

    producer = threading.Thread(target=keep_busy)
    producer.start()
    busy.wait(5)
    context = opened._context  # type: ignore[attr-defined]
    slow: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        with context.current():
            worst, answer = 0.0, None
            for _ in range(5):
                started = time.monotonic()
                answer = call()
                worst = max(worst, time.monotonic() - started)
        slow[name] = worst
        return answer

    timed("cuCtxSynchronize", driver.cuCtxSynchronize)
    timed("cuMemAlloc+cuMemFree", lambda: driver.cuMemFree(driver.cuMemAlloc(1 << 20)[1]))
    timed("cuModuleLoadData+Unload", lambda: driver.cuModuleUnload(driver.cuModuleLoadData(image.cubin)[1]))  # type: ignore[attr-defined]
    inside = runtime.stats().is_inside
    stop.set()
    producer.join()
    done = _word(opened, word)
    runtime.drain()
    submitted = runtime.stats().submitted
    runtime.close()
    opened.close()
    return {"left_when_idle": left_when_idle, "inside_meanwhile": inside, "slow_s": slow, "done": done, "submitted": submitted}


def backlog(device: str, residency: str = "leased") -> dict[str, Any]:
    """Work for several leases, handed in at once and waited for by nobody: all of it is done all the same."""
    opened = open_device(device)
    runtime = Runtime(opened, residency=residency)
    spin = COUNTING.replace("HANDLER {", "HANDLER {\n  const uint64_t t = now_ns();\n  while (now_ns() - t < 1000000) pause_lane();\n  grid_sync(call);")
    operator = runtime.install("spin", HandlerSource.of("spin", {"VERSION": 3}, text=spin))
    word = opened.allocate(8)
    before = runtime.stats().launches
    tickets = [runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word)) for _ in range(60)]
    until = time.monotonic() + 5
    while runtime.ring.load("head") <= tickets[-1] and time.monotonic() < until:
        time.sleep(0.002)
    launches = runtime.stats().launches - before
    done = _word(opened, word)
    runtime.close()
    opened.close()
    return {"done": done, "launches": launches}


def hang(device: str) -> dict[str, Any]:
    """A handler that takes two seconds: waiting and parking say so at their bound, and all goes on after it."""
    opened = open_device(device)
    runtime = Runtime(opened)
    text = COUNTING.replace("HANDLER {", "HANDLER {\n  const uint64_t t = now_ns();\n  while (now_ns() - t < 2000000000) pause_lane();\n  grid_sync(call);")
    operator = runtime.install("hang", HandlerSource.of("hang", {"VERSION": 3}, text=text))
    word = opened.allocate(8)
    ticket = runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word))
    said = []
    for name, call in (("wait", lambda: runtime.wait(ticket, 0.2)), ("park", lambda: runtime.parked().__enter__())):
        try:
            call()
            said.append(f"{name} did not say anything")
        except WaitTimeout as error:
            said.append(f"{name}: {error}")
    after = runtime.wait(ticket, 5).result
    again = runtime.wait(runtime.submit(Task())).status
    runtime.close()
    opened.close()
    return {"said": said, "after": after, "again": again}


def swap(device: str, swaps: int, residency: str = "leased") -> dict[str, Any]:
    """Hot swaps while two threads hand in tasks: none lost, none twice, versions only rise."""
    opened = open_device(device)
    runtime = Runtime(opened, residency=residency)
    word = opened.allocate(8)
    images = [opened.build(counting(version)) for version in range(1, swaps + 1)]
    operator = runtime.adopt("count", images[0])
    task = Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word)
    stop = threading.Event()
    found: list[list[tuple[int, int]]] = [[], []]

    def produce(index: int) -> None:
        while not stop.is_set():
            tickets = [_submit(runtime, task) for _ in range(16)]
            found[index] += [(t, runtime.wait(t).result) for t in tickets]

    workers = [threading.Thread(target=produce, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    pauses = []
    for image in images[1:]:
        started = time.monotonic()
        runtime.adopt("count", image)
        pauses.append(time.monotonic() - started)
        time.sleep(0.002)
    time.sleep(0.01)
    stop.set()
    for worker in workers:
        worker.join()
    everything = sorted(pair for part in found for pair in part)
    counts = [result >> 16 for _, result in everything]
    versions = [result & 0xFFFF for _, result in everything]
    runtime.close()
    opened.close()
    return {
        "each_once": counts == list(range(len(counts))),
        "versions_rise": versions == sorted(versions),
        "versions_seen": len(set(versions)),
        "tasks": len(counts),
        "pause_ms_max": max(pauses) * 1e3,
    }


def refused_swap(device: str) -> dict[str, Any]:
    """A refused handler changes nothing."""
    opened = open_device(device)
    runtime = Runtime(opened)
    word = opened.allocate(8)
    operator = runtime.install("count", counting(1))
    task = Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word)
    runtime.wait(runtime.submit(task))
    bad = COUNTING.replace("HANDLER {", 'HANDLER {\n  asm volatile("bar.sync 4;");')
    said = ""
    try:
        runtime.install("count", HandlerSource.of("bad", {"VERSION": 2}, text=bad))
    except HandlerRefused as error:
        said = str(error)
    result = runtime.wait(runtime.submit(task)).result
    runtime.close()
    opened.close()
    return {"said": said, "result": result}


DEEP = """#include "call.h"
HANDLER {
  volatile uint64_t value[40];
#pragma unroll 1
  for (int i = 0; i < 40; ++i) value[i] = lane * 1000003 + i * call->task.arg;
#pragma unroll 1
  for (int round = 0; round < 4; ++round)
#pragma unroll 1
    for (int i = 0; i < 40; ++i) value[i] = value[(i * 7 + value[i] % 40) % 40] * 31 + i;
  uint64_t sum = 0;
#pragma unroll 1
  for (int i = 0; i < 40; ++i) sum += value[i];
  reinterpret_cast<uint64_t*>(call->task.source)[lane] = sum;
}
"""


def deep(device: str, lanes: int) -> dict[str, Any]:
    """A handler that uses the stack and the registers that the ballast promised: every lane's sum is right."""
    import numpy as np

    opened = open_device(device)
    runtime = Runtime(opened, lanes=lanes)
    operator = runtime.install("deep", HandlerSource.of("deep", text=DEEP))
    width = 512 * lanes
    out = opened.allocate(8 * width)
    wrong = 0
    for arg in (3, 12345):
        runtime.wait(runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=arg, source=out)))
        value = np.arange(width, dtype=np.uint64)[:, None] * np.uint64(1000003) + np.arange(40, dtype=np.uint64) * np.uint64(arg)
        rows = np.arange(width)
        for _ in range(4):
            for i in range(40):
                picked = (np.uint64(i * 7) + value[:, i] % np.uint64(40)) % np.uint64(40)
                value[:, i] = value[rows, picked.astype(np.int64)] * np.uint64(31) + np.uint64(i)
        expected = value.sum(axis=1, dtype=np.uint64)
        found = np.frombuffer(opened.read(out, 8 * width), np.uint64)
        wrong += int((found != expected).sum())
    runtime.close()
    opened.close()
    return {"wrong": wrong}


def leftovers(device: str, residency: str = "leased") -> dict[str, Any]:
    """Opening and closing gives all device memory back."""
    from cuda.bindings import driver

    free = []
    for _ in range(6):
        opened = open_device(device)
        runtime = Runtime(opened, residency=residency)
        runtime.install("count", counting(1))
        runtime.wait(runtime.submit(Task()))
        runtime.close()
        opened.free(opened.allocate(1 << 20))
        opened.close()
        keep = open_device(device)
        with keep._context.current():  # type: ignore[attr-defined]
            free.append(int(driver.cuMemGetInfo()[1]))
        keep.close()
    return {"free": free, "idle_ns": config.IDLE_NS}
