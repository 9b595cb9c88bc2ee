"""integrations/vllm: connector.py, scheduler_side.py, compat.py, plugin.py.

Invariants: every method of this vLLM's connector interface that we define has its signature; with a journal that is gone, or anything else that
fails, each of them answers what does the engine no harm, and blocks that it counts on are reported as failed; each request that loses
protection is named once; a request that a router owns is never ended by us.
"""

from __future__ import annotations

import inspect
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import torch
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.model_executor.layers.attention import attention, kv_transfer_utils
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from concordia import config
from concordia.integrations.vllm import compat, plugin
from concordia.integrations.vllm.connector import ConcordiaConnector
from concordia.integrations.vllm.load import Load
from concordia.integrations.vllm.metadata import StepMetadata, WorkerReport
from concordia.journal.client import JournalClient
from concordia.journal.owner import spawn_owner
from concordia.journal.record import request_key
from vllm_facts import asked, blocks_of, cache_config, spec, step_of, tensors, vllm_config


@pytest.fixture(scope="module")
def journal() -> Iterator[pathlib.Path]:
    path = pathlib.Path("/dev/shm") / f"concordia-connector-{os.getpid()}"
    shutil.rmtree(path, ignore_errors=True)
    spawn_owner(path, size_bytes=32 << 20, segment_bytes=1 << 20, linger_s=120)
    yield path
    JournalClient.connect(path).shutdown()


@contextmanager
def engine(journal: pathlib.Path, **more: Any) -> Iterator[tuple[ConcordiaConnector, ConcordiaConnector]]:
    """Both sides of one engine."""
    facts = vllm_config(journal, **more), cache_config()
    worker = ConcordiaConnector(facts[0], KVConnectorRole.WORKER, facts[1])
    worker.register_kv_caches(tensors())
    scheduler = ConcordiaConnector(facts[0], KVConnectorRole.SCHEDULER, facts[1])
    assert worker._door.is_open
    assert scheduler._door.is_open
    try:
        yield scheduler, worker
    finally:
        scheduler.shutdown()
        worker.shutdown()


@pytest.fixture(autouse=True)
def lone_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "worker_rank", lambda *_: 0)


@pytest.fixture
def pair(journal: pathlib.Path) -> Iterator[tuple[ConcordiaConnector, ConcordiaConnector]]:
    with engine(journal) as sides:
        yield sides


def run(scheduler: ConcordiaConnector, worker: ConcordiaConnector, output: Any) -> StepMetadata:
    """One step, in vLLM's order."""
    meta = scheduler.build_connector_meta(output)
    assert isinstance(meta, StepMetadata)
    worker.handle_preemptions(meta)
    worker.bind_connector_metadata(meta)
    worker.start_load_kv(None)
    worker.wait_for_save()
    report = worker.build_connector_worker_meta()
    worker.clear_connector_metadata()
    scheduler.update_connector_output(SimpleNamespace(kv_connector_worker_meta=report))
    return meta


def eventually(journal: pathlib.Path, wanted: Any) -> list[dict[str, Any]]:
    """Events, once one of them is the wanted one."""
    client = JournalClient.connect(journal)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        _, events = client.events()
        if any(wanted(event) for event in events):
            client.close()
            return events
        time.sleep(0.01)
    raise AssertionError(f"not among {events}")


def offered(scheduler: ConcordiaConnector, request: Any) -> int:
    """What a request is offered from the journal, asked again as vLLM does."""
    scheduler.on_new_request(request)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        found, _ = scheduler.get_num_new_matched_tokens(request, 0)
        if found is not None:
            return found
        time.sleep(0.005)
    raise AssertionError("no answer")


def test_signatures_are_those_of_the_installed_vllm_when_a_method_is_ours() -> None:
    for name, ours in vars(ConcordiaConnector).items():
        base = getattr(KVConnectorBase_V1, name, None)
        if name.startswith("_") or not inspect.isfunction(ours) or base is None:
            continue
        theirs = [p for p in inspect.signature(base).parameters.values() if p.kind is not p.VAR_KEYWORD]
        mine = list(inspect.signature(ours).parameters.values())
        named = [p.name for p in mine if p.kind is not p.VAR_KEYWORD]
        assert named[: len(theirs)] == [p.name for p in theirs] or name.startswith("request_finished"), name
    assert not getattr(ConcordiaConnector, "__abstractmethods__", None)
    assert not ConcordiaConnector.requires_piecewise_for_cudagraph({})


