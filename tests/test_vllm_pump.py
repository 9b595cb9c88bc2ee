"""integrations/vllm/pump.py, append_clock.py, door.py, settings.py.

Invariants: nothing is submitted before its step's event; a block is not given up while an append reads it, or its request is named; failures are
told once per request; a full ring costs protection on the engine's thread and a wait on ours; behind a shut door nothing runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from concordia import abi, config
from concordia.errors import ConcordiaError, RestoreUnfinished, RingFull, UsageError, WaitTimeout
from concordia.integrations.vllm.append_clock import AppendClock
from concordia.integrations.vllm.appends import Append, Batch, Failure
from concordia.integrations.vllm.door import GuestDoor
from concordia.integrations.vllm.pump import AppendPump
from concordia.integrations.vllm.settings import Settings


@dataclass
class Done:
    status: int = abi.STATUS_OK


class FakeTickets:
    """Tasks that finish when told to."""

    def __init__(self) -> None:
        self.done: dict[int, Done] = {}
        self.changed = threading.Condition()

    def finish(self, ticket: int, status: int = abi.STATUS_OK) -> None:
        with self.changed:
            self.done[ticket] = Done(status)
            self.changed.notify_all()

    def submit_many(self, tasks: list[Callable[[], int]]) -> list[int]:
        """A task of these tests is what becomes of its submission."""
        tickets: list[int] = []
        for task in tasks:
            try:
                tickets.append(task())
            except RingFull:
                if not tickets:
                    raise
                break
        return tickets

    def result(self, ticket: int) -> Done | None:
        return self.done.get(ticket)

    def wait(self, ticket: int, timeout_s: float) -> Done:
        with self.changed:
            if not self.changed.wait_for(lambda: ticket in self.done, timeout_s):
                raise WaitTimeout(f"{ticket}")
            return self.done[ticket]


class Gate:
    """A GPU event that has or has not happened."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def synchronize(self) -> None:
        assert self.open.wait(5)


def append(request: str, block: int, ticket: int) -> Append:
    return Append(request, 10 * block, (block,), lambda: ticket)


def test_block_is_free_when_its_append_is_done() -> None:
    tickets = FakeTickets()
    pump = AppendPump(tickets, is_threaded=False)
    pump.submit(Batch([append("a", 1, 0)]))
    threading.Timer(0.05, tickets.finish, (0,)).start()
    assert pump.wait_for([1, 2], timeout_s=5) == []
    assert pump.collect() == {}
    assert pump.wait_for([1], timeout_s=0) == []


def test_engine_s_block_wins_when_the_append_was_not_handed_in_yet() -> None:
    tickets = FakeTickets()
    pump = AppendPump(tickets, is_threaded=True)
    gate = Gate()
    submitted: list[str] = []
    late = Append("a", 10, (1,), lambda: submitted.append("a"))
    pump.submit(Batch([late], event=gate))
    assert pump.wait_for([1], timeout_s=0.05) == ["a"]
    gate.open.set()
    pump.close()
    assert submitted == []
    assert list(pump.collect()) == ["a"]


def test_wait_ends_with_an_error_when_the_executor_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "WAIT_TASK_S", 0.05)
    pump = AppendPump(FakeTickets(), is_threaded=False)
    pump.submit(Batch([append("a", 1, 0)]))
    with pytest.raises(WaitTimeout, match="blocks that the engine needs"):
        pump.wait_for([1], timeout_s=0.01)


def test_steps_end_with_an_error_when_the_executor_hangs_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "STUCK_LOOKS_MIN", 3)
    tickets = FakeTickets()
    pump = AppendPump(tickets, is_threaded=False)
    pump.submit(Batch([append("a", 1, 0), append("b", 2, 1)]))
    for _ in range(10):  # not for long
        assert pump.collect() == {}
    tickets.finish(0)
    monkeypatch.setattr(config, "WAIT_TASK_S", 0.0)
    for _ in range(4):  # another is the oldest now, and met a few times only
        assert pump.collect() == {}
    with pytest.raises(WaitTimeout, match="the executor hangs: it has been at an append of b"):
        pump.collect()


def test_nothing_is_handed_in_when_the_step_has_not_happened() -> None:
    tickets = FakeTickets()
    pump = AppendPump(tickets, is_threaded=True)
    gate = Gate()
    order: list[str] = []
    work = Append("a", 10, (1,), lambda: order.append("append") or 0)
    pump.submit(Batch([work], event=gate, before=lambda: order.append("before")))
    assert order == []
    gate.open.set()
    tickets.finish(0)
    assert pump.drain(timeout_s=5)
    assert order == ["before", "append"]
    pump.close()


def test_request_is_told_of_once_when_its_append_failed() -> None:
    tickets = FakeTickets()
    pump = AppendPump(tickets, is_threaded=False)
    pump.submit(Batch([append("a", 1, 0), append("a", 2, 1)]))
    tickets.finish(0, abi.STATUS_JOURNAL_FULL)
    tickets.finish(1, abi.STATUS_JOURNAL_FULL)
    assert pump.collect() == {"a": Failure(10, "the journal had no room", True)}
    assert pump.collect() == {}


