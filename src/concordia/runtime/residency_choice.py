"""Which residency costs least here, measured, floor 3.

Owns: what `auto` measures and how it weighs it. Promises: it takes AUTO_S at most beside the time
to load one probe; it says what it found, and why it chose, in one line; without a reason to choose
another it takes the default. Called by executor.py while nothing is installed yet. Does not know
what the policies do.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from concordia import config
from concordia.device.driver import Device, Executor, Neighbour
from concordia.device.policy import DEFAULT, POLICIES
from concordia.errors import WaitTimeout
from concordia.runtime.ring import Ring, Task

logger = logging.getLogger(__name__)

TRIPS_MAX: Final = 40
TRIPS_MIN: Final = 5
PROBES: Final = 5
# between two trips: an engine's tasks come in steps, and find the executor as its policy left it
SILENCE_S: Final = 0.0001


@dataclass(frozen=True, slots=True)
class Cost:
    """What a residency costs: the answer of one task, in microseconds, and what part more a kernel
    takes that wants the whole device.
    """

    residency: str
    round_trip_us: float
    slow_down: float

    @property
    def step_us(self) -> float:
        """Of a step of AUTO_STEP_US: its tasks' trip, and what its kernels lose meanwhile."""
        lost = self.slow_down if self.slow_down > config.AUTO_NOISE else 0.0
        return self.round_trip_us + lost * config.AUTO_STEP_US

    def __str__(self) -> str:
        return (
            f"{self.residency} {self.step_us:.1f} us a step (round trip {self.round_trip_us:.1f} "
            f"us, a full neighbour {100 * self.slow_down:+.1f} %)"
        )


def pick(costs: Sequence[Cost]) -> Cost:
    """The cheapest, if it is cheaper than the default by AUTO_GAIN_MIN."""
    default = next(cost for cost in costs if cost.residency == DEFAULT)
    best = min(costs, key=lambda cost: cost.step_us)
    return best if best.step_us < (1 - config.AUTO_GAIN_MIN) * default.step_us else default


def choose(device: Device, ring: Ring, executor: Executor) -> None:
    """Measure every residency of this device with this executor, and settle it on the best."""
    neighbour = device.neighbour()
    if neighbour is None or len(device.residencies) == 1:
        logger.info("residency %s: %s has no other", executor.residency, device.name)
        return
    costs = []
    try:
        with_none = _alone(executor, neighbour)
        until = time.monotonic()
        for name in device.residencies:
            until += config.AUTO_S / len(device.residencies)
            executor.settle(POLICIES[name])
            trip = _round_trip_us(ring, executor, until)
            beside = min(neighbour.time_us() for _ in range(PROBES))
            costs.append(Cost(name, trip, beside / with_none - 1))
    finally:
        executor.settle(POLICIES[DEFAULT])
        with device.parked():
            neighbour.close()
    best = pick(costs)
    executor.settle(POLICIES[best.residency])
    logger.info("residency %s: %s", best.residency, "; ".join(map(str, costs)))


def _alone(executor: Executor, neighbour: Neighbour) -> float:
    if not executor.park(config.WAIT_PARK_S):
        raise WaitTimeout(f"the executor did not leave within {config.WAIT_PARK_S} s")
    try:
        return min(neighbour.time_us() for _ in range(PROBES))
    finally:
        executor.unpark()


def _round_trip_us(ring: Ring, executor: Executor, until: float) -> float:
    """Median from the submission of an empty task to its answer, after a silence each."""
    found: list[float] = []
    while len(found) < TRIPS_MAX and (len(found) < TRIPS_MIN or time.monotonic() < until):
        time.sleep(SILENCE_S)
        started = time.perf_counter()
        ticket, needs_launch = ring.submit(Task(), executor.handle)
        if needs_launch:
            executor.launch()
        while ring.result(ticket) is None:
            if time.perf_counter() - started > config.WAIT_PARK_S:
                raise WaitTimeout(f"an empty task took over {config.WAIT_PARK_S} s")
        found.append((time.perf_counter() - started) * 1e6)
    return statistics.median(found)
