"""The worker side with a real journal and executor, under an engine that is made up.

Invariant: whatever the engine does (chunks, shared prefixes, preemption, blocks given to others, requests that end), every token of every living
request is in the journal, and comes back in another engine byte for byte.
"""

from __future__ import annotations

import os
import pathlib
import random
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import torch

from concordia import config
from concordia.integrations.vllm import compat
from concordia.integrations.vllm import rank as rank_room
from concordia.integrations.vllm.graph_places import Placed
from concordia.integrations.vllm.identity import Identity, KeyChain
from concordia.integrations.vllm.load import Load, PieceRef
from concordia.integrations.vllm.metadata import StepMetadata
from concordia.integrations.vllm.scribe import Scribe
from concordia.integrations.vllm.settings import Settings
from concordia.integrations.vllm.step_writes import Scheduled
from concordia.integrations.vllm.track import Track
from concordia.integrations.vllm.worker_side import WorkerSide
from concordia.integrations.vllm.write_set import WriteSet
from concordia.journal.client import JournalClient
from concordia.journal.owner import spawn_owner
from concordia.journal.record import request_key
from concordia.recovery.restore import plan_restore, verify
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Completion, Task, Ticket

LAYERS, BLOCKS, HEADS, TOKENS, DIM = 3, 24, 2, 8, 8


@pytest.fixture(scope="module")
def journal() -> Iterator[pathlib.Path]:
    path = pathlib.Path("/dev/shm") / f"concordia-round-{os.getpid()}"
    shutil.rmtree(path, ignore_errors=True)
    spawn_owner(path, size_bytes=64 << 20, segment_bytes=1 << 20, linger_s=120)
    yield path
    JournalClient.connect(path).shutdown()


@pytest.fixture(autouse=True)
def made_up_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "why_unprotected", lambda *_: None)
    monkeypatch.setattr(compat, "block_tokens", lambda *_: TOKENS)
    monkeypatch.setattr(compat, "world_size", lambda *_: 1)
    monkeypatch.setattr(compat, "worker_rank", lambda *_: 0)
    monkeypatch.setattr(compat, "cpu_instruction_set", lambda *_: "x86_64-vec")


def tensors() -> dict[str, torch.Tensor]:
    return {f"l{i}": torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM, dtype=torch.bfloat16) for i in range(LAYERS)}


def worker(journal: pathlib.Path, kv: dict[str, torch.Tensor], replica: int, layout: str = "auto") -> WorkerSide:
    spec = SimpleNamespace(head_size=DIM)
    cache = SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
    made = WorkerSide(Settings(journal, replica=replica, layout=layout), None, cache)
    made.register_kv_caches(kv)
    return made


