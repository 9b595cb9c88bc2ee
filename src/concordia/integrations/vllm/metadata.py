"""What the two sides of the connector tell each other through vLLM, once per step.

Owns: StepMetadata (scheduler to every worker) and WorkerReport (each worker back, added up).
Promises: plain values that pickle small; a report adds up to what the worst rank saw. Called by
both sides. Does nothing by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from concordia.integrations.vllm.load import Load
from concordia.integrations.vllm.step_writes import Write


@dataclass(slots=True)
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """One step as the workers need to know it."""

    step: int = 0
    tokens: int = 0
    writes: list[Write] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    # promised to the engine and not to be had: report them as failed
    spoiled: list[int] = field(default_factory=list)


@dataclass(slots=True)
class WorkerReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What happened in one step, and since the report before."""

    step: int = 0
    lost: dict[str, str] = field(default_factory=dict)  # request -> why its appends failed for good
    # request -> (token from which it is not saved, why): may be tried again
    missed: dict[str, tuple[int, str]] = field(default_factory=dict)
    # request -> pieces whose bytes were not as committed
    loaded: dict[str, int] = field(default_factory=dict)
    load_s: dict[str, float] = field(default_factory=dict)  # the same requests -> how long it took
    append_ns: int = 0  # that handlers of all ranks ran, restores apart
    graph_steps: int = 0  # whose appends ran in the engine's own graphs, on every rank
    # blocks that are not what was committed of them
    differing: list[int] = field(default_factory=list)
    has_rows: bool = False  # single tokens are appended as rows of their blocks, on every rank
    off: str | None = None  # why this worker protects nothing any more

    def aggregate(self, other: WorkerReport) -> WorkerReport:
        """Both reports as one."""
        missed = dict(self.missed)
        for request, found in other.missed.items():
            missed[request] = min(found, missed.get(request, found))
        loaded = dict(self.loaded)
        for request, count in other.loaded.items():
            loaded[request] = loaded.get(request, 0) + count
        load_s = dict(self.load_s)
        for request, took_s in other.load_s.items():
            load_s[request] = max(took_s, load_s.get(request, 0.0))
        return WorkerReport(
            step=min(self.step, other.step),
            lost={**other.lost, **self.lost},
            missed=missed,
            loaded=loaded,
            load_s=load_s,
            append_ns=self.append_ns + other.append_ns,
            graph_steps=min(self.graph_steps, other.graph_steps),
            differing=[*self.differing, *other.differing],
            has_rows=self.has_rows and other.has_rows,
            off=self.off or other.off,
        )
