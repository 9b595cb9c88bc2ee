"""Scenarios of residency: what waits beside a live executor, tasks in streams and graphs, the choice of `auto`."""

from __future__ import annotations

import logging
import pathlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from scenarios_ring import _submit, _word
from stage import JournalFile, counting, geometry

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.device.compiler import HandlerSource
from concordia.device.driver import open_device
from concordia.errors import UsageError
from concordia.journal.record import payload_hash
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task

SEGMENT = 1 << 20
REPEATS = 5
FIRST = 'extern "C" __global__ void first(unsigned long long* word) { *word = NUMBER; }\n'
COOPERATIVE = 'extern "C" __global__ void together(unsigned int* word) { if (threadIdx.x == 0) atomicAdd(word, 1u); }\n'


@contextmanager
def _busy(runtime: Runtime, task: Task) -> Iterator[None]:
    """A thread that hands in tasks all the time, so that the executor is inside whenever it may be."""
    stop, begun = threading.Event(), threading.Event()

    def produce() -> None:
        while not stop.is_set():
            tickets = [_submit(runtime, task) for _ in range(64)]
            runtime.wait(tickets[-1])
            begun.set()

    producer = threading.Thread(target=produce)
    producer.start()
    assert begun.wait(10)
    try:
        yield
    finally:
        stop.set()
        producer.join(20)


class _Calls:
    """Calls of the driver and of torch, each a few times, with the seconds that they took."""

    def __init__(self, opened: Any, around: Callable[[], AbstractContextManager[None]]) -> None:
        import torch

        self._torch, self._opened, self._around = torch, opened, around
        self.seconds: dict[str, list[float]] = {}
        self.wrong: list[str] = []

    def time(self, name: str, call: Callable[[int], None]) -> None:
        for turn in range(REPEATS):
            started = time.monotonic()
            with self._around():
                call(turn)
            self.seconds.setdefault(name, []).append(time.monotonic() - started)

    def all(self) -> None:
        torch = self._torch
        self.time("cuMemAlloc and cuMemFree", self._allocate)
        self.time("torch.empty", lambda turn: torch.empty((64 + turn) << 20, dtype=torch.uint8, device="cuda"))
        self.time("torch.cuda.empty_cache", lambda _: torch.cuda.empty_cache())
        self.time("torch.cuda.synchronize", lambda _: torch.cuda.synchronize())
        x = torch.rand(1000, device="cuda")
        x.sum().item()
        # Compiled with torch: what it compiles at its first use takes longer than what is measured.
        rare = (lambda: x.flip(0), lambda: x.roll(3), lambda: x.cumsum(0), lambda: torch.hypot(x, x), lambda: torch.fmod(x, 0.3))
        self.time("first use of a kernel of torch", lambda turn: rare[turn]().sum().item())
        self._first_use()
        self._cooperative()
        self.time("graph capture", self._capture)

    def _allocate(self, turn: int) -> None:
        with self._opened._context.current() as driver:
            status, address = driver.cuMemAlloc(1 << 20)
            if int(status) or int(driver.cuMemFree(address)[0]):
                self.wrong.append(f"cuMemAlloc {turn}: {status}")

    def _kernel(self, text: str, name: str, **numbers: int) -> bytes:
        return bytes(self._opened._compiler.kernel(HandlerSource.of(name, numbers, text=text)).cubin)

    def _first_use(self) -> None:
        """Lazily loaded: the first launch loads."""
        import ctypes

        cubins = [self._kernel(FIRST, "first.cu", NUMBER=turn + 1) for turn in range(REPEATS)]
        word = self._torch.zeros(1, dtype=self._torch.int64, device="cuda")
        value = ctypes.c_uint64(word.data_ptr())
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(value))

        def use(turn: int) -> None:
            with self._opened._context.current() as driver:
                _, library = driver.cuLibraryLoadData(cubins[turn], [], [], 0, [], [], 0)
                _, kernel = driver.cuLibraryGetKernel(library, b"first")
                _, function = driver.cuKernelGetFunction(kernel)
                (status,) = driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, 0, ctypes.addressof(arguments), 0)
                if int(status) or word.item() != turn + 1:
                    self.wrong.append(f"first use {turn}: {status}, {word.item()}")

        self.time("first use of a lazily loaded kernel", use)

    def _cooperative(self) -> None:
        """As many CTAs as the whole GPU holds, all of which must run together."""
        import ctypes

        torch = self._torch
        word = torch.zeros(1, dtype=torch.int32, device="cuda")
        value = ctypes.c_uint64(word.data_ptr())
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(value))
        cubin = self._kernel(COOPERATIVE, "together.cu")
        with self._around(), self._opened._context.current() as driver:
            _, module = driver.cuModuleLoadData(cubin)
            _, function = driver.cuModuleGetFunction(module, b"together")
            _, each = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, 512, 0)
        grid = int(each) * torch.cuda.get_device_properties(0).multi_processor_count

        def launch(turn: int) -> None:
            with self._opened._context.current() as driver:
                (status,) = driver.cuLaunchCooperativeKernel(function, grid, 1, 1, 512, 1, 1, 0, 0, ctypes.addressof(arguments))
                if int(status) or word.item() != grid * (turn + 1):
                    self.wrong.append(f"cooperative {turn}: {status}, {word.item()} of {grid * (turn + 1)}")

        self.time("cooperative launch", launch)

    def _capture(self, turn: int) -> None:
        torch = self._torch
        x = torch.zeros(4, device="cuda")
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            graph.capture_begin()
            x.add_(1)
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        for _ in range(3):
            graph.replay()
        if x.tolist() != [3.0] * 4:
            self.wrong.append(f"capture {turn}: {x.tolist()}")


