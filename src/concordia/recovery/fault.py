"""What a fault is, floor 5.

Owns: the kinds of fault and the record of one. Promises: a fault is a frozen value that names its
replica, the moment it was noticed and what was seen; it says nothing about what to do. Made by the
detector, the router and the replica set; read by everyone above.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class FaultKind(enum.Enum):
    """How a replica, or a part of it, stopped doing its work. The value is the label that metrics
    and logs carry.
    """

    PROCESS_DEATH = "process-death"
    PROCESS_STOPPED = "process-stopped"
    STEP_OVERDUE = "step-overdue"
    STEP_SPINNING = "step-spinning"
    UNSCHEDULED = "unscheduled"
    API_SILENT = "api-silent"
    API_UNHEALTHY = "api-unhealthy"
    ENGINE_ERROR = "engine-error"
    START_FAILED = "start-failed"
    OWNER_DEATH = "owner-death"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of one replica (its incarnation; 0 for the journal owner), noticed at `detected_ns`
    (CLOCK_MONOTONIC).
    """

    kind: FaultKind
    replica: int
    detected_ns: int
    detail: str
    pid: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.detail}"
