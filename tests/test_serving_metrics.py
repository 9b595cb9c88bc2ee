"""Counters.

Invariants: a counter never goes back, whatever engine or stream is replaced; every counter has a line before it is first raised; the page is
what Prometheus reads.
"""

from __future__ import annotations

import pathlib
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from concordia import config
from concordia.recovery.fault import Fault, FaultKind
from concordia.serving.journal_events import CAUSES
from concordia.serving.metrics import Metrics


def stats(*streams: tuple[int, int]) -> dict[str, Any]:
    rows = [
        {"stream": s, "committed_bytes": b, "dropped_records": 0, "unprotected": 0}
        for s, b in streams
    ]
    return {"streams": rows, "segments_free": 3, "segment_bytes": 10}


def test_counter_never_goes_back_when_streams_come_and_go() -> None:
    metrics = Metrics()
    seen = []
    for streams in ([(1, 100)], [(1, 250), (2, 10)], [(2, 30)], [(3, 5)], [(3, 5)], [(3, 1)]):
        metrics.journal(stats(*streams))
        seen.append(metrics.totals()["journal_bytes"])
    assert seen == [100, 260, 280, 285, 285, 286]


def test_nothing_changes_when_the_owner_does_not_answer() -> None:
    metrics = Metrics()
    metrics.journal(stats((1, 100)))
    metrics.journal({})
    metrics.journal(stats((1, 120)))
    assert metrics.totals()["journal_bytes"] == 120


def test_page_has_every_counter_when_nothing_has_happened() -> None:
    families = {f.name: f for f in text_string_to_metric_families(Metrics().page().decode())}
    for name in Metrics().totals():
        assert f"concordia_{name}" in families
    for name in ("detection_seconds", "time_to_next_token_seconds", "committed_token_lag"):
        assert f"concordia_{name}" in families


def test_events_are_counted_by_what_they_say() -> None:
    metrics = Metrics()
    metrics.event(
        {"event": "restored", "restored_tokens": 9, "recomputed_tokens": 2, "waited_ms": 500, "restore_ms": 250}
    )
    metrics.event({"event": "appended", "seconds": 1.5})
    metrics.event({"event": "appended", "seconds": 0.25, "graph_steps": 812})
    metrics.event({"event": "prefix-restored", "restored_tokens": 4, "hash_mismatches": 0})
    metrics.event({"event": "restore-failed", "restored_tokens": 9, "hash_mismatches": 3})
    metrics.event({"event": "unprotected", "reason": "the journal is full"})
    metrics.event({"event": "corruption", "reason": "x"})
    totals = metrics.totals()
    assert totals["restored_tokens"] == 9
    assert totals["recomputed_tokens"] == 2
    assert totals["prefix_restored_tokens"] == 4
    assert totals["hash_mismatches"] == 3
    assert totals["restore_seconds"] == 0.25
    assert totals["restore_wait_seconds"] == 0.5
    assert totals["append_seconds"] == 1.75
    assert totals["graph_steps"] == 812
    assert totals["corruptions"] == 1
    assert metrics.by_label("requests") == {"journal-full": 1}


def test_reasons_are_few_when_sentences_carry_numbers() -> None:
    metrics = Metrics()
    for number in range(50):
        metrics.event({"event": "unprotected", "reason": f"{number} appends are unfinished"})
        metrics.event({"event": "unprotected", "reason": f"something new: {number}"})
        metrics.event({"event": "unprotected", "reason": f"concordia.tokens must be a whole number, not {number}"})
    assert metrics.by_label("requests") == {"ring-full": 50, "other": 50, "bad-request": 50}


def test_every_cause_is_in_the_documents() -> None:
    text = (pathlib.Path(__file__).parent.parent / "docs" / "serve.md").read_text()
    assert [cause for cause in CAUSES if f"`{cause}`" not in text] == []


def test_faults_are_kept_in_order_and_bounded() -> None:
    metrics = Metrics()
    for number in range(config.FAULTS_KEPT_MAX + 10):
        metrics.fault(Fault(FaultKind.PROCESS_DEATH, number, number, "d"))
    assert len(metrics.faults) == config.FAULTS_KEPT_MAX
    assert metrics.faults[-1]["replica"] == config.FAULTS_KEPT_MAX + 9
    assert metrics.totals()["faults"] == config.FAULTS_KEPT_MAX + 10