def beside(device: str, residency: str) -> dict[str, Any]:
    """Seconds of calls that wait for the whole GPU, beside an executor that has work all the time. A resident one is parked around them."""
    import torch

    torch.ones(8, device=device).add_(1).sum().item()
    opened = open_device(device)
    runtime = Runtime(opened, residency=residency)
    operator = runtime.install("count", counting(1))
    task = Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=opened.allocate(8))
    calls = _Calls(opened, runtime.parked if residency == "resident" else nullcontext)
    with _busy(runtime, task):
        calls.all()
        launches = runtime.stats().launches
    runtime.drain()
    stats = runtime.stats()
    runtime.close()
    opened.close()
    return {
        "median_s": {name: statistics.median(found) for name, found in calls.seconds.items()},
        "max_s": {name: max(found) for name, found in calls.seconds.items()},
        "wrong": calls.wrong, "done": stats.done, "submitted": stats.submitted, "launches": launches, "residency": stats.residency,
    }  # fmt: skip


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


def stays(device: str) -> dict[str, Any]:
    """A resident executor is inside without work, and again after its lease; a call that nobody parked it for is late, never stuck."""
    opened = open_device(device)
    runtime = Runtime(opened, residency="resident")
    answer: dict[str, Any] = {"in_at_first": _until(lambda: runtime.stats().is_inside, 1)}
    launches = runtime.stats().launches
    time.sleep(0.2)
    answer["stayed"] = runtime.stats().is_inside and runtime.stats().launches - launches <= 1
    answer["renewed"] = _until(lambda: runtime.stats().launches > launches and runtime.stats().is_inside, 3)
    started = time.monotonic()
    with opened._context.current() as driver:  # type: ignore[attr-defined]
        driver.cuCtxSynchronize()
    answer["forgotten_s"] = time.monotonic() - started
    answer["back"] = _until(lambda: runtime.stats().is_inside, 1)
    started = time.monotonic()
    with runtime.parked():
        parked_s = time.monotonic() - started
        inside = runtime.stats().is_inside
    answer |= {"park_s": parked_s, "inside_parked": inside, "back_again": _until(lambda: runtime.stats().is_inside, 1)}
    other = Runtime(opened)  # its loads and frees park the resident one by themselves
    started = time.monotonic()
    operator = other.install("count", counting(1))
    word = opened.allocate(8)
    first = other.wait(other.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word))).result
    opened.free(word)
    other.close()
    answer |= {"other_s": time.monotonic() - started, "other_ran": first == 1}
    answer["still_works"] = runtime.wait(runtime.submit(Task())).is_ok
    runtime.close()
    opened.close()
    return answer


