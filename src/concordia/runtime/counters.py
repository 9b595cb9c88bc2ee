"""What a runtime has done since it was opened, floor 3.

Owns: `RuntimeStats`. Promises: reading takes no lock and waits for nobody, so numbers of one
reading may be some tasks apart. Called by executor.py, for metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

from concordia.device.driver import Executor
from concordia.runtime.ring import Ring


@dataclass(frozen=True, slots=True)
class RuntimeStats:
    """Counters of one runtime since it was opened."""

    submitted: int
    done: int
    busy_ns: int
    appended_bytes: int
    heartbeat: int
    launches: int
    generation: int
    is_inside: bool
    rescues: int
    residency: str

    @staticmethod
    def read(ring: Ring, executor: Executor) -> RuntimeStats:
        """As they are now."""
        load = ring.load
        return RuntimeStats(
            submitted=load("tail"),
            done=load("done_count"),
            busy_ns=load("busy_ns"),
            appended_bytes=load("appended_bytes"),
            heartbeat=load("heartbeat"),
            launches=load("launched"),
            generation=load("generation"),
            is_inside=load("left") != load("launched"),
            rescues=executor.rescues(),
            residency=executor.residency,
        )
