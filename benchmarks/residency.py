"""The residency policies side by side on one GPU: round trip, what a neighbour pays, parking.

One executor is settled on each policy in turn, over and over, so that all of them meet the same
clocks and the same neighbours. Takes some 20 s. Writes benchmarks/results/residency_h200.json; a
figure's peer is the same without an executor, or a launch and synchronisation. Needs an NVIDIA GPU;
the matrix product needs torch, without it only the probe of `auto` is the neighbour.
"""

from __future__ import annotations

import pathlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from concordia import config
from concordia.device.cuda import CudaDevice
from concordia.device.policy import POLICIES
from concordia.errors import WaitTimeout
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Completion, Task, Ticket
from concordia.testing.command import Parser, result_file, run_command
from concordia.testing.machine import add_figures
from gpu import Figures, figure, launch_and_sync, us

RESULTS: Final = pathlib.Path(__file__).parent / "results" / "residency_h200.json"
SIZE: Final = 8192  # of the neighbour's matrices
ROUNDS: Final = 15  # over all policies
TRIPS: Final = 100  # a round
PRODUCTS: Final = 12  # a round, 1.4 ms each
BUDGET_S: Final = 35.0  # then no further round is begun
SILENCE_S: Final = 0.0005  # longer than a leased executor waits for the next task
NONE: Final = "none"  # parked


class Neighbours:
    """Kernels beside the executor, and the time that one run of each takes on the GPU's clock."""

    def __init__(self, device: CudaDevice) -> None:
        self._probe = device.neighbour()
        self.runs: dict[str, Callable[[], float]] = {"probe": self._probe.time_us}
        try:
            import torch
        except ImportError:
            print("torch is not installed: no matrix product", flush=True)
            return
        a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        c = torch.empty_like(a)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def product() -> float:
            first.record()
            torch.mm(a, b, out=c)
            last.record()
            last.synchronize()
            return float(first.elapsed_time(last)) * 1000

        for _ in range(5):
            product()  # chooses and loads its kernel
        self.runs["matmul"] = product

    def close(self) -> None:
        self._probe.close()


