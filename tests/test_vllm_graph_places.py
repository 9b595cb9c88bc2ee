"""integrations/vllm/graph_places.py, and the connector's part, on a driver of threads (fake_cuda.py).

Invariants: a place lies behind the last layer of a captured graph, or no graph is relied upon; what is handed in before a step runs in its graph,
behind its layers, and where that has no place behind its last kernel; nobody waits for a place that does not come; records of one rank keep
their order; behind a shut door the engine's graphs still run.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

from concordia import abi, config
from concordia.device.compiler import HandlerSource
from concordia.integrations.vllm import compat
from concordia.integrations.vllm.appends import Append, Batch
from concordia.integrations.vllm.graph_places import GraphPlaces, Placed, RankTickets
from concordia.integrations.vllm.pump import AppendPump
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task
from fake_cuda import FakeCuda, Result
from waiting import until

LAYERS = ("model.layers.0.attn", "model.layers.1.attn", "model.layers.2.attn")
# answers with what the engine's "layers" have written by then
LOOKING = '#include "call.h"\nHANDLER { if (lane == 0) call->result = load<kAcquire, kSystem>(reinterpret_cast<uint64_t*>(call->task.arg)); }\n'


class Engine:
    """The engine's streams: one that steps run in, one that graphs are captured in."""

    def __init__(self) -> None:
        self.device = FakeCuda()
        self.runtime = Runtime(self.device, residency="stream")
        _, self.stream = self.device.driver.cuStreamCreate(0)
        _, self.side = self.device.driver.cuStreamCreate(0)
        self.current = self.stream
        self.places = GraphPlaces(self.runtime, layers=LAYERS, stream=self.stream, current=lambda: self.current)
        self.written = np.zeros(1, np.uint64)
        looking = self.runtime.install("look", HandlerSource.of("look", text=LOOKING))
        self.task = Task(opcode=looking.opcode, kind=abi.TASK_COMPUTE, arg=self.written.ctypes.data)

    def write(self) -> None:
        """One layer's kernel."""
        self.written[0] += 1

    def capture(self, layers: tuple[str, ...] = LAYERS, *, streams: tuple[int, ...] = ()) -> list[Any]:
        """A graph of these layers, as the engine makes one."""
        driver = self.device.driver
        graph = driver.graphs[self.side] = []
        for stream in streams:
            driver.graphs[stream] = graph
        for number, name in enumerate(layers):
            graph.append(self.write)
            self.current = streams[number] if streams else self.side
            self.places.layer_captured(name)
        self.current = self.stream
        for stream in (self.side, *streams):
            driver.graphs.pop(stream, None)
        return graph

    def replay(self, graph: list[Any]) -> None:
        self.device.driver.replay(graph, self.stream)

    def layers(self) -> None:
        """A step whose layers are launched one by one."""
        for _ in LAYERS:
            self.device.driver.streams[self.stream].put(self.write)
            self.places.layer_launched()

    def close(self) -> None:
        self.runtime.close()
        self.device.close()


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


def step(engine: Engine, graph: list[Any] | None, count: int = 2) -> list[int]:
    """What the tasks of one step saw."""
    engine.places.begin_step(0)
    assert engine.places.takes(count)
    tickets = engine.places.hand_in([engine.task] * count)
    if graph is None:
        engine.layers()
    else:
        engine.replay(graph)
    assert engine.places.end_step()
    return [engine.places.wait(placed.ticket, 5).result for placed in tickets]


def test_tasks_see_all_layers_of_their_step_and_none_of_the_next_when_graphs_are_replayed(engine: Engine) -> None:
    graphs = [engine.capture(), engine.capture(tuple(reversed(LAYERS)))]
    assert engine.places.count == 2
    assert engine.places.why_not is None
    for number in range(1, 30):
        assert step(engine, graphs[number % 2]) == [3 * number] * 2
    assert engine.places.step_count == 29
    launches = engine.device.driver.launches[b"concordia_stream_tasks"]
    assert launches == 1 + 29  # one to begin with: no place but those of the graphs


def test_replays_may_queue_up_when_the_host_is_ahead(engine: Engine) -> None:
    graph = engine.capture()
    tickets = []
    for _ in range(4):
        engine.places.begin_step(0)
        tickets += engine.places.hand_in([engine.task])
        engine.replay(graph)
        engine.places.end_step()
    assert [engine.places.wait(placed.ticket, 5).result for placed in tickets] == [3, 6, 9, 12]


def test_tasks_run_behind_the_step_when_its_layers_are_launched_one_by_one(engine: Engine) -> None:
    graph = engine.capture()
    assert step(engine, None) == [3, 3]
    assert engine.places.step_count == 0
    assert step(engine, graph) == [6, 6]


@pytest.mark.parametrize(
    ("captures", "why"),
    [
        ([], "no full graph"),
        ([LAYERS[:2]], "no KV of 1 of 3 layers"),
        ([LAYERS, LAYERS[1:]], "no KV of 1 of 3 layers"),
        ([LAYERS[:2], LAYERS[2:]], "no KV of 1 of 3 layers"),  # two graphs: all layers, but in none of them
        ([(*LAYERS, LAYERS[0])], "not once"),
        ([("draft", *LAYERS)], "no KV of"),
    ],
)
def test_no_graph_is_relied_upon_when_one_of_them_is_not_whole(engine: Engine, captures: list[tuple[str, ...]], why: str) -> None:
    for layers in captures:
        engine.capture(layers)
    engine.places.begin_step(0)
    assert why in (engine.places.why_not or "")
    assert not engine.places.takes(1)