def test_plugin_makes_the_name_known_when_vllm_loads_it_twice() -> None:
    plugin.register()
    plugin.register()
    assert KVConnectorFactory.get_connector_class_by_name(plugin.NAME) is ConcordiaConnector


def test_engine_is_served_without_protection_when_there_is_no_journal(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = vllm_config(tmp_path / "none"), cache_config()
    scheduler = ConcordiaConnector(facts[0], KVConnectorRole.SCHEDULER, facts[1])
    worker = ConcordiaConnector(facts[0], KVConnectorRole.WORKER, facts[1])
    worker.register_kv_caches(tensors())
    request = asked("r", 40)
    scheduler.on_new_request(request)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    scheduler.update_state_after_alloc(request, blocks_of(1, 2), 0)
    run(scheduler, worker, step_of(("r", [1, 2], 0, 40)))
    assert worker.get_block_ids_with_load_errors() == set()
    assert scheduler.request_finished_all_groups(request, ([1, 2],)) == (False, None)
    assert scheduler.reset_cache()
    scheduler.shutdown()
    worker.shutdown()
    assert sum("protection is OFF" in r.message for r in caplog.records) == 2


def test_worker_s_loss_ends_protection_of_the_engine_when_it_is_reported(
    pair: tuple[ConcordiaConnector, ConcordiaConnector], journal: pathlib.Path
) -> None:
    scheduler, worker = pair
    scheduler.on_new_request(asked("r", 40))
    worker._door.shut("for this test")
    run(scheduler, worker, step_of(("r", [1, 2], 0, 40)))
    assert not scheduler._door.is_open
    events = eventually(journal, lambda e: e["event"] == "unprotected" and e["request"] == "*")
    assert [e for e in events if e["event"] == "unprotected" and str(e["request"]).endswith(":r")]


def test_request_is_protected_again_when_the_journal_has_room_again(
    pair: tuple[ConcordiaConnector, ConcordiaConnector], journal: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "APPEND_RETRY_S", 0.0)
    monkeypatch.setattr(config, "APPEND_PROVEN_S", 0.0)
    scheduler, worker = pair
    request = asked("r", 70)
    scheduler.on_new_request(request)
    run(scheduler, worker, step_of(("r", [1, 2, 3], 0, 70)))
    report = WorkerReport(step=1, missed={"r": (40, "the journal had no room")})
    scheduler.update_connector_output(SimpleNamespace(kv_connector_worker_meta=report))
    meta = run(scheduler, worker, step_of(cached=(("r", [], 70, 1),)))
    assert meta.writes[0].full == ((1, 2),)
    assert meta.writes[0].tail == (64, 71, 3)
    run(scheduler, worker, step_of(cached=(("r", [], 71, 1),)))
    eventually(journal, lambda e: e["event"] == "protected" and str(e["request"]).endswith(":r"))


def test_blocks_are_reported_failed_when_promised_tokens_cannot_be_had(
    pair: tuple[ConcordiaConnector, ConcordiaConnector],
) -> None:
    scheduler, worker = pair
    request = asked("r", 40)
    scheduler.on_new_request(request)
    scheduler.update_state_after_alloc(request, blocks_of(4, 5), 33)  # never offered: our own mistake
    assert not scheduler._door.is_open
    run(scheduler, worker, step_of(("r", [4, 5], 33, 7)))
    assert worker.get_block_ids_with_load_errors() == {4, 5}
    assert worker.get_block_ids_with_load_errors() == set()


def test_blocks_are_reported_failed_when_the_worker_breaks_while_loading(
    pair: tuple[ConcordiaConnector, ConcordiaConnector],
) -> None:
    _, worker = pair
    meta = StepMetadata(1, 1, loads=[Load("r", (3, 4, 5), 1, {0: ((9, 9, 9),)})])  # type: ignore[dict-item]
    worker.bind_connector_metadata(meta)
    worker.start_load_kv(None)
    assert worker.get_block_ids_with_load_errors() == {4, 5}
    assert not worker._door.is_open


def test_step_writes_are_built_from_vllm_s_own_output_when_requests_start_and_go_on(
    pair: tuple[ConcordiaConnector, ConcordiaConnector],
) -> None:
    scheduler, worker = pair
    request = asked("r", 70, cache_salt="met by nobody before")
    scheduler.on_new_request(request)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    scheduler.update_state_after_alloc(request, blocks_of(1, 2, 3), 0)
    meta = run(scheduler, worker, step_of(("r", [1, 2, 3], 0, 70)))
    assert meta.writes[0].full == ((0, 1), (1, 2))
    assert meta.writes[0].tail == (64, 70, 3)
    request.all_token_ids.append(5)
    copies = [SimpleNamespace(src_block_id=1, dst_block_id=9)]
    meta = run(
        scheduler, worker,
        step_of(cached=(("r", [4], 70, 27),), kv_cache_block_copies=copies, new_block_ids_to_zero=[8]),
    )  # fmt: skip
    assert sorted(meta.reused) == [4, 8, 9]
    assert meta.writes[0].full == ((2, 3),)
    meta = run(scheduler, worker, step_of(cached=(("r", [], 97, 3),), scheduled_spec_decode_tokens={"r": [1, 2]}))
    assert meta.writes[0].tail == (97, 98, 4)


def test_request_is_named_and_served_when_its_parameters_are_nonsense(
    pair: tuple[ConcordiaConnector, ConcordiaConnector], journal: pathlib.Path
) -> None:
    scheduler, worker = pair
    request = asked("odd", 40, kv_transfer_params={"concordia": {"incarnation": "two"}})
    scheduler.on_new_request(request)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert run(scheduler, worker, step_of(("odd", [1, 2], 0, 40))).writes == []
    assert scheduler._door.is_open
    eventually(journal, lambda e: e["event"] == "unprotected" and "incarnation" in e["reason"])


def test_second_request_is_unprotected_when_one_of_its_name_and_incarnation_was_here(
    pair: tuple[ConcordiaConnector, ConcordiaConnector], journal: pathlib.Path
) -> None:
    scheduler, worker = pair
    own = {"concordia": {"request": "twice", "incarnation": 4}}
    first = asked("a", 40, kv_transfer_params=own, cache_salt="first")
    scheduler.on_new_request(first)
    run(scheduler, worker, step_of(("a", [1, 2], 0, 40)))
    second = asked("b", 33, kv_transfer_params={"concordia": own["concordia"] | {"restore": True}}, cache_salt="second")
    assert offered(scheduler, second) == 0, "nor does it get what the first has"
    assert run(scheduler, worker, step_of(("b", [3, 4], 0, 33))).writes == []
    events = eventually(journal, lambda e: e["event"] == "unprotected" and "incarnation was here" in e["reason"])
    assert not [e for e in events if e["event"] == "unprotected" and e["request"] == "twice"], "the first is protected as before"
    scheduler.request_finished(second, [3])
    meta = run(scheduler, worker, step_of(cached=(("a", [], 40, 1),)))
    assert [write.key for write in meta.writes] == [request_key("twice")]
    scheduler.request_finished(first, [1])
    scheduler.on_new_request(asked("c", 40, kv_transfer_params=own))
    assert run(scheduler, worker, step_of(("c", [5, 6], 0, 40))).writes == [], "what the first wrote is still there"
    fresh = {"concordia": own["concordia"] | {"incarnation": 5}}
    scheduler.on_new_request(asked("d", 40, kv_transfer_params=fresh))
    assert len(run(scheduler, worker, step_of(("d", [7, 8], 0, 40))).writes) == 1
    client = JournalClient.connect(journal)
    until = time.monotonic() + 5
    while client.committed(request_key("twice")) < 40 and time.monotonic() < until:
        time.sleep(0.01)
    assert client.committed(request_key("twice")) == 40
    client.finish(request_key("twice"))
    client.close()


def test_blocks_are_nobody_else_s_when_a_request_brings_an_image(
    pair: tuple[ConcordiaConnector, ConcordiaConnector],
) -> None:
    scheduler, worker = pair
    scheduler.on_new_request(asked("image", 40, mm_features=[object()]))
    run(scheduler, worker, step_of(("image", [1, 2], 0, 40)))
    assert scheduler._scheduler is not None
    assert scheduler._scheduler._writes.tracks["image"].chain is None


def test_only_requests_that_no_router_owns_are_ended_by_us(
    pair: tuple[ConcordiaConnector, ConcordiaConnector], journal: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "FINISH_LINGER_S", 0.0)
    scheduler, worker = pair
    routed = asked("a", 40, kv_transfer_params={"concordia": {"request": "routed-a", "incarnation": 1}})
    plain = asked("b", 40, all_token_ids=list(range(500, 540)), prompt_token_ids=list(range(500, 540)))
    for request in (routed, plain):
        scheduler.on_new_request(request)
    run(scheduler, worker, step_of(("a", [1, 2], 0, 40), ("b", [3, 4], 0, 40)))
    run(scheduler, worker, step_of())
    for request in (routed, plain):
        scheduler.request_finished(request, [1])
    assert scheduler._scheduler is not None
    name = scheduler._scheduler._own_name("b")
    client = JournalClient.connect(journal)
    until = time.monotonic() + 5
    while client.committed(request_key(name)) and time.monotonic() < until:
        time.sleep(0.02)
    assert client.committed(request_key(name)) == 0
    assert client.committed(request_key("routed-a")) == 40
    client.finish(request_key("routed-a"))
    client.close()


def test_old_keys_are_never_met_again_when_the_cache_was_reset(
    pair: tuple[ConcordiaConnector, ConcordiaConnector], journal: pathlib.Path
) -> None:
    scheduler, worker = pair
    scheduler.on_new_request(asked("a", 70))
    run(scheduler, worker, step_of(("a", [1, 2, 3], 0, 70)))
    side = scheduler._scheduler
    assert side is not None
    before, made = side._writes.tracks["a"].chain, side._writes.tracks["a"].model_hash
    assert before is not None
    assert scheduler.reset_cache()
    scheduler.on_new_request(asked("b", 70))
    after = side._writes.tracks["b"].chain
    assert after is not None
    after.extend(list(range(70)), limit=70)
    assert not set(after.keys) & set(before.keys)
    assert side._writes.tracks["a"].model_hash != made, "nor is what runs on restored by another engine, which has other weights"
    eventually(journal, lambda e: e["event"] == "unprotected" and "was reset" in e["reason"])


@pytest.mark.parametrize(
    "other",
    [
        {"model": "another"},
        {"revision": "2"},
        {"quantization": "fp8"},
        {"hf_config": {"rope_theta": 10000}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_request_is_not_restored_when_another_model_of_that_geometry_computed_it(
    journal: pathlib.Path, other: dict[str, Any]
) -> None:
    name = f"made by m, not {other}"
    own = {"request": name, "incarnation": 1}
    with engine(journal) as (scheduler, worker):
        scheduler.on_new_request(asked("a", 70, kv_transfer_params={"concordia": own}))
        run(scheduler, worker, step_of(("a", [1, 2, 3], 0, 70)))
        run(scheduler, worker, step_of())
    back = asked("b", 70, kv_transfer_params={"concordia": own | {"incarnation": 2, "restore": True, "tokens": 70}})
    with engine(journal) as (scheduler, _):
        assert offered(scheduler, back) == 69
    with engine(journal, **other) as (scheduler, worker):
        assert offered(scheduler, back) == 0
        run(scheduler, worker, step_of(("b", [1, 2, 3], 0, 70)))
        events = eventually(journal, lambda e: e["event"] == "restored" and e["request"] == name)
    told = next(e for e in events if e["event"] == "restored" and e["request"] == name)
    assert told["level"] == "cold"
    assert "another model" in told["reason"]
    client = JournalClient.connect(journal)
    client.finish(request_key(name))
    client.close()


def test_request_is_named_and_served_when_its_adapter_changed_under_the_engine(
    pair: tuple[ConcordiaConnector, ConcordiaConnector], journal: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    scheduler, worker = pair
    assert scheduler._scheduler is not None
    tracks = scheduler._scheduler._writes.tracks
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"first")
    adapter = SimpleNamespace(lora_name="poet", lora_int_id=1, lora_path=str(tmp_path))
    scheduler.on_new_request(asked("base", 40))
    scheduler.on_new_request(asked("a", 40, lora_request=adapter))
    assert tracks["a"].is_protected
    assert tracks["a"].model_hash != tracks["base"].model_hash
    file.write_bytes(b"other")
    scheduler.on_new_request(asked("b", 40, lora_request=adapter, kv_transfer_params={"concordia": {"request": "routed-b"}}))
    assert run(scheduler, worker, step_of(("b", [1, 2], 0, 40))).writes == []
    eventually(journal, lambda e: e["event"] == "unprotected" and e["request"] == "routed-b" and "have changed" in e["reason"])
    assert scheduler._door.is_open


@pytest.mark.parametrize(
    ("caches", "more", "words"),
    [
        ((spec(), spec()), {}, "2 KV cache groups"),
        ((spec(SlidingWindowSpec, sliding_window=8),), {}, "SlidingWindowSpec"),
        ((), {"parallel": {"decode_context_parallel_size": 2}}, "decode_context_parallel_size"),
        ((), {"parallel": {"pipeline_parallel_size": 2}}, "pipeline"),
        ((), {"speculative": object(), "is_async": True}, "speculative"),
        ((), {"cache": {"calculate_kv_scales": True}}, "calculate_kv_scales"),
    ],
)
def test_engine_says_once_why_it_is_not_protected_when_it_cannot_be(
    journal: pathlib.Path, caches: tuple[Any, ...], more: dict[str, Any], words: str
) -> None:
    facts = vllm_config(journal, **more), cache_config(*caches)
    scheduler = ConcordiaConnector(facts[0], KVConnectorRole.SCHEDULER, facts[1])
    assert words in (scheduler._door.reason or "")
    eventually(journal, lambda e: e["event"] == "unprotected" and words in e["reason"])
    scheduler.shutdown()


def test_reports_add_up_to_the_worst_rank_when_they_are_joined() -> None:
    first = WorkerReport(step=5, lost={"a": "x"}, missed={"m": (9, "x")}, loaded={"r": 0}, load_s={"r": 0.5}, append_ns=3, has_rows=True, graph_steps=9)
    second = WorkerReport(step=4, lost={"b": "y"}, missed={"m": (4, "y")}, loaded={"r": 2}, load_s={"r": 0.25}, append_ns=4, differing=[7], graph_steps=7, off="gone")
    assert first.aggregate(second) == WorkerReport(
        step=4, lost={"a": "x", "b": "y"}, missed={"m": (4, "y")}, loaded={"r": 2}, load_s={"r": 0.5}, append_ns=7, differing=[7], graph_steps=7,
        off="gone",
    )  # fmt: skip
    assert first.aggregate(WorkerReport(has_rows=True)).has_rows


def test_layers_are_told_by_vllm_s_own_wrapper_when_a_graph_is_captured(
    pair: tuple[ConcordiaConnector, ConcordiaConnector], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/residency.md promises of captured graphs rests on this order of vLLM's."""
    _, worker = pair
    said: list[Any] = []
    side = worker._worker
    assert side is not None
    monkeypatch.setattr(side, "layer_done", lambda name, is_step: said.append((name, is_step)))
    monkeypatch.setattr(attention, "get_attention_context", lambda name: ("metadata", None, "kv", None))
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", worker)
    wrapped = kv_transfer_utils.maybe_transfer_kv_layer(lambda layer_name: said.append("kernels"))
    wrapped("l0")
    assert said == ["kernels"], "without places nobody wants to hear of layers"
    worker._hears_layers = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    wrapped("l0")
    assert said[1:] == ["kernels"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    wrapped("l0")
    assert said[2:] == ["kernels", ("l0", False)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    worker.bind_connector_metadata(StepMetadata())
    wrapped("l1")
    worker.clear_connector_metadata()
    assert said[4:] == ["kernels", ("l1", True)]
    worker._door.shut("a test")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    wrapped("l0")
    assert said[6:] == ["kernels"]
