"""serving/recorder.py, journal_events.py: what the router writes to the journal and reads from it.

Invariants: ids are written once, in order, joined where they follow each other; an event counts once even when a new owner tells it again;
a journal that is full or gone costs no token; in the mode that asks for it no token leaves before what it depends on is committed, within
a bound.
"""

from __future__ import annotations

import array
import asyncio
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from asking import ask, completion, engines, events, joined, run, until
from concordia import abi, config
from concordia.errors import JournalError, RingFull
from concordia.journal.record import request_key
from concordia.serving.journal_events import JournalEvents, describe_loss, read_outcome
from concordia.serving.need import Level
from concordia.serving.recorder import Recorder
from concordia.serving.router import RouterSettings
from fake_engine import Failure, served


@dataclass
class FakeJournal:
    """An owner that says what the test lets it say."""

    said: list[dict[str, Any]] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    committed_tokens: int = 0
    is_gone: bool = False
    repeats: bool = False  # as after an owner's restart

    def committed(self, key: int) -> int:
        self._check()
        return self.committed_tokens

    def committed_all(self, keys: Sequence[int]) -> list[int]:
        self._check()
        return [self.committed_tokens for _ in keys]

    def finish(self, key: int) -> None:
        self._check()
        self.finished.append(key)

    def events(self, after: int = 0) -> tuple[int, list[dict[str, Any]]]:
        self._check()
        found = self.said if self.repeats else self.said[after:]
        return len(self.said), [dict(event) for event in found]

    def stats(self) -> dict[str, Any]:
        self._check()
        return {"segments_free": 2, "segment_bytes": 100, "streams": []}

    def _check(self) -> None:
        if self.is_gone:
            raise JournalError("nobody answers")


@dataclass
class FakeAppender:
    records: list[dict[str, Any]] = field(default_factory=list)
    is_full: bool = False

    def append_bytes(self, payload: bytes, **facts: Any) -> None:
        if self.is_full:
            raise RingFull("full")
        self.records.append({"payload": payload, **facts})

    def of(self, kind: int) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def restored(request: str, incarnation: int, number: int, **facts: Any) -> dict[str, Any]:
    return {
        "event": "restored",
        "request": request,
        "incarnation": incarnation,
        "record": f"1:{number}",
        "level": "state-exact",
        "restored_tokens": 5,
        "recomputed_tokens": 1,
        "hash_mismatches": 0,
        **facts,
    }


def test_ids_are_written_once_and_in_order_when_an_answer_is_resumed() -> None:
    journal, appender = FakeJournal(), FakeAppender()

    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(5, "kill")]
        async with served(first, second, recorder=recorder) as bench:
            _, text = await ask(bench, **completion())
            await until(lambda: len(journal.finished) == 1)
        ids = joined(text)["ids"]
        parameters = json.loads(appender.of(abi.KIND_REQUEST)[0]["payload"])
        assert request_key(parameters["request"]) == journal.finished[0]
        written: list[int] = []
        for record in appender.of(abi.KIND_TOKENS):
            assert record["token_start"] == len(written)
            written += array.array("I", record["payload"])
            assert record["token_end"] == len(written)
            assert record["key"] == journal.finished[0]
        assert written == [10, 20, 30, *ids]

    with Recorder(journal, appender) as recorder:
        run(scenario)
    assert not [t for t in threading.enumerate() if t.name == "recorder"]


@pytest.mark.parametrize("fault", ["full", "gone"])
def test_answer_is_complete_when_the_journal_is_full_or_gone(fault: str) -> None:
    journal, appender = FakeJournal(is_gone=fault == "gone"), FakeAppender(is_full=fault == "full")

    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(5, "kill")]
        async with served(first, second, recorder=recorder) as bench:
            _, text = await ask(bench, **completion(concordia={"report": True}))
            assert len(joined(text)["ids"]) == 12
            (report,) = [e["concordia"] for e in events(text) if "concordia" in e]
            assert report["level"] == "re-prefilled"
            await until(lambda: recorder.dropped_count > 0)

    with Recorder(journal, appender) as recorder:
        run(scenario)


def test_report_says_what_the_connector_said_when_it_speaks_late() -> None:
    journal = FakeJournal()

    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(5, "kill")]
        async with served(first, second, recorder=recorder) as bench:
            asking = asyncio.create_task(ask(bench, **completion(concordia={"report": True})))
            await until(lambda: bool(second.bodies))
            name = second.bodies[0]["kv_transfer_params"]["concordia"]["request"]
            journal.said += [restored(name, 1, 0), restored(name, 2, 1, restored_tokens=7)]
            _, text = await asking
            (report,) = [e["concordia"] for e in events(text) if "concordia" in e]
            assert report == {
                "level": "state-exact",
                "restored_tokens": 7,
                "recomputed_tokens": 1,
                "failovers": 1,
            }
            await until(lambda: bench.metrics.by_label("levels") == {"state-exact": 1})

    with Recorder(journal, None) as recorder:
        run(scenario)