class Bench:
    """One runtime, settled on policy after policy."""

    def __init__(self) -> None:
        self.device = CudaDevice(0)
        self.neighbours = Neighbours(self.device)
        self.runtime = Runtime(self.device)
        self.samples: dict[str, list[float]] = {}

    def note(self, key: str, values: list[float]) -> None:
        self.samples.setdefault(key, []).extend(values)

    def trip(self) -> float:
        """Seconds from a submission to its answer, seen by a thread that looks all the time."""
        started = time.perf_counter()
        ticket = self.runtime.submit(Task())
        _seen(lambda: self.runtime.result(ticket), started)
        return time.perf_counter() - started

    def round_of(self, residency: str) -> None:
        """Everything that is measured under one policy, once."""
        self.runtime.executor.settle(POLICIES[residency])
        for _ in range(5):
            self.trip()
        self.note(f"round_trip.{residency}", [self.trip() for _ in range(TRIPS)])
        self.note(f"round_trip_after_silence.{residency}", list(self._spaced(TRIPS // 4)))
        self.note(f"park.{residency}", list(self._parks(TRIPS // 4)))
        for name, run in self.neighbours.runs.items():
            self.note(f"{name}.{residency}", [run() for _ in range(PRODUCTS)])
            with self._steps():
                self.note(f"{name}_with_steps.{residency}", [run() for _ in range(PRODUCTS)])

    def round_without(self) -> None:
        """The neighbours alone."""
        with self.runtime.parked():
            for name, run in self.neighbours.runs.items():
                self.note(f"{name}.{NONE}", [run() for _ in range(PRODUCTS)])

    def _spaced(self, count: int) -> Iterator[float]:
        for _ in range(count):
            time.sleep(SILENCE_S)
            yield self.trip()

    def _parks(self, count: int) -> Iterator[float]:
        for _ in range(count):
            self.trip()
            started = time.perf_counter()
            with self.runtime.parked():
                spent = time.perf_counter() - started
            yield spent

    @contextmanager
    def _steps(self) -> Iterator[None]:
        """A task a millisecond, as a fast engine's steps would bring."""
        over = threading.Event()

        def produce() -> None:
            while not over.wait(0.001):
                self.runtime.submit(Task())

        producer = threading.Thread(target=produce)
        producer.start()
        try:
            yield
        finally:
            over.set()
            producer.join(5)
            self.runtime.drain()

    def places(self) -> Figures:
        """Tasks in a stream: a place without tasks on the GPU's clock, and one task's round trip
        with its hand-in and launch.
        """
        self.runtime.executor.settle(POLICIES["stream"])
        with self.device._context.current() as driver:
            _, stream = driver.cuStreamCreate(1)
            _, first = driver.cuEventCreate(0)
            _, last = driver.cuEventCreate(0)
        tasks = self.runtime.stream_tasks(int(stream))
        empty, trips = [], []
        for _ in range(20):
            with self.device._context.current() as driver:
                driver.cuEventRecord(first, stream)
                for _ in range(50):
                    tasks.enqueue()
                driver.cuEventRecord(last, stream)
                driver.cuEventSynchronize(last)
                empty.append(float(driver.cuEventElapsedTime(first, last)[1]) * 1000 / 50)
        for _ in range(200):
            started = time.perf_counter()
            (ticket,) = tasks.hand_in([Task()])
            tasks.enqueue()
            _seen(lambda ticket=ticket: tasks.result(ticket), started)  # type: ignore[misc]
            trips.append(time.perf_counter() - started)
        tasks.close()
        with self.device._context.current() as driver:
            driver.cuEventDestroy(first)
            driver.cuEventDestroy(last)
            driver.cuStreamDestroy(stream)
        return {"stream_place_empty": figure(empty, "us"), "stream_place_task": us(trips)}

    def close(self) -> None:
        with self.runtime.parked():
            self.neighbours.close()
        self.runtime.close()
        self.device.close()


def _seen(look: Callable[[], Completion | Ticket | None], started: float) -> None:
    while look() is None:
        if time.perf_counter() - started > config.WAIT_TASK_S:
            raise WaitTimeout(f"a task took over {config.WAIT_TASK_S} s")


def automatic(device: CudaDevice) -> Figures:
    """What `auto` adds to opening a runtime, and what it takes."""
    spent: dict[str, list[float]] = {"leased": [], "auto": []}
    taken = []
    for _ in range(4):
        for residency, found in spent.items():
            started = time.perf_counter()
            runtime = Runtime(device, residency=residency)
            found.append(time.perf_counter() - started)
            if residency == "auto":
                taken.append(runtime.stats().residency)
            runtime.close()
    leased = statistics.median(spent["leased"][1:])
    more = [(s - leased) * 1000 for s in spent["auto"][1:]]  # the first compiles the probe
    return {"auto_opens_later": {**figure(more, "ms"), "chosen": taken, "peer": {}}}


def summary(samples: dict[str, list[float]]) -> Figures:
    """Figures with the peers that were measured in the same rounds."""
    figures: Figures = {}
    for key, values in samples.items():
        name, _, residency = key.partition(".")
        is_neighbour = name.startswith(("probe", "matmul"))
        found = figure(values, "us") if is_neighbour else us(values)
        alone = samples.get(f"{name.partition('_')[0]}.{NONE}")
        if is_neighbour and alone and residency != NONE:
            found["slow_down"] = round(found["median"] / statistics.median(alone) - 1, 4)
        peer = {NONE: round(statistics.median(alone), 3)} if is_neighbour and alone else {}
        figures[f"residency_{key}"] = {**found, "peer": peer}
    return figures


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=result_file("figures"), default=RESULTS)
    options = parser.parse_args(arguments)
    until = time.monotonic() + BUDGET_S
    bench = Bench()
    try:
        for _ in range(ROUNDS):
            if time.monotonic() > until:
                break
            bench.round_without()
            for residency in POLICIES:
                bench.round_of(residency)
        figures = summary(bench.samples)
        launch = {"launch_and_sync": launch_and_sync(bench.device)["median"]}
        for name, value in bench.places().items():
            figures[f"residency_{name}"] = {**value, "peer": launch}
        for residency in POLICIES:
            figures[f"residency_round_trip.{residency}"]["peer"] = launch
        bench.runtime.executor.settle(POLICIES["leased"])
        figures |= {f"residency_{key}": value for key, value in automatic(bench.device).items()}
    finally:
        bench.close()
    for key, value in figures.items():
        more = value.get("slow_down", value.get("chosen", ""))
        print(f"{key:44} {value['median']:10.2f} {value['unit']} (p95 {value['p95']}) {more}")
    add_figures(options.output, figures)
    return 0


if __name__ == "__main__":
    run_command(main)
