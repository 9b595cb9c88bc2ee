"""Invariants: no append is refused while the journal holds bytes that nobody wants, however fast whole batches come and go, and after an
engine was killed and its requests were restored or computed anew; what runs keeps its protection; what goes, goes in order.

Batches of an 8B model on a fast GPU, 1/64 of their bytes and all of their records, against the owner that serves them: its rounds run
in between on a clock of their own, which goes on by what a round, each record that it reads and each byte that it copies take in full size.
So a round sees what it would see, however busy the machine is."""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from concordia import abi, config
from concordia.errors import JournalFull
from concordia.integrations.vllm.identity import Identity, KeyChain
from concordia.integrations.vllm.retry import Retries
from concordia.integrations.vllm.step_writes import Scheduled, StepWrites
from concordia.integrations.vllm.track import Track
from concordia.integrations.vllm.write_set import WriteSet
from concordia.journal.control import Identity as Writer
from concordia.journal.folder import Folder
from concordia.journal.owner import Owner
from concordia.journal.record import payload_hash, request_key
from concordia.journal.segment import Board, Pool
from concordia.journal.stream_state import Stream
from concordia.journal.writer import Entry, StreamWriter
from concordia.testing.journal import key_payload

SCALE = 64
BLOCK = 16  # tokens
TOKEN_BYTES = (128 << 10) // SCALE
SEGMENT_BYTES = (64 << 20) // SCALE
SEGMENTS = 240  # 15 GiB
KV_BLOCKS = 6144  # 12 GiB
BATCH, PROMPT, ANSWER = 32, 2048, 170
STEP_TOKENS = 8192  # of a prefill, a second and a quarter of a GiB
PREFILL_S, DECODE_S = STEP_TOKENS / 35_800, 0.007  # 4.7 GB/s
APPEND_TOKENS = 300_000  # in a second: a step's appends come at its end, at 40 GB/s
ROUND_S, RECORD_S = 0.003, 50e-6  # a round of the owner, and each record that it reads; three times what was measured
COPY_BYTES = (2 << 30) // SCALE  # in a second, by the owner: a payload is hashed, then copied
ZEROES = memoryview(bytes(BLOCK * TOKEN_BYTES))
HASHES = {tokens: payload_hash(ZEROES[: tokens * TOKEN_BYTES]) for tokens in range(1, BLOCK + 1)}


class World:
    """An owner, and the time that passes for it."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch, *, slowness: float = 1.0) -> None:
        self.now = 1000.0
        self._slowness = slowness
        patch.setattr(time, "monotonic", lambda: self.now)
        patch.setattr("concordia.journal.privacy.lock", lambda _: True)
        home = Folder(path)
        home.make()
        pool = Pool.create(home.pool, size=SEGMENTS * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES)
        board = Board.create(home.board, segment_bytes=SEGMENT_BYTES, segment_count=SEGMENTS)
        self.owner = Owner(home, pool, board, linger_s=1e9)
        self.owner.streams.free.extend(range(SEGMENTS))
        self.owner.listen()
        self.streams = self.owner.streams
        self.numbers = itertools.count()  # token ids: no two prompts share any
        self.refused: list[tuple[float, str]] = []
        self.rounds: list[float] = []  # seconds
        self._next = self.now

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self._next <= until:
            self.now = self._next
            self.ask(self.owner.round)
            self._next += config.OWNER_POLL_S
        self.now = until

    def ask(self, work: Any) -> Any:
        """The owner's time goes into this; meanwhile it does nothing else."""
        copied, read = self.owner.cleaner.copied_bytes, self._read()
        answer = work()
        copied, read = self.owner.cleaner.copied_bytes - copied, self._read() - read
        self.rounds.append((ROUND_S + read * RECORD_S + copied / COPY_BYTES) * self._slowness)
        self._next = max(self._next, self.now) + self.rounds[-1]
        return answer

    def _read(self) -> int:
        return sum(stream.reader.sequence for stream in self.streams.by_slot.values())

    def answer(self, operation: str, **arguments: Any) -> Any:
        return self.ask(lambda: json.loads(json.dumps(self.owner.office.answer(None, operation, arguments))))  # type: ignore[arg-type]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for _, event in self.streams.index.events if event["event"] == kind]

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.owner.close()
        self.streams.pool.close()
        self.streams.board.close()