def test_event_counts_once_when_a_new_owner_tells_it_again() -> None:
    journal = FakeJournal(repeats=True)
    taken: list[str] = []

    async def scenario() -> None:
        said = JournalEvents(journal)
        said.on_event = lambda event: taken.append(event["record"])
        journal.said += [restored("a", 2, 0), restored("b", 2, 1)]
        await said.poll()
        journal.said.append(restored("c", 2, 2))
        await said.poll()
        await said.poll()
        assert taken == ["1:0", "1:1", "1:2"]

    run(scenario)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (restored("a", 1, 0), (Level.STATE_EXACT, 5)),
        (restored("a", 1, 0, level="partial"), (Level.PARTLY_RESTORED, 5)),
        (restored("a", 1, 0, level="prefix"), (Level.PARTLY_RESTORED, 5)),
        (restored("a", 1, 0, level="cold"), (Level.RE_PREFILL, 0)),
        (restored("a", 1, 0, event="restore-failed", level="none"), (Level.RE_PREFILL, 0)),
    ],
)
def test_outcome_is_read_as_the_connector_means_it(event: dict[str, Any], expected: Any) -> None:
    outcome = read_outcome(event)
    assert outcome is not None
    assert (outcome.level, outcome.restored_tokens) == expected


def test_other_events_are_no_outcome() -> None:
    assert read_outcome({"event": "unprotected", "request": "a", "reason": "x"}) is None


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            {"event": "unprotected", "request": "a", "reason": "the journal is full"},
            "a: the journal is full",
        ),
        (
            {
                "event": "restored",
                "request": "a",
                "level": "partial",
                "restored_tokens": 3,
                "recomputed_tokens": 2,
                "reason": "r",
            },
            "a: 3 tokens restored, 2 recomputed: r",
        ),
        (
            {"event": "restore-failed", "request": "a", "level": "none", "hash_mismatches": 1},
            "not restored whole: a",
        ),
        ({"event": "prefix-missed", "request": "a", "reason": "r"}, "prefix computed anew: a: r"),
        ({"event": "corruption", "stream": 4}, "corruption in the journal"),
    ],
)
def test_loss_is_said_in_one_line_when_an_event_tells_of_one(
    event: dict[str, Any], words: str
) -> None:
    assert words in str(describe_loss(event))


@pytest.mark.parametrize(
    "event", [{"event": "restored", "level": "state-exact"}, {"event": "prefix-restored"}]
)
def test_nothing_is_said_when_nothing_was_lost(event: dict[str, Any]) -> None:
    assert describe_loss(event) is None


def test_token_waits_for_its_commit_when_that_mode_is_on() -> None:
    journal = FakeJournal(committed_tokens=4)

    async def scenario() -> None:
        (engine,) = engines(1)
        settings = RouterSettings(commits_before_emit=True)
        async with served(engine, recorder=recorder, settings=settings) as bench:
            asking = asyncio.create_task(ask(bench, **completion()))
            # Three prompt tokens and one of the answer are committed: the second answer token may go, the third not.
            await until(lambda: bench.metrics.totals()["tokens"] == 3)
            journal.committed_tokens = 100
            _, text = await asking
            assert len(joined(text)["ids"]) == 12
            assert bench.metrics.by_label("requests") == {"": 1}

    with Recorder(journal, None) as recorder:
        run(scenario)


def test_token_goes_and_the_request_counts_as_unprotected_when_the_commit_is_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "COMMIT_WAIT_S", 0.05)
    journal = FakeJournal(committed_tokens=4)

    async def scenario() -> None:
        (engine,) = engines(1)
        settings = RouterSettings(commits_before_emit=True)
        async with served(engine, recorder=recorder, settings=settings) as bench:
            _, text = await ask(bench, **completion())
            assert len(joined(text)["ids"]) == 12
            assert bench.metrics.by_label("requests") == {"": 1, "commit-late": 1}

    with Recorder(journal, None) as recorder:
        run(scenario)


def test_uncommitted_tokens_are_counted_when_a_replica_fails() -> None:
    journal = FakeJournal(committed_tokens=6)

    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(5, "kill")]
        async with served(first, second, recorder=recorder) as bench:
            await ask(bench, **completion())
            # 3 + 5 tokens known; the last one's KV never exists; six were committed.
            assert bench.metrics.totals()["uncommitted_tokens"] == 1

    with Recorder(journal, None) as recorder:
        run(scenario)


def test_answer_is_settled_once_when_its_report_and_its_end_both_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "OUTCOME_WAIT_S", 0.1)

    async def scenario() -> None:
        first, second = engines(2)
        first.failures = [Failure(3, "kill")]
        with Recorder(FakeJournal(), FakeAppender()) as recorder:
            async with served(first, second, recorder=recorder) as bench:
                _, text = await ask(bench, **completion(concordia={"report": True}))
                (report,) = [e["concordia"] for e in events(text) if "concordia" in e]
                await until(lambda: sum(bench.metrics.by_label("levels").values()) == 1)
                assert report["recomputed_tokens"] == 6
                assert bench.metrics.totals()["recomputed_tokens"] == 6

    run(scenario)
