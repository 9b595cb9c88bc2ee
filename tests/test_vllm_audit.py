"""integrations/vllm/audit.py, and what a difference costs.

Invariants: a difference between a committed block and the engine's memory is told once, to the journal and to the scheduler; a block that a step
may write is never judged by what was committed of it before; an engine with work to do is left alone; the sample has a bound; what differs is
promised to nobody any more.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import torch

from concordia import config
from concordia.errors import DeviceError
from concordia.integrations.vllm import compat
from concordia.integrations.vllm.appends import Append
from concordia.integrations.vllm.audit import Audit
from concordia.integrations.vllm.identity import Identity, KeyChain
from concordia.integrations.vllm.metadata import StepMetadata
from concordia.integrations.vllm.scribe import Scribe
from concordia.integrations.vllm.settings import Settings
from concordia.integrations.vllm.step_writes import Scheduled, Write
from concordia.integrations.vllm.track import Track
from concordia.integrations.vllm.worker_side import WorkerSide
from concordia.integrations.vllm.write_set import WriteSet
from concordia.journal.client import JournalClient
from concordia.journal.owner import spawn_owner
from concordia.journal.record import request_key


@dataclass
class Done:
    payload_hash: int
    is_ok: bool = True


class FakeHasher:
    """Blocks are numbers; a ticket is a finished answer."""

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        self.asked: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def result(self, ticket: Any) -> Done | None:
        if isinstance(ticket, Exception):
            raise ticket
        return ticket() if callable(ticket) else ticket

    def hash_kv(self, region: Any, *, kind: int, token_start: int, token_end: int, blocks: tuple[int, ...]) -> int:
        self.asked.append(blocks[0])
        return blocks[0]

    def wait(self, ticket: int, timeout_s: float) -> Done:
        assert self.gate.wait(5)
        return Done(self.blocks[ticket])


WRITE = Write("a", 7, 1000, (), None)


class Bench:
    """An audit without waits, and what it said."""

    def __init__(self) -> None:
        self.hasher = FakeHasher()
        self.said: list[dict[str, Any]] = []
        self.audit = Audit(self.hasher, None, rank=0, say=self.said.append)

    def save(self, block: int, value: int, ticket: Any = None) -> Append:
        """A step that fills and appends one block."""
        self.audit.step([block])
        self.hasher.blocks[block] = value
        append = Append("a", 0, (block,), lambda: None)
        append.ticket = Done(value) if ticket is None else ticket
        self.audit.offer(append, WRITE, token_start=0, token_end=8)
        return append


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(config, "AUDIT_PERIOD_S", 0.001)
    monkeypatch.setattr(config, "AUDIT_IDLE_S", 0.0)
    made = Bench()
    yield made
    made.hasher.gate.set()
    made.audit.close()


def eventually(wanted: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if found := wanted():
            return found
        time.sleep(0.002)
    raise AssertionError(what)


def test_difference_is_told_once_when_a_block_changed_by_itself(bench: Bench) -> None:
    bench.save(3, 33)
    bench.save(4, 44)
    bench.audit.rest()
    eventually(lambda: {3, 4} <= set(bench.hasher.asked), "both are looked at in turn")
    assert bench.said == []
    bench.hasher.blocks[3] = 34
    (told,) = eventually(lambda: bench.said, "the difference is told")
    assert (told["event"], told["key"], told["incarnation"], told["hash_mismatches"]) == ("differs", f"{7:032x}", 1000, 1)
    assert [found.block for found in bench.audit.rest()] == [3]
    count = len(bench.hasher.asked)
    eventually(lambda: len(bench.hasher.asked) > count + 3, "it goes on")
    assert len(bench.said) == 1
    assert bench.audit.rest() == []


def test_block_is_not_judged_when_a_step_may_write_it(bench: Bench) -> None:
    bench.save(3, 33)
    bench.hasher.gate.clear()
    bench.audit.rest()
    eventually(lambda: bench.hasher.asked == [3], "it is being hashed")
    bench.audit.step([3])
    bench.hasher.blocks[3] = 34
    bench.hasher.gate.set()
    bench.audit.close()
    assert bench.said == []


def test_block_is_not_judged_when_it_was_given_away_before_its_append_was_seen_done(bench: Bench) -> None:
    answers = itertools.chain([None, None], itertools.repeat(Done(33)))
    bench.save(3, 33, ticket=lambda: next(answers))
    bench.audit.step([])
    bench.audit.step([3])
    bench.hasher.blocks[3] = 34
    bench.save(4, 44)
    bench.audit.rest()
    eventually(lambda: len(bench.hasher.asked) > 3, "the other one is looked at")
    assert set(bench.hasher.asked) == {4}


def test_engine_is_left_alone_when_a_step_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.save(3, 33)
    bench.audit.step([])
    threading.Event().wait(0.05)
    assert bench.hasher.asked == []
    monkeypatch.setattr(config, "AUDIT_IDLE_S", 60.0)
    bench.audit.rest()
    threading.Event().wait(0.05)
    assert bench.hasher.asked == []


def test_append_that_failed_is_no_sample_and_the_sample_has_a_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "AUDIT_BLOCKS_MAX", 2)
    bench.save(1, 11, ticket=Done(11, is_ok=False))
    bench.save(2, 22, ticket=DeviceError("forgotten"))
    lost = bench.save(3, 33)
    lost.ticket, lost.is_done = None, True
    for block in (4, 5, 6):
        bench.save(block, block)
    bench.audit.rest()
    eventually(lambda: len(bench.hasher.asked) > 6, "some are looked at")
    assert set(bench.hasher.asked) == {5, 6}


# --- with a real executor and a real journal

LAYERS, BLOCKS, HEADS, TOKENS, DIM = 2, 8, 2, 8, 8


@pytest.fixture(scope="module")
def journal() -> Iterator[pathlib.Path]:
    path = pathlib.Path("/dev/shm") / f"concordia-audit-{os.getpid()}"
    shutil.rmtree(path, ignore_errors=True)
    spawn_owner(path, size_bytes=16 << 20, segment_bytes=1 << 20, linger_s=120)
    yield path
    JournalClient.connect(path).shutdown()


def test_nothing_of_a_request_is_promised_when_the_engine_s_memory_changed_by_itself(
    journal: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("why_unprotected", None), ("block_tokens", TOKENS), ("world_size", 1), ("worker_rank", 0)):
        monkeypatch.setattr(compat, name, lambda *_, value=value: value)
    monkeypatch.setattr(compat, "cpu_instruction_set", lambda *_: "x86_64-vec")
    monkeypatch.setattr(config, "AUDIT_PERIOD_S", 0.01)
    monkeypatch.setattr(config, "AUDIT_IDLE_S", 0.0)
    monkeypatch.setattr(config, "APPENDS_TOLD_S", 0.0)
    kv = {f"l{i}": torch.randn(BLOCKS, HEADS, TOKENS, 2 * DIM).to(torch.bfloat16) for i in range(LAYERS)}
    cache = SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(head_size=DIM))])
    worker = WorkerSide(Settings(journal, replica=5), None, cache)
    worker.register_kv_caches(kv)
    assert worker._layout is not None
    layout = worker._layout.geometry.layout_hash()
    client = JournalClient.connect(journal)
    scribe = Scribe(Settings(journal, replica=5), client, layout_hash=layout, world=1)
    writes = WriteSet(block_tokens=TOKENS)
    tracks = {name: Track(Identity(name=name), KeyChain(name.encode(), block_tokens=TOKENS), list(range(9))) for name in ("a", "b")}
    writes.tracks |= tracks
    step = writes.step([Scheduled("a", [1, 2], True, 0, 9), Scheduled("b", [3, 4], True, 0, 9)], step=1)
    for note in step.notes:
        scribe.note_keys(note, step=1)
    append_ns = 0
    # Of "a" alone a block is offered, so that the sample is no matter of chance.
    for number, write in enumerate(step.writes, start=1):
        meta = StepMetadata(number, 9, [write], step.reused if number == 1 else [])
        worker.before_step(meta)
        worker.save(meta)
        append_ns += worker.take_report().append_ns
    key = tracks["a"].chain.keys[0] if tracks["a"].chain else 0
    eventually(lambda: client.committed(request_key("a")) == client.committed(request_key("b")) == 9, "both are committed")
    eventually(lambda: key in client.key_news(layout_hash=layout, world=1).come, "its key is known")
    kv["l1"][1].view(torch.int16)[0, 0, 0] ^= 1
    _, events = eventually(
        lambda: (found := client.events()) and any(e["event"] == "differs" for e in found[1]) and found, "it is told"
    )
    (told,) = [e for e in events if e["event"] == "differs"]
    assert (told["request"], told["hash_mismatches"], told["token_start"]) == ("a", 1, 0)
    assert client.committed(request_key("a")) == 0
    assert client.committed(request_key("b")) == 9, "the other one is promised as before"
    assert key not in client.key_news(layout_hash=layout, world=1).come
    report = worker.take_report()
    assert (list(report.lost), report.differing) == (["a"], [1])
    assert append_ns + report.append_ns > 0, "the executor's time reaches the scheduler's side"
    writes.lose("a")
    writes.disown(report.differing)
    tracks["c"] = writes.tracks["c"] = Track(Identity(name="c"), KeyChain(b"a", block_tokens=TOKENS), list(range(17)))
    again = writes.step([Scheduled("c", [1, 5, 6], True, 8, 17, hit=8)], step=3)
    assert again.writes[0].full == ((0, 1), (1, 5)), "who uses the block saves what it holds now"
    worker.close()
    scribe.close()
    for name in ("a", "b"):
        client.finish(request_key(name))
    client.close()