LEAVE = """
from stage import counting
from concordia import abi
from concordia.device.driver import open_device
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task
opened = open_device({device!r})
runtime = Runtime(opened, residency={residency!r})
operator = runtime.install("count", counting(1))
word = opened.allocate(8)
for _ in range(50):
    ticket = runtime.submit(Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word))
runtime.wait(ticket)
print("LEAVING", flush=True)
"""


def leaves(device: str, residency: str) -> dict[str, Any]:
    """An interpreter that ends with a live executor: the seconds it takes to be gone."""
    code = LEAVE.format(device=device, residency=residency)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    watchdog = threading.Timer(40, child.kill)
    watchdog.start()
    said = ""
    for line in child.stdout:
        said += line
        if line.startswith("LEAVING"):
            break
    started = time.monotonic()
    said += child.stdout.read()
    code_said = child.wait(20)
    watchdog.cancel()
    return {"seconds": time.monotonic() - started, "code": code_said, "said": said}


def graph(device: str, path: str, lanes: int) -> dict[str, Any]:
    """Appends captured into a graph: each replay appends what the work before the place wrote, before the work behind it writes over it,
    while another thread appends through the ring."""
    import torch

    shape = geometry("interleaved", layers=16, block_count=64)
    cache = [torch.zeros((shape.block_count, shape.block_bytes), dtype=torch.int8, device=device) for _ in range(shape.layers)]
    counter = torch.zeros(1, dtype=torch.int8, device=device)
    journal = JournalFile.create(pathlib.Path(path), segments=64, segment_bytes=SEGMENT)
    checkpointer = Checkpointer.open(device, journal.target(), lanes=lanes, residency="stream")
    region = checkpointer.register_kv(shape, [layer.data_ptr() for layer in cache])
    stream, side = torch.cuda.Stream(), torch.cuda.Stream()  # replayed in one, captured in the other
    tasks = checkpointer.runtime.stream_tasks(stream.cuda_stream)
    in_side = checkpointer.runtime.stream_tasks(side.cuda_stream, slots=16)
    captured, refused = torch.cuda.CUDAGraph(), ""
    with torch.cuda.graph(captured, stream=side):
        counter.add_(1)
        for layer in cache:
            layer[40].copy_(counter.expand(shape.block_bytes))
        tasks.enqueue(captured=side.cuda_stream)
        try:
            in_side.hand_in([Task()])
        except UsageError as error:
            refused = str(error)
        for layer in cache:
            layer[40].zero_()
    torch.cuda.synchronize()
    counter.zero_()
    torch.cuda.synchronize()
    stop, ring_appends = threading.Event(), [0]

    def append() -> None:
        while not stop.is_set():
            ring_appends[0] += checkpointer.wait(checkpointer.append_bytes(b"between", kind=abi.KIND_EVENT, key=1, incarnation=1)).is_ok
            time.sleep(0.0005)

    other = threading.Thread(target=append)
    other.start()
    wrong: list[str] = []
    steps: list[tuple[int, Any]] = []
    spent: list[float] = []

    def replay(step: int) -> None:
        started = time.monotonic()
        task = checkpointer.kv_task(region, kind=abi.KIND_KV_BLOCK, key=9, incarnation=step, token_start=0, token_end=shape.block_tokens, blocks=[40], step=step)
        with torch.cuda.stream(stream):
            (ticket,) = tasks.hand_in([task])
            captured.replay()
        spent.append(time.monotonic() - started)
        steps.append((step, ticket))

    for step in range(1, 31):
        replay(step)
        tasks.wait(steps[-1][1])
    for step in range(31, 61):  # without waiting for one
        replay(step)
    done = [(step, tasks.wait(ticket)) for step, ticket in steps]
    wrong += [f"step {step}: {answer}" for step, answer in done if answer.payload_hash != payload_hash(bytes([step]) * shape.raw_bytes())]
    before = counter.item()
    with torch.cuda.stream(stream):
        captured.replay()  # nothing was handed in for it
    torch.cuda.synchronize()
    idle_us = _idle_node_us(torch, tasks, stream)
    stop.set()
    other.join(20)
    pending = tasks.pending_count + in_side.pending_count
    checkpointer.close()
    records, end = journal.records()
    kept = [record for record in records if record.kind == abi.KIND_KV_BLOCK]
    if [record.step for record in kept] != list(range(1, 61)):
        wrong.append(f"records of steps {[record.step for record in kept]}")
    return {
        "wrong": wrong[:5], "refused": refused, "pending": pending, "end": end.value, "kv_records": len(kept),
        "ring_records": len(records) - len(kept), "ring_appends": ring_appends[0], "replays_more": counter.item() - before,
        "host_us_median": statistics.median(spent) * 1e6, "idle_node_us": idle_us,
    }  # fmt: skip