class SparseWriter(StreamWriter):
    """Payloads are zeroes, and their hashes are known."""

    def put(self, entry: Entry, tokens: int) -> None:
        self.append(entry, ZEROES[: tokens * TOKEN_BYTES], payload_hash=HASHES[tokens])


class Engine:
    """What an engine's scheduler and worker do to a journal: write set, notes, endings, and what it believes of the journal's keys."""

    def __init__(self, world: World, replica: int) -> None:
        self.world = world
        self.replica = replica
        self.writes = WriteSet(block_tokens=BLOCK)
        self.retries = Retries()
        self.rank, self._kv = self._open(abi.WRITER_RANK)
        self.scheduler, self._notes = self._open(abi.WRITER_SCHEDULER)
        self._free = deque(range(KV_BLOCKS))
        self._step = self._step_before = 0
        self._refresh_at = world.now
        self._cursor = 0
        self.writes.spread(True)
        self._endings: deque[tuple[float, int, int]] = deque()

    def _open(self, kind: int) -> tuple[Stream, SparseWriter]:
        streams = self.world.streams
        stream = streams.open(Writer(0, kind, 0, 1, 1, 1, self.replica, 1), f"kind {kind} of {self.replica}")
        writer = SparseWriter(streams.pool.view, stream.control, segment_bytes=SEGMENT_BYTES, stream=stream.identity.stream)
        return stream, writer

    def run_batch(self, batch: int, *, count: int = BATCH, tokens: int = PROMPT, steps: int = ANSWER) -> list[str]:
        """New requests, until each has its answer."""
        names = [f"{self.replica}-{batch}-{index}" for index in range(count)]
        for name in names:
            self.start(name, list(itertools.islice(self.world.numbers, tokens)))
        self.prefill(names)
        self.answer(names, steps)
        return names

    def answer(self, names: list[str], steps: int = ANSWER) -> None:
        for _ in range(steps):
            self.decode(names)

    def die(self) -> None:
        """It is sealed at once, and known to be gone a moment later."""
        streams = [self.rank, self.scheduler]
        for stream in streams:
            self.world.streams.seal(stream)
        self.world.pass_time(0.3)
        for stream in streams:
            self.world.streams.release(stream)

    def start(self, name: str, tokens: list[int], *, incarnation: int = 1) -> None:
        chain = KeyChain(b"seed", block_tokens=BLOCK)
        self.writes.tracks[name] = Track(Identity(name, incarnation=incarnation), chain, tokens, 1)

    def prefill(self, names: list[str], *, have: dict[str, dict[int, int]] | None = None) -> None:
        """Whole prompts, in steps of STEP_TOKENS; `have` are blocks that were restored instead, by key."""
        batch: list[Scheduled] = []
        for name in names:
            loaded = (have or {}).get(name, {})
            end = len(self.writes.tracks[name].tokens)
            blocks = [self._free.popleft() for _ in range(-(-end // BLOCK))]
            batch.append(Scheduled(name, blocks, True, (max(loaded, default=-1) + 1) * BLOCK, end, loaded_keys=loaded))
            if sum(item.end - item.start for item in batch) + PROMPT > STEP_TOKENS or name == names[-1]:
                self._run(batch, PREFILL_S * sum(item.end - item.start for item in batch) / STEP_TOKENS)
                batch = []

    def decode(self, names: list[str]) -> None:
        """One token for each."""
        batch = []
        for name in names:
            track = self.writes.tracks[name]
            track.tokens.append(next(self.world.numbers))  # type: ignore[attr-defined]
            end = len(track.tokens)
            more = [self._free.popleft()] if len(track.blocks) * BLOCK < end else []
            batch.append(Scheduled(name, more, False, end - 1, end))
        self._run(batch, DECODE_S)

    def end(self, names: list[str]) -> None:
        for name in names:
            track = self.writes.tracks[name]
            self._free.extend(track.blocks)
            self._note(self.writes.finish(name, step=self._step))
            self._endings.append((self.world.now + config.FINISH_LINGER_S, track.identity.key, track.incarnation))

    def _run(self, batch: list[Scheduled], seconds: float) -> None:
        self._step += 1
        self._announce(sum(item.end - item.start for item in batch))
        self._tend()
        result = self.writes.step(batch, step=self._step)
        self._note(result)
        self.world.pass_time(seconds)
        missed: dict[str, int] = {}
        for write in result.writes:
            entry = Entry(abi.KIND_KV_BLOCK, write.key, write.incarnation, layout_hash=1, flags=BLOCK, model_hash=1, step=self._step)
            places = [(index * BLOCK, index * BLOCK + BLOCK) for index, _ in write.full] + ([write.tail[:2]] if write.tail else [])
            for start, end in places:
                kind = abi.KIND_KV_BLOCK if end - start == BLOCK and (start, end) != (write.tail or ())[:2] else abi.KIND_KV_TAIL
                try:
                    if write.request not in missed:
                        self._kv.put(entry._replace(kind=kind, token_start=start, token_end=end), end - start)
                except JournalFull:
                    missed[write.request] = start
                self.world.pass_time((end - start) / APPEND_TOKENS)
        for name, token in missed.items():
            self.world.refused.append((self.world.now, name))
            self.writes.rewind(name, token)
            self.writes.tracks[name].is_resting = True
            self.retries.miss(name, now=self.world.now)

    def _announce(self, tokens: int) -> None:
        self.scheduler.control.store("step_done", self._step - 1)
        self.scheduler.control.store("step_tokens", tokens)
        self.scheduler.control.store("step_started", self._step)

    def try_out(self) -> None:
        """What a server asks each engine before it counts as ready."""
        self.end(self.run_batch(-1, count=1, tokens=20, steps=4))

    def _note(self, result: StepWrites) -> None:
        assert not result.lost
        for note in result.notes:
            self._notes.append(Entry(abi.KIND_BLOCK_KEY, note.key, note.incarnation), key_payload(dict(note.entries)))

    def _tend(self) -> None:
        """What the scribe's thread does beside the steps."""
        now = self.world.now
        while self._endings and self._endings[0][0] <= now:
            _, key, incarnation = self._endings.popleft()
            self._notes.append(Entry(abi.KIND_FINISH, key, incarnation), b"")
        self.retries.take_recovered(now=now)
        for name in self.retries.take_due(now=now):
            if name in self.writes.tracks:
                self.writes.tracks[name].is_resting = False
        if now < self._refresh_at:
            return
        self._refresh_at = now + config.KNOWN_KEYS_REFRESH_S
        before, self._step_before = self._step_before, self._step
        told = self.world.answer("key_news", layout_hash=1, world=1, after=self._cursor)
        self._cursor = told["cursor"]
        if told["is_all"]:
            self.writes.learn(set(told["come"]), before_step=before)
        else:
            self.writes.learn_news(told["come"], told["gone"], before_step=before)


def check_whole(world: World, engine: Engine, names: Iterable[str]) -> None:
    """Every request of these could go on from its last token but one."""
    world.pass_time(0.2)
    for stream in (engine.rank, engine.scheduler):
        stream.source.is_final = True
    for name in names:
        tokens = len(engine.writes.tracks[name].tokens)
        cut = world.streams.index.cuts.longest(request_key(name), tokens_known=tokens, layout_hash=1, world=1)
        assert cut.tokens == tokens - 1, name
    for stream in (engine.rank, engine.scheduler):
        stream.source.is_final = False


def check_calm(world: World) -> None:
    """Nobody was refused anything, and nobody lost protection."""
    assert world.refused == []
    assert world.events("full") == world.events("unprotected") == []


@pytest.mark.parametrize(("slowness", "standbys"), [(1, 0), (3, 0), (1, 2), (1, 6)])
def test_nothing_is_refused_when_one_batch_follows_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slowness: int, standbys: int
) -> None:
    with World(tmp_path / "journal", monkeypatch, slowness=slowness) as world:
        engine, *others = (Engine(world, 1 + replica) for replica in range(1 + standbys))
        for one in (engine, *others):
            one.try_out()
        for batch in range(4):
            names = engine.run_batch(batch)
            check_whole(world, engine, names)
            engine.end(names)
        check_calm(world)
        assert world.owner.cleaner.evicted_blocks > BATCH * PROMPT // BLOCK, "everything fitted: this tested nothing"


def kill(world: World) -> tuple[Engine, list[str], dict[str, list[int]]]:
    """An engine dies in its third batch; its successor, and the requests as their clients have them."""
    engine = Engine(world, 1)
    standby = Engine(world, 2)
    for batch in range(2):
        engine.end(engine.run_batch(batch))
    names = engine.run_batch(2)
    engine.die()
    return standby, names, {name: list(engine.writes.tracks[name].tokens) for name in names}


@pytest.mark.parametrize("way", ["restored", "computed anew", "from their prompts"])
def test_nothing_is_refused_when_requests_of_a_dead_engine_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    with World(tmp_path / "journal", monkeypatch) as world:
        standby, names, tokens = kill(world)
        have: dict[str, dict[int, int]] = {}
        for name in names:
            cut = world.answer("cut", key=request_key(name), tokens_known=len(tokens[name]), layout_hash=1, world=1)
            assert cut["tokens"] == len(tokens[name]) - 1
            if way == "restored":
                # a block that was to follow later has no key yet, and comes back from its tails
                have[name] = {index: key for index, key in enumerate(cut["block_keys"]) if key}
            standby.start(name, tokens[name][: PROMPT if way == "from their prompts" else None], incarnation=2)
        world.pass_time(1.0)  # the owner has answered, and what it told is verified
        assert world.streams.pins.segments(), "what was told may be taken away"
        standby.prefill(names, have=have)
        world.pass_time(0.2)
        assert not world.streams.pins.segments(), "every request has written, so nothing is read any more"
        standby.answer(names)
        check_whole(world, standby, names)
        standby.end(names)
        for batch in range(3):
            names = standby.run_batch(batch)
            check_whole(world, standby, names)
            standby.end(names)
        check_calm(world)


def test_older_lives_go_by_name_and_only_after_what_nobody_wants_when_two_of_each_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with World(tmp_path / "journal", monkeypatch) as world:
        standby, names, tokens = kill(world)
        index = world.streams.index
        segments_idle: list[int] = []
        give_up = index.give_up_superseded

        def watch(reason: str) -> bool:
            held = (index.ledger.live(segment) for _, segment, _ in world.streams.cleanable())
            segments_idle.append(sum(all(index.keys.last_use(block) is not None for block in blocks) for blocks in held))
            return give_up(reason)

        monkeypatch.setattr(index, "give_up_superseded", watch)
        for name in names:
            standby.start(name, tokens[name][:PROMPT], incarnation=2)
        standby.prefill(names)
        world.pass_time(1.0)
        told = world.events("shortened")
        assert 0 < len(told) < BATCH
        assert all(event["reason"] and 0 < event["tokens"] <= ANSWER for event in told), "not where least is lost"
        assert max(segments_idle) == 0
        check_calm(world)
        left = [name for name in names if len(index.requests[request_key(name)].incarnations) == 2]
        assert len(left) == BATCH - len(told)
        for name in left:
            bounds = {"bounds": {1: len(tokens[name])}}
            cut = index.cuts.longest(request_key(name), tokens_known=len(tokens[name]), layout_hash=1, world=1, **bounds)
            assert (cut.tokens, cut.incarnation) == (len(tokens[name]) - 1, 1000)
