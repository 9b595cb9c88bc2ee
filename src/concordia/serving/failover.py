"""The record of one failover, floor 6.

Owns: who failed, who took the place, and how long each step took. Promises: `done` is set once,
with either a replacement or an error. Filled by the replica set; read by the router through it and
by `concordia status`. It does nothing by itself.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from concordia.errors import ConcordiaError
from concordia.recovery.fault import Fault
from concordia.serving.replica import Replica


@dataclass(slots=True)
class Failover:
    """One replica's replacement; times are seconds since the fault was noticed."""

    failed: Replica
    fault: Fault
    replacement: Replica | None = None
    error: ConcordiaError | None = None
    sealed_s: float | None = None
    struck_s: float | None = None
    fenced_s: float | None = None
    replaced_s: float | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def passed_s(self) -> float:
        return (time.monotonic_ns() - self.fault.detected_ns) / 1e9

    def times(self) -> dict[str, float]:
        """Those that are known by now, in the order of what waits for them."""
        found = {"sealed": self.sealed_s, "struck": self.struck_s, "replaced": self.replaced_s}
        return {name: seconds for name, seconds in found.items() if seconds is not None}

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.fault.kind.value,
            "failed": self.failed.name,
            "replacement": self.replacement.name if self.replacement else None,
            "detected_ns": self.fault.detected_ns,
            "sealed_ms": _ms(self.sealed_s),
            "struck_ms": _ms(self.struck_s),
            "fenced_ms": _ms(self.fenced_s),
            "replaced_ms": _ms(self.replaced_s),
            "error": str(self.error) if self.error else None,
        }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)