def token_bytes(kv: dict[str, torch.Tensor], blocks: list[int], position: int) -> torch.Tensor:
    """K and V of one token in all layers, where the CPU backend has them."""
    block, slot = blocks[position // TOKENS], position % TOKENS
    parts = []
    for tensor in kv.values():
        view = tensor.view(torch.int16).view(BLOCKS, HEADS, 2, TOKENS * DIM)[block]
        parts += [view[:, 0].view(HEADS, DIM, TOKENS)[:, :, slot], view[:, 1].view(HEADS, TOKENS, DIM)[:, slot, :]]
    return torch.stack([part.contiguous() for part in parts])


@dataclass
class Asked:
    name: str
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    is_new: bool = True  # its next step replaces its blocks
    hit: int = 0
    most: int = 0  # computed in any life: an older life that reached further is the better cut


class Engine:
    """Schedules at random; its cache is real memory, its model is a random number generator."""

    def __init__(self, journal: pathlib.Path, rng: random.Random, *, replica: int, layout: str) -> None:
        self.rng = rng
        self.kv = tensors()
        self.worker = worker(journal, self.kv, replica, layout)
        self.client = JournalClient.connect(journal)
        assert self.worker._layout is not None
        self.layout_hash = self.worker._layout.geometry.layout_hash()
        settings = Settings(journal, replica=replica)
        self.scribe = Scribe(settings, self.client, layout_hash=self.layout_hash, world=1)
        self.writes = WriteSet(block_tokens=TOKENS)
        self.asked: dict[str, Asked] = {}
        self.owners: dict[int, int] = dict.fromkeys(range(1, BLOCKS), 0)
        self.step_number = 0
        self.late_count = 0
        self.count = 0
        self.replica = replica

    def arrive(self) -> None:
        self.count += 1
        name = f"{self.replica}-{self.count}"
        tokens = [self.rng.randrange(50) for _ in range(self.rng.randrange(3, 30))]
        new = Asked(name, tokens)
        donor = self.rng.choice([*self.asked.values(), None])
        if donor is not None and donor.computed >= TOKENS:
            new.hit = min(donor.computed, len(donor.tokens) - 1) // TOKENS * TOKENS
            new.tokens = donor.tokens[: new.hit] + tokens
            new.blocks = donor.blocks[: new.hit // TOKENS]
            new.computed = new.hit
            for block in new.blocks:
                self.owners[block] += 1
        self.asked[name] = new
        self.writes.tracks[name] = Track(Identity(name=name), KeyChain(b"seed", block_tokens=TOKENS), new.tokens)

    def leave(self, name: str) -> None:
        self.release(self.asked.pop(name))
        for note in self.writes.finish(name, step=self.step_number).notes:
            self.scribe.note_keys(note, step=self.step_number)

    def release(self, gone: Asked) -> None:
        for block in gone.blocks:
            self.owners[block] -= 1
        gone.blocks, gone.computed, gone.hit, gone.is_new = [], 0, 0, True

    def step(self) -> None:
        self.step_number += 1
        scheduled = []
        for asked in list(self.asked.values()):
            if asked.computed == len(asked.tokens):
                continue
            end = min(len(asked.tokens), asked.computed + self.rng.choice([1, 1, 1, 5, 40]))
            free = [block for block, users in self.owners.items() if not users]
            need = -(-end // TOKENS) - len(asked.blocks)
            if need > len(free):
                if not asked.is_new:
                    self.release(asked)
                continue
            fresh = self.rng.sample(free, need)
            for block in fresh:
                self.owners[block] = 1
            asked.blocks += fresh
            ids = asked.blocks if asked.is_new else fresh
            scheduled.append(
                Scheduled(asked.name, list(ids), asked.is_new, asked.computed, end, hit=asked.hit if asked.is_new else 0)
            )
        result = self.writes.step(scheduled, step=self.step_number)
        assert result.lost == []
        meta = StepMetadata(self.step_number, len(scheduled), result.writes, result.reused)
        self.worker.before_step(meta)
        for item in scheduled:
            asked = self.asked[item.request]
            for position in range(item.start, item.end):
                self.compute(asked.blocks, position)
            asked.computed, asked.is_new = item.end, False
            asked.most = max(asked.most, item.end)
            if item.end == len(asked.tokens):
                asked.tokens.append(self.rng.randrange(50))
        self.worker.save(meta)
        for note in result.notes:
            self.scribe.note_keys(note, step=self.step_number)
        report = self.worker.take_report()
        self.writes.spread(report.has_rows)
        self.late_count += sum(len(track.late) for track in self.writes.tracks.values())
        assert report.lost == {}
        assert report.missed == {}
        if scheduled and self.rng.random() < 0.1:  # as if the journal had had no room from some token on
            asked = self.asked[self.rng.choice(scheduled).request]
            self.writes.rewind(asked.name, self.rng.randrange(asked.computed))

    def compute(self, blocks: list[int], position: int) -> None:
        block, slot = blocks[position // TOKENS], position % TOKENS
        for tensor in self.kv.values():
            view = tensor.view(torch.int16).view(BLOCKS, HEADS, 2, TOKENS * DIM)[block]
            fresh = torch.randint(-30000, 30000, (2, HEADS, DIM), dtype=torch.int16)
            view[:, 0].view(HEADS, DIM, TOKENS)[:, :, slot] = fresh[0]
            view[:, 1].view(HEADS, TOKENS, DIM)[:, slot, :] = fresh[1]

    def close(self) -> None:
        self.worker.close()
        self.scribe.close()
        self.client.close()


class Graphs:
    """Places of graphs that an engine on a GPU would have captured: what is handed in before a step runs when all of it is there, at random
    steps; others are launched layer by layer, or in another stream.
    """

    def __init__(self, runtime: Runtime, rng: random.Random) -> None:
        self.runtime, self.rng = runtime, rng
        self.count, self.step_count, self.busy_ns = 1, 0, 0
        self.given: list[Task] = []
        self.tickets: list[Ticket] = []
        self.is_handed = False

    def begin_step(self, rank: int) -> None:
        self.is_handed = False

    def takes(self, count: int) -> bool:
        return self.rng.random() < 0.7

    def hand_in(self, tasks: list[Task]) -> list[Placed]:
        self.is_handed = True
        self.given += tasks
        first = len(self.tickets)
        return [Placed(Ticket(first + i)) for i in range(len(tasks))]

    def end_step(self) -> bool:
        self.step_count += self.is_handed
        if self.rng.random() < 0.7:  # else the GPU is a step behind
            self.flush()
        return self.is_handed

    def flush(self) -> None:
        self.tickets += [self.runtime.submit(task) for task in self.given]
        self.given.clear()

    def result(self, ticket: Ticket) -> Completion | None:
        return self.runtime.result(self.tickets[ticket]) if ticket < len(self.tickets) else None

    def wait(self, ticket: Ticket, timeout_s: float) -> Completion:
        assert ticket < len(self.tickets), "it waits for a place that nobody is bound to reach"
        return self.runtime.wait(self.tickets[ticket], timeout_s)


@pytest.mark.parametrize("layout", ["auto", "blocks", "graphs"])
def test_every_living_request_comes_back_byte_for_byte_when_its_engine_is_gone(
    journal: pathlib.Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "FULL_BLOCKS_AT_ONCE", 0)  # decode's blocks all follow later
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    graphs: list[Graphs] = []
    if layout == "graphs":
        layout = "auto"

        def open_places(runtime: Runtime, *_: Any, **__: Any) -> Graphs | None:
            if graphs:  # the engine that restores has none
                return None
            graphs.append(Graphs(runtime, rng))
            return graphs[0]

        monkeypatch.setattr(rank_room, "open_places", open_places)
    engine = Engine(journal, rng, replica=secrets.randbits(40), layout=layout)
    for turn in range(1000):
        if turn >= 120 and any(0 < asked.computed == asked.most for asked in engine.asked.values()):
            break
        if rng.random() < 0.25 and len(engine.asked) < 6:
            engine.arrive()
        if rng.random() < 0.08 and engine.asked:
            engine.leave(rng.choice(list(engine.asked)))
        if rng.random() < 0.05 and engine.asked:
            engine.release(engine.asked[rng.choice(list(engine.asked))])
        engine.step()
    truth = {
        asked.name: [token_bytes(engine.kv, asked.blocks, p) for p in range(asked.computed)]
        for asked in engine.asked.values()
        if asked.computed == asked.most
    }
    engine.close()
    assert (engine.late_count > 0) == (layout == "auto")
    assert all(found.step_count > 20 for found in graphs)
    fresh = tensors()
    second = worker(journal, fresh, secrets.randbits(40))
    client = JournalClient.connect(journal)
    pool, _ = client.map()
    assert truth
    for name, wanted in truth.items():
        cut = client.cut(request_key(name), tokens_known=len(wanted) + 1, layout_hash=engine.layout_hash, world=1)
        assert cut.tokens == len(wanted), name
        if not wanted:
            continue
        plan = plan_restore(
            cut, world=1, layout_hash=engine.layout_hash, pool=pool.view, segment_bytes=pool.segment_bytes
        )
        verify(plan, pool.view, deadline=float("inf"))
        blocks = rng.sample(range(1, BLOCKS), -(-len(wanted) // TOKENS))
        pieces = tuple(
            PieceRef(p.kind, p.token_start, p.token_end, p.pool_offset, p.payload_bytes, p.payload_hash)
            for p in plan.pieces[0]
        )
        meta = StepMetadata(loads=[Load(name, tuple(blocks), 0, {0: pieces})])
        assert second.load(meta) == set()
        for position, expected in enumerate(wanted):
            assert torch.equal(token_bytes(fresh, blocks, position), expected), f"{name}, token {position}"
    # One damaged byte: refused on the device too, and every block of the request is reported.
    damaged = pieces[-1]._replace(payload_hash=pieces[-1].payload_hash ^ 1)
    meta = StepMetadata(loads=[Load("x", tuple(blocks), 0, {0: (*pieces[:-1], damaged)})])
    assert second.load(meta) == set(blocks)
    assert second.take_report().loaded == {name: 0 for name in truth if truth[name]} | {"x": 1}
    second.close()
    for number in range(1, engine.count + 1):
        client.finish(request_key(f"{engine.replica}-{number}"))
    client.close()


def test_request_is_lost_by_name_when_the_journal_is_full(tmp_path: pathlib.Path) -> None:
    path = pathlib.Path("/dev/shm") / f"concordia-full-{os.getpid()}"
    shutil.rmtree(path, ignore_errors=True)
    spawn_owner(path, size_bytes=8 << 20, segment_bytes=1 << 20, linger_s=60)
    kv = tensors()
    side = worker(path, kv, 1)
    client = JournalClient.connect(path)
    writes = WriteSet(block_tokens=TOKENS)
    writes.tracks["a"] = Track(Identity(name="a"), None, list(range(10**6)))
    missed: dict[str, tuple[int, str]] = {}
    for step in range(1, 4000):
        writes.tracks["a"].covered = 0  # the same tokens again and again, all of them wanted
        writes.tracks["a"].lives = step % 900
        done = writes.step([Scheduled("a", list(range(1, 11)), True, 0, 80)], step=step)
        meta = StepMetadata(step, 80, done.writes, [])
        side.before_step(meta)
        side.save(meta)
        side._live_pump().drain(timeout_s=5)
        side.before_step(StepMetadata(step))
        missed = side.take_report().missed
        if missed:
            break
    assert missed["a"][1] == "the journal had no room"
    side.close()
    client.shutdown()