def test_no_graph_is_relied_upon_when_its_layers_lie_in_two_streams(engine: Engine) -> None:
    engine.capture(streams=(engine.side, engine.stream, engine.side))
    assert "one stream" in (engine.places.why_not or "")


def test_nothing_is_handed_in_when_there_is_no_room_or_steps_run_in_another_stream(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.capture()
    engine.places.begin_step(0)
    assert engine.places.takes(config.STREAM_TASK_SLOTS - 1)
    assert not engine.places.takes(config.STREAM_TASK_SLOTS)
    engine.current = engine.side
    engine.places.begin_step(0)
    assert not engine.places.takes(1)
    assert "another stream" in caplog.text


def test_graphs_are_given_up_when_replays_have_no_place(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """A graph that the engine captured without a word: tasks are late, and none is lost."""
    engine.capture()
    tickets = []
    for _ in range(config.PLACES_MISSED_MAX * config.PLACES_BEHIND_MAX + 1):
        engine.places.begin_step(0)
        if engine.places.takes(1):
            tickets += engine.places.hand_in([engine.task])
        engine.places.end_step()
    assert engine.places.why_not == "replays of a graph had no place"
    engine.places.flush()
    assert [engine.places.wait(placed.ticket, 5).is_ok for placed in tickets] == [True] * len(tickets)
    assert "no more" in caplog.text


def test_places_in_graphs_do_nothing_and_harm_nobody_when_the_runtime_has_retired() -> None:
    engine = Engine()
    graph = engine.capture()
    engine.places.begin_step(0)
    (placed,) = engine.places.hand_in([engine.task])
    engine.runtime.retire()
    for _ in range(3):
        engine.replay(graph)
    until(lambda: int(engine.device.driver.cuStreamQuery(engine.stream)[0]) == 0)
    assert engine.written[0] == 9
    assert engine.device.driver.launches[b"concordia_stream_tasks"] == 1 + 3
    assert engine.places._tasks._ring.result(placed.ticket) is None, "what it reads may be somebody else's by now"
    assert engine.places.hand_in([engine.task]) == []
    engine.runtime.close()  # which gives nothing back
    engine.replay(graph)
    until(lambda: int(engine.device.driver.cuStreamQuery(engine.stream)[0]) == 0)


def test_appends_elsewhere_wait_for_those_of_the_executor_and_are_followed(engine: Engine) -> None:
    graph = engine.capture()
    checkpointer: Any = SimpleNamespace(
        submit_many=engine.runtime.submit_many, result=engine.runtime.result, wait=engine.runtime.wait, hash_kv=None
    )
    pump = AppendPump(RankTickets(checkpointer, engine.places), is_threaded=False)
    own = Append("a", 0, (1,), engine.task)
    with engine.runtime.parked():
        pump.submit(Batch([own]))
        assert not pump.may_follow(1)
    assert pump.wait_for([1], timeout_s=5) == []
    assert pump.may_follow(1)
    assert not pump.may_follow(config.RING_SLOTS + 1)
    engine.places.begin_step(0)
    placed = Append("a", 16, (2,), engine.task)
    (placed.ticket,) = engine.places.hand_in([placed.task])
    assert isinstance(placed.ticket, Placed)
    pump.follow([placed])
    assert pump.reads([2])
    assert not pump.reads([1])
    engine.replay(graph)
    assert engine.places.end_step()
    assert pump.wait_for([2], timeout_s=5) == []
    assert pump.drain(timeout_s=5)
    assert pump.collect() == {}


@pytest.mark.parametrize("call", ["cuStreamGetCaptureInfo", "cuLaunchKernel"])
def test_only_places_are_lost_when_a_capture_cannot_take_them(engine: Engine, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.device.driver, call, lambda *_: (Result.CUDA_ERROR_ILLEGAL_ADDRESS,))
    engine.capture()
    monkeypatch.undo()
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in (engine.places.why_not or "")


def test_step_is_appended_otherwise_when_it_cannot_be_handed_in(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = engine.capture()
    monkeypatch.setattr(engine.device.driver, "cuStreamWriteValue64", lambda *_: (Result.CUDA_ERROR_ILLEGAL_ADDRESS,))
    engine.places.begin_step(0)
    assert engine.places.hand_in([engine.task]) == []
    monkeypatch.undo()
    for _ in range(2):
        engine.replay(graph)
        assert not engine.places.end_step()
        engine.places.begin_step(0)
        assert not engine.places.takes(1)
    until(lambda: int(engine.device.driver.cuStreamQuery(engine.stream)[0]) == 0)
    assert engine.places._tasks._ring.load("done_count") == 0, "it would be appended twice"


@pytest.mark.parametrize(
    "more",
    [
        {"model_config": SimpleNamespace(enable_sleep_mode=True)},
        {"parallel_config": SimpleNamespace(enable_dbo=True)},
        {"parallel_config": SimpleNamespace(ubatch_size=2)},
        {"speculative_config": SimpleNamespace()},
    ],
)
def test_graphs_get_no_places_when_what_they_write_is_not_all(more: dict[str, Any]) -> None:
    plain = {"model_config": SimpleNamespace(), "parallel_config": SimpleNamespace(enable_dbo=False), "speculative_config": None}
    assert compat.why_no_places(SimpleNamespace(**plain)) is None
    assert compat.why_no_places(SimpleNamespace(**plain | more))
