"""What the parts of device_runtime.py measure on: one GPU, one stream of the journal, figures.

Owns: what is opened once for all parts, and the figures found. Promises: everything is given back
by `close`; each figure is printed when it is found. Called by device_runtime.py.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import Any, Final

from figures import Figures
from lent_stream import Stream
from loops import Loops

from concordia.device.cuda import CudaDevice
from concordia.runtime.executor import Runtime

STAY_NS: Final = 2_000_000  # of silence, for what is measured beside the executor's coming in


def stay(runtime: Runtime) -> None:
    """Keep the executor in for a while after a task: its coming in is not what is measured."""
    runtime.ring.store("idle_ns", STAY_NS)


class Bench:
    """One device; the stream is made when it is first asked for."""

    def __init__(self) -> None:
        self.device = CudaDevice(0)
        self.loops = Loops()
        self.figures: Figures = {}
        self._started = time.monotonic()

    @functools.cached_property
    def stream(self) -> Stream:
        """3 GiB of /dev/shm."""
        return Stream()

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self._started:5.1f} s] {text}", file=sys.stderr, flush=True)

    def report(self, key: str, value: dict[str, Any], *, peer: dict[str, float]) -> None:
        """Keep one figure with the medians of its peers."""
        self.figures[key] = {**value, "peer": {name: round(m, 4) for name, m in peer.items()}}
        print(
            f"{key:28} {value['median']:12.4f} {value['unit']:6} (min {value['min']}, p95 "
            f"{value['p95']}) {self.figures[key]['peer']}",
            flush=True,
        )

    def close(self) -> None:
        self.device.close()  # first: it has the stream's memory registered
        if "stream" in self.__dict__:
            self.stream.close()