def test_request_is_given_up_when_one_of_its_failures_never_passes() -> None:
    tickets = FakeTickets()
    pump = AppendPump(tickets, is_threaded=False)
    pump.submit(Batch([append("a", 2, 0), append("a", 1, 1)]))
    tickets.finish(0, abi.STATUS_TOO_LARGE)
    tickets.finish(1, abi.STATUS_JOURNAL_FULL)
    assert pump.collect() == {"a": Failure(10, "the record does not fit a segment", False)}


def test_request_loses_protection_when_the_ring_is_full_on_the_engine_s_thread() -> None:
    def refuse() -> Any:
        raise RingFull("no slot")

    pump = AppendPump(FakeTickets(), is_threaded=False)
    pump.submit(Batch([Append("a", 10, (1,), refuse)]))
    assert pump.collect() == {"a": Failure(10, "no slot", True)}
    assert pump.wait_for([1], timeout_s=0) == []


def test_pump_waits_when_the_ring_is_full_on_its_own_thread() -> None:
    tickets = FakeTickets()
    pump = AppendPump(tickets, is_threaded=True)
    tries: list[int] = []

    def refuse_once() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise RingFull("no slot")
        return 1

    tickets.finish(1)
    pump.submit(Batch([append("a", 1, 0), Append("b", 20, (2,), refuse_once)]))
    threading.Timer(0.05, tickets.finish, (0,)).start()
    assert pump.drain(timeout_s=5)
    assert len(tries) == 2
    assert pump.collect() == {}
    pump.close()


def test_failure_of_the_pump_reaches_the_door_when_its_thread_broke() -> None:
    def break_down() -> Any:
        raise ValueError("broken")

    pump = AppendPump(FakeTickets(), is_threaded=True)
    pump.submit(Batch([Append("a", 10, (1,), break_down)]))
    pump.close()
    with pytest.raises(ConcordiaError, match="broken"):
        pump.collect()


def test_door_shuts_once_and_says_why_when_something_fails(caplog: pytest.LogCaptureFixture) -> None:
    door = GuestDoor("a test")
    said: list[str] = []
    door.on_shut(said.append)

    def fail() -> int:
        raise RuntimeError("boom")

    assert door.call("entry", 7, lambda: 1) == 1
    assert door.call("entry", 7, fail) == 7
    assert door.call("entry", 7, lambda: 1) == 7
    assert said == ["entry: RuntimeError: boom"]
    assert len([r for r in caplog.records if "protection is OFF" in r.message]) == 1


def test_door_lets_the_engine_know_when_going_on_could_change_its_blocks(caplog: pytest.LogCaptureFixture) -> None:
    door = GuestDoor("a test")
    said: list[str] = []
    door.on_shut(said.append)

    def fail() -> int:
        raise RestoreUnfinished("blocks are still being written")

    with pytest.raises(RestoreUnfinished):
        door.call("start_load_kv", 7, fail)
    assert said == ["start_load_kv: RestoreUnfinished: blocks are still being written"]
    assert caplog.records[-1].getMessage().endswith("The engine ends.")
    assert door.call("start_load_kv", 7, fail) == 7


def test_door_stays_shut_quietly_when_saying_so_fails_too() -> None:
    door = GuestDoor("a test")

    def fail(reason: str) -> None:
        raise RuntimeError(reason)

    door.on_shut(fail)
    door.shut("why")
    assert not door.is_open


@pytest.mark.parametrize("extra", [{"jornal": "x"}, {"replica": "1"}, {"replica": True}, {"layout": "rows"}, {"residency": "staying"}, {"executor_ctas": 0}, {"executor_ctas": 9}, {"executor_ctas": "4"}, {"prefix_restore": 1}])
def test_settings_are_refused_when_a_name_or_type_is_wrong(extra: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Settings.of(extra)


def test_settings_have_defaults_when_nothing_is_said() -> None:
    assert Settings.of(None).is_prefix_restored
    assert Settings.of({"replica": 5, "prefix_restore": False}).replica == 5
    assert Settings.of(None).residency == "leased"


@pytest.mark.parametrize("residency", ["leased", "resident", "stream", "auto"])
def test_settings_take_every_residency_that_is_known(residency: str) -> None:
    assert Settings.of({"residency": residency}).residency == residency


def test_append_is_not_called_back_when_it_is_being_submitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "WAIT_TASK_S", 0.05)
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> int:
        entered.set()
        assert go_on.wait(5)
        return 0

    pump = AppendPump(FakeTickets(), is_threaded=True)
    pump.submit(Batch([Append("a", 10, (1,), slow)]))
    assert entered.wait(5)
    with pytest.raises(WaitTimeout):  # the engine must not be told that the block is its own
        pump.wait_for([1], timeout_s=0.01)
    go_on.set()
    pump.close()


def test_nothing_is_submitted_any_more_when_the_pump_was_abandoned() -> None:
    gate, submitted = Gate(), []
    pump = AppendPump(FakeTickets(), is_threaded=True)
    work = Append("a", 10, (1,), lambda: submitted.append("a") or 0)
    pump.submit(Batch([work], event=gate))
    pump.abandon()
    gate.open.set()
    pump.close()
    assert submitted == []
    assert pump.wait_for([1], timeout_s=0.01) == []


def test_appending_is_timed_once_and_without_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "APPENDS_TOLD_S", 0.0)
    busy = 100
    clock = AppendClock(lambda: busy)
    busy += 7
    assert clock.take() == 7
    with clock.restoring():
        busy += 1000
    busy += 2
    assert clock.take() == 2
    assert clock.take() == 0
