"""What Prometheus and `concordia status` are told.

Owns: every metric with prefix concordia_ and the list of faults seen. Promises: a counter never
goes back, also when an engine, whose own counts end with it, is replaced; counting costs no lock
per token. Called by the router and the server. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from concordia import config
from concordia.recovery.fault import Fault
from concordia.serving.journal_events import cause_of
from concordia.serving.need import Level

_HELP: Final = {
    "requests": "requests by protection; reason says why one is not protected",
    "levels": "answers that were resumed, by the level they reached",
    "faults": "faults noticed, by kind",
    "restored_tokens": "tokens whose state came back from the journal",
    "prefix_restored_tokens": "tokens of new requests whose state came back from the journal",
    "prefixes_missed": (
        "prefixes of new requests that the journal was known to have and could not give in time"
    ),
    "recomputed_tokens": "tokens of resumed answers that were computed again",
    "uncommitted_tokens": (
        "tokens of resumed answers that the journal did not have yet, the last one apart"
    ),
    "stepped_back_tokens": (
        "tokens generated once more, and compared, so that a client's cohort goes on in one step"
    ),
    "hash_mismatches": "restored bytes that differed from what was committed",
    "journal_bytes": "payload bytes committed to the journal",
    "dropped_records": "records lost for want of a segment",
    "append_seconds": (
        "time that executors of engines spent in handlers, restores apart; told every ten seconds"
    ),
    "graph_steps": (
        "steps whose appends ran in the engine's own graphs (--residency stream); told likewise"
    ),
    "corruptions": "records found damaged that no crash explains",
    "restore_seconds": "time that resumed requests took to be looked up, verified and loaded",
    "restore_wait_seconds": (
        "time from a resumed request's coming to its first step, with the wait for its cohort"
    ),
    "engine_unprotected": "requests that lost protection in an engine",
    "tokens": "tokens sent to clients",
    "failovers": "failovers completed",
    "recovery_seconds": (
        "time of failovers and, in engines, of the restores of their cohorts, by what it went to"
    ),
}
_LABELS: Final = {
    "requests": ("protection", "reason"),
    "levels": ("level",),
    "faults": ("kind",),
    "recovery_seconds": ("where", "phase"),
}


class Metrics:
    """Plain counts, turned into Prometheus families when asked."""

    def __init__(self) -> None:
        self.faults: list[dict[str, Any]] = []
        self.recoveries: list[dict[str, Any]] = []  # of whole failovers, and of cohorts in engines
        self.committed_lag = 0  # tokens, of the request that lags most
        self.journal_free = 0
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self._counts: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in _HELP}
        self._last: dict[tuple[str, str], float] = {}
        self.registry = CollectorRegistry()
        self.detection = Histogram(
            "concordia_detection_seconds",
            "from the last sign of life of a failed replica's streams to the fault being noticed",
            registry=self.registry,
            buckets=config.RECOVERY_BUCKETS_S,
        )
        self.next_token = Histogram(
            "concordia_time_to_next_token_seconds",
            "from the fault being noticed to the next token of an interrupted answer",
            registry=self.registry,
            buckets=config.RECOVERY_BUCKETS_S,
        )
        self.registry.register(self)
        self.gauge(
            "committed_token_lag",
            "tokens sent of the running request of which the journal lacks most",
            lambda: self.committed_lag,
        )
        self.gauge(
            "journal_free_bytes",
            "segments of the journal that nobody holds",
            lambda: self.journal_free,
        )

    def count(self, name: str, value: float = 1, *labels: str) -> None:
        """Raise a counter."""
        counts = self._counts[name]
        counts[labels] = counts.get(labels, 0) + value

    def protected(self, limit: str) -> None:
        """A request that outlives its replica; `limit` names what of it cannot be restored, if
        anything.
        """
        self.count("requests", 1, "protected", limit)

    def unprotected(self, reason: str) -> None:
        self.count("requests", 1, "unprotected", reason)

    def level(self, level: Level) -> None:
        self.count("levels", 1, level.label)

    def fault(self, fault: Fault) -> None:
        """Note a fault; kept in order for `concordia status`."""
        self.count("faults", 1, fault.kind.value)
        self.faults.append(
            {
                "kind": fault.kind.value,
                "replica": fault.replica,
                "detected_ns": fault.detected_ns,
                "detail": fault.detail,
            }
        )
        del self.faults[: -config.FAULTS_KEPT_MAX]

    def recovery(self, fault: Fault, phases: Mapping[str, float], count: int) -> None:
        """Where the time of a failover went."""
        facts = {"failed": fault.replica, "detected_ns": fault.detected_ns, "answers": count}
        self._note_recovery("server", phases, facts)

    def silence(self, seconds: float) -> None:
        self.detection.observe(max(0.0, seconds))

    def resumed(self, seconds: float) -> None:
        self.next_token.observe(max(0.0, seconds))

    def event(self, event: Mapping[str, Any]) -> None:
        """Count an event of the journal."""
        name = event.get("event")
        if name == "restored":
            self.count("restored_tokens", int(event.get("restored_tokens", 0)))
            self.count("recomputed_tokens", int(event.get("recomputed_tokens", 0)))
            self.count("restore_seconds", float(event.get("restore_ms", 0.0)) / 1e3)
            self.count("restore_wait_seconds", float(event.get("waited_ms", 0.0)) / 1e3)
        elif name == "cohort-restored":
            facts = {key: value for key, value in event.items() if key != "phases"}
            self._note_recovery("engine", event.get("phases", {}), facts)
        elif name == "prefix-restored":
            self.count("prefix_restored_tokens", int(event.get("restored_tokens", 0)))
        elif name == "prefix-missed":
            self.count("prefixes_missed")
        elif name == "appended":
            self.count("append_seconds", float(event.get("seconds", 0.0)))
            self.count("graph_steps", int(event.get("graph_steps", 0)))
        elif name == "unprotected":
            self.unprotected(cause_of(str(event.get("reason", ""))))
        elif name == "corruption":
            self.count("corruptions")
        self.count("hash_mismatches", int(event.get("hash_mismatches", 0)))

    def _note_recovery(
        self, where: str, phases: Mapping[str, float], facts: Mapping[str, Any]
    ) -> None:
        for phase, seconds in phases.items():
            self.count("recovery_seconds", float(seconds), where, phase)
        self.recoveries.append({**facts, "where": where, "phases": dict(phases)})
        del self.recoveries[: -config.FAULTS_KEPT_MAX]

    def journal(self, stats: Mapping[str, Any]) -> None:
        """Take over what the owner and its streams have counted."""
        for stream in stats.get("streams", ()):
            source = str(stream["stream"])
            self.follow("journal_bytes", source, stream["committed_bytes"])
            self.follow("dropped_records", source, stream["dropped_records"])
            self.follow("engine_unprotected", source, stream["unprotected"])
        self.journal_free = int(stats.get("segments_free", 0)) * int(stats.get("segment_bytes", 0))

    def follow(self, name: str, source: str, value: float) -> None:
        """Add what a counter of somebody else has grown since the last look; a smaller value is a
        new counter.
        """
        last = self._last.get((name, source), 0.0)
        self._last[name, source] = value
        self.count(name, value - last if value >= last else value)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """A value that is read when asked."""
        self.gauges[name] = (help_text, read)

    def totals(self) -> dict[str, float]:
        """Counters without their labels, for `concordia status`."""
        return {name: sum(counts.values()) for name, counts in self._counts.items()}

    def by_label(self, name: str) -> Mapping[str, float]:
        """One counter by its last label."""
        return {labels[-1]: value for labels, value in self._counts[name].items()}

    def collect(self) -> Iterator[Metric]:
        """Prometheus' collector interface."""
        for name, counts in self._counts.items():
            labels = _LABELS.get(name, ())
            family = CounterMetricFamily(f"concordia_{name}", _HELP[name], labels=labels)
            for values, value in counts.items() or [(("",) * len(labels), 0.0)]:
                family.add_metric(values, value)
            yield family
        for name, (help_text, read) in self.gauges.items():
            yield GaugeMetricFamily(f"concordia_{name}", help_text, value=read())

    def page(self) -> bytes:
        """The text that /metrics answers."""
        return bytes(generate_latest(self.registry))