def _idle_node_us(torch: Any, tasks: Any, stream: Any) -> float:
    """What a place costs a stream when nothing was handed in: microseconds each of a hundred."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        first.record()
        for _ in range(100):
            tasks.enqueue()
        last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) * 10


def captured_swap(device: str, swaps: int) -> dict[str, Any]:
    """A graph captured once names an opcode: each replay runs what that means then, and no task is lost or repeated."""
    import torch

    torch.ones(8, device=device).sum().item()
    opened = open_device(device)
    runtime = Runtime(opened, residency="stream")
    word = opened.allocate(8)
    images = [opened.build(counting(version)) for version in range(1, swaps + 1)]
    operator = runtime.adopt("count", images[0])
    task = Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=word)
    stream, captured = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    tasks = runtime.stream_tasks(stream.cuda_stream)
    with torch.cuda.graph(captured, stream=stream):
        tasks.enqueue()
    results = []
    for image in images:
        runtime.adopt("count", image)
        tickets = []
        for _ in range(4):
            with torch.cuda.stream(stream):
                tickets += tasks.hand_in([task, task])
                captured.replay()
            tickets_ring = runtime.submit(task)
            results.append(("ring", runtime.wait(tickets_ring).result))
        results += [("graph", tasks.wait(ticket).result) for ticket in tickets]
    versions = [[result & 0xFFFF for where, result in results if where == which] for which in ("ring", "graph")]
    counts = sorted(result >> 16 for _, result in results)
    total = _word(opened, word)
    runtime.close()
    opened.close()
    return {"each_once": counts == list(range(len(counts))) and total == len(counts), "ring": versions[0], "graph": versions[1]}


def chosen(device: str) -> dict[str, Any]:
    """What `auto` chooses, in which time, and why."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("concordia").addHandler(handler)
    logging.getLogger("concordia").setLevel(logging.INFO)
    opened = open_device(device)
    seconds: dict[str, list[float]] = {}
    found = []
    for residency in ("leased", "auto", "leased", "auto", "auto"):
        started = time.monotonic()
        runtime = Runtime(opened, residency=residency)
        seconds.setdefault(residency, []).append(time.monotonic() - started)
        found.append(runtime.stats().residency)
        assert runtime.wait(runtime.submit(Task())).is_ok
        runtime.close()
    opened.close()
    more = min(seconds["auto"][1:]) - seconds["leased"][-1]  # what was compiled and loaded first is not part of it
    return {"chosen": found[1::2] + found[-1:], "more_s": more, "lines": [line for line in lines if line.startswith("residency")], "bound_s": config.AUTO_S}
