"""Invariants: a cut is the longest prefix that every rank of one incarnation has, as a brute-force reader of the same records computes it;
its pieces, applied in order, give each token the bytes that were written last for it in that incarnation, or those of its block key;
committed and match_prefix agree with it; finished, superseded and dropped requests hold nothing."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from concordia import abi
from concordia.integrations.vllm import identity
from concordia.journal import record
from concordia.journal.coverage import Cut
from concordia.journal.ledger import Source
from concordia.journal.life import INCARNATION_STRIDE
from concordia.journal.record import Record
from concordia.journal.replay import ReplayIndex
from concordia.testing.journal import key_payload

BLOCK = 4
SEGMENT = 1 << 16
REQUESTS = (101, 102, 103)
LAYOUT = 5


@dataclass
class Life:
    """One incarnation of one request in the model: per rank, the tokens and what wrote them last."""

    replica: int
    tokens: dict[int, dict[int, str]] = field(default_factory=dict)  # rank: token: bytes, as a word
    blocks: dict[tuple[int, int], str] = field(default_factory=dict)  # rank, index: bytes of the whole block
    keys: dict[int, int] = field(default_factory=dict)


class Bench:
    """Feeds records to an index and to a model that remembers every byte by a word."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.index = ReplayIndex(SEGMENT)
        self.view = bytearray(1 << 22)
        self.at = 0
        self.words: dict[int, str] = {}  # payload offset: what it holds
        self.lives: dict[tuple[int, int], Life] = {}
        self.keyed: dict[int, dict[int, dict[int, str]]] = {}  # key: replica: rank: bytes
        self.chosen: dict[int, int] = {}
        self.sources: dict[tuple[int, int, int], Source] = {}
        self.sequence = itertools.count()

    def source(self, kind: int, rank: int, replica: int) -> Source:
        name = kind, rank, replica
        if name not in self.sources:
            number = len(self.sources) + 1
            self.sources[name] = Source(number, kind, rank, self.world, replica, LAYOUT)
        return self.sources[name]

    def put(  # noqa: PLR0917  (as the header has them)
        self, kind: int, source: Source, key: int, incarnation: int, start: int, end: int, payload: bytes
    ) -> Record:
        sequence = next(self.sequence)
        made = Record(
            kind, 1, sequence, 0, key, incarnation, 0, BLOCK, start, end, len(payload),
            record.payload_hash(payload), 0, LAYOUT, 0, sequence, 0, 0, self.at, 0,
        )  # fmt: skip
        self.view[made.payload_offset : made.payload_offset + len(payload)] = payload
        self.at = made.end_offset
        self.index.ingest(made, source, memoryview(self.view))
        return made

    def write(  # noqa: PLR0917  (who, where, what)
        self, key: int, incarnation: int, rank: int, replica: int, start: int, end: int, *, lost: set[int]
    ) -> None:
        """One step of one rank, as the contract of write ranges says; `lost` are records that found no segment."""
        life = self.lives.setdefault((key, incarnation), Life(replica))
        source = self.source(abi.WRITER_RANK, rank, replica)
        spans = []
        for index in range(start // BLOCK, end // BLOCK):
            spans.append((abi.KIND_KV_BLOCK, index * BLOCK, (index + 1) * BLOCK))
        tail_start = max(start, end // BLOCK * BLOCK)
        if tail_start < end:
            spans.append((abi.KIND_KV_TAIL, tail_start, end))
        for number, (kind, low, high) in enumerate(spans):
            word = f"{key} {incarnation} {rank} {replica} {low} {high}"
            if number in lost:
                continue
            made = self.put(kind, source, key, incarnation, low, high, word.encode())
            self.words[made.payload_offset] = word
            tokens = life.tokens.setdefault(rank, {})
            for token in range(low, high):
                tokens[token] = word
            if kind == abi.KIND_KV_BLOCK:
                life.blocks[rank, low // BLOCK] = word
                if low // BLOCK in life.keys:
                    self.name(life, rank, low // BLOCK)

    def note_key(self, key: int, incarnation: int, replica: int, index: int, name: int) -> None:
        life = self.lives.setdefault((key, incarnation), Life(replica))
        self.put(
            abi.KIND_BLOCK_KEY, self.source(abi.WRITER_SCHEDULER, 0, replica), key, incarnation, 0, 0,
            key_payload({index: name}),
        )  # fmt: skip
        life.keys[index] = name
        for rank in range(self.world):
            self.name(life, rank, index)

    def name(self, life: Life, rank: int, index: int) -> None:
        word = life.blocks.get((rank, index))
        if word is not None:
            ranks = self.keyed.setdefault(life.keys[index], {}).setdefault(life.replica, {})
            ranks.setdefault(rank, word)

    def shared(self, life: Life, rank: int, index: int) -> str | None:
        """Bytes of a block through its key: the replica's own, else those of the first complete one."""
        name = life.keys.get(index)
        if name is None or name not in self.keyed:
            return None
        pieces = self.keyed[name]
        if life.replica in pieces:
            return pieces[life.replica].get(rank)
        if name not in self.chosen:
            for replica, ranks in pieces.items():
                if len(ranks) == self.world:
                    self.chosen[name] = replica
                    break
        return pieces[self.chosen[name]].get(rank) if name in self.chosen else None

    def reach(self, life: Life, rank: int) -> tuple[int, dict[int, str]]:
        """Token by token: the slow and plain way."""
        found: dict[int, str] = {}
        token = 0
        while True:
            index = token // BLOCK
            own = life.tokens.get(rank, {}).get(token)
            shared = self.shared(life, rank, index)
            is_block_own = (rank, index) in life.blocks
            if own is not None and (is_block_own or shared is None):
                found[token] = own
            elif shared is not None:
                found[token] = shared
            elif own is not None:
                found[token] = own
            else:
                return token, found
            token += 1

    def expected_cut(self, key: int) -> tuple[int, int, dict[int, dict[int, str]]]:
        best = (0, 0, {})
        for (request, incarnation), life in self.lives.items():
            if request == key:
                reached = {rank: self.reach(life, rank) for rank in range(self.world)}
                tokens = min(end for end, _ in reached.values())
                if (tokens, incarnation) > best[:2] and tokens:
                    best = tokens, incarnation, {rank: found for rank, (_, found) in reached.items()}
        return best


def applied(bench: Bench, cut: Cut, rank: int) -> dict[int, str]:
    found = {}
    for piece in cut.pieces[rank]:
        for token in range(piece.token_start, piece.token_end):
            found[token] = bench.words[piece.pool_offset]
    return found


@st.composite
def histories(draw: st.DrawFn) -> Bench:
    """Requests with shared prefixes on one or two replicas, preempted, with losses and late keys."""
    bench = Bench(draw(st.integers(1, 3)))
    at: dict[tuple[int, int, int], int] = {}
    lives = dict.fromkeys(REQUESTS, 1)
    homes = {key: draw(st.integers(1, 2)) for key in REQUESTS}
    skipped: dict[tuple[int, int], int] = {}
    for _ in range(draw(st.integers(1, 40))):
        key = draw(st.sampled_from(REQUESTS))
        action = draw(st.sampled_from(["step", "step", "step", "key", "preempt", "hit"]))
        if action == "preempt":
            lives[key] += 1
            homes[key] = draw(st.integers(1, 2))
            event("preempted")
        elif action == "hit" and (key, lives[key]) not in bench.lives:
            count = draw(st.integers(1, 3))  # these blocks came from a prefix: only their keys are written
            skipped[key, lives[key]] = count
            for index in range(count):
                bench.note_key(key, lives[key], homes[key], index, 1000 + index)
            for rank in range(bench.world):
                at[key, lives[key], rank] = count * BLOCK
        elif action == "key":
            index = draw(st.integers(0, 4))
            if index >= skipped.get((key, lives[key]), 0):
                own = draw(st.booleans())  # the same prefix for all requests, or bytes of its own
                name = 1000 + index if not own else key * 10_000 + lives[key] * 100 + index
                life = bench.lives.get((key, lives[key]))
                if life is None or index not in life.keys:
                    bench.note_key(key, lives[key], homes[key], index, name)
        else:
            size = draw(st.integers(1, 11))
            for rank in range(bench.world):
                if draw(st.integers(0, 9)) == 0:
                    continue  # this rank was slower than the crash
                start = at.get((key, lives[key], rank), 0)
                lost = {0} if draw(st.integers(0, 15)) == 0 else set()
                bench.write(key, lives[key], rank, homes[key], start, start + size, lost=lost)
                at[key, lives[key], rank] = start + size
    return bench


@settings(max_examples=300, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
@given(histories())
def test_cut_equals_the_brute_force_one_for_random_histories(bench: Bench) -> None:
    for source in bench.sources.values():
        source.is_final = True
    for key in REQUESTS:
        tokens, incarnation, words = bench.expected_cut(key)
        cut = bench.index.cuts.longest(key, tokens_known=10_000, layout_hash=LAYOUT, world=bench.world)
        assert (cut.tokens, cut.incarnation) == (tokens, incarnation)
        for rank in range(bench.world if tokens else 0):
            got = applied(bench, cut, rank)
            assert {t: got[t] for t in range(tokens)} == {t: words[rank][t] for t in range(tokens)}
        newest = max((i for request, i in bench.lives if request == key), default=None)
        if newest is not None and bench.lives[key, newest].tokens:
            life = bench.lives[key, newest]
            assert bench.index.cuts.committed(key) == min(bench.reach(life, r)[0] for r in range(bench.world))
        capped = bench.index.cuts.longest(key, tokens_known=6, layout_hash=LAYOUT, world=bench.world)
        assert capped.tokens == min(tokens, 5)
        assert all(p.token_start < 5 for pieces in capped.pieces.values() for p in pieces)


@settings(max_examples=100, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), st.data())
def test_nothing_is_held_when_all_requests_have_finished_and_blocks_were_let_go(bench: Bench, data: st.DataObject) -> None:
    index = bench.index
    for key in data.draw(st.permutations(REQUESTS)):
        index.finish(key, now=0.0)
    index.settle(1e9)
    held = index.ledger.live_bytes()
    while index.keys.condemn_oldest(0.0):
        pass
    index.keys.drop_condemned(0.0, is_urgent=True)
    assert index.ledger.live_bytes() == 0 <= held
    for segment in range(bench.at // SEGMENT + 1):
        index.table.forget_segment(segment)
    assert not index.requests


def small(world: int = 1) -> Bench:
    return Bench(world)


def test_cut_is_empty_when_streams_are_not_sealed_and_full_once_they_are() -> None:
    bench = small()
    bench.write(1, 1, 0, 7, 0, 10, lost=set())
    assert bench.index.cuts.longest(1, tokens_known=11, layout_hash=LAYOUT, world=1) == Cut()
    assert bench.index.cuts.committed(1) == 10
    for source in bench.sources.values():
        source.is_final = True
    assert bench.index.cuts.longest(1, tokens_known=11, layout_hash=LAYOUT, world=1).tokens == 10
    assert bench.index.cuts.longest(1, tokens_known=10, layout_hash=LAYOUT, world=1).tokens == 9
    assert bench.index.cuts.longest(1, tokens_known=11, layout_hash=LAYOUT + 1, world=1) == Cut()
    assert bench.index.cuts.longest(1, tokens_known=11, layout_hash=LAYOUT, world=2) == Cut()


def test_prefix_of_another_request_is_found_when_its_keys_are_known() -> None:
    bench = small(2)
    for rank in range(2):
        bench.write(1, 1, rank, 7, 0, 13, lost=set())
    for index in range(3):
        bench.note_key(1, 1, 7, index, 50 + index)
    keys = [50, 51, 52, 53]
    cut = bench.index.cuts.match_prefix(keys, layout_hash=LAYOUT, world=2)
    assert (cut.tokens, cut.block_keys, set(cut.pieces)) == (12, keys[:3], {0, 1})
    assert bench.index.keys.known((LAYOUT, 2)) == keys[:3]
    bench.index.finish(1, now=0.0)
    bench.index.settle(1e9)
    assert bench.index.cuts.match_prefix(keys, layout_hash=LAYOUT, world=2) == cut
    assert Cut.from_json(cut.to_json()) == cut


def test_bytes_of_two_replicas_are_never_mixed_when_they_gave_one_key() -> None:
    bench = small(2)
    for replica, request in ((7, 1), (8, 2)):
        for rank in range(2):
            bench.write(request, 1, rank, replica, 0, 5, lost=set())
        bench.note_key(request, 1, replica, 0, 50)
    bench.note_key(3, 1, 8, 0, 50)  # a third request hits the prefix in replica 8
    for source in bench.sources.values():
        source.is_final = True
    for rank in range(2):
        bench.write(3, 1, rank, 8, 4, 6, lost=set())
    cut = bench.index.cuts.longest(3, tokens_known=100, layout_hash=LAYOUT, world=2)
    assert cut.tokens == 6
    assert [bench.words[cut.pieces[rank][0].pool_offset] for rank in range(2)] == ["2 1 0 8 0 4", "2 1 1 8 0 4"]


def test_block_length_is_proven_by_its_neighbour_when_the_writer_does_not_say() -> None:
    bench = small()
    source = bench.source(abi.WRITER_RANK, 0, 7)
    index = bench.index

    def block(key: int, start: int, end: int) -> None:
        sequence = next(bench.sequence)
        made = Record(
            abi.KIND_KV_BLOCK, 1, sequence, 0, key, 1, 0, 0, start, end, 1, 0, 0, LAYOUT, 0, sequence,
            0, 0, bench.at, 0,
        )  # fmt: skip
        bench.at = made.end_offset
        index.ingest(made, source, memoryview(bench.view))

    bench.note_key(1, 1, 7, 0, 50)
    bench.note_key(1, 1, 7, 1, 51)
    block(1, 0, 2)  # part of a block, raw, as an unproven layout writes it
    assert index.sizes.known == {}
    block(1, 4, 6)
    assert index.sizes.known == {}
    block(1, 0, 4)
    assert index.sizes.known == {LAYOUT: 4}
    assert index.keys.known((LAYOUT, 1)) == [50]
    block(1, 4, 8)
    assert index.cuts.match_prefix([50, 51], layout_hash=LAYOUT, world=1).tokens == 8


def test_tokens_written_over_are_not_restored_when_a_step_was_taken_back() -> None:
    bench = small()
    bench.write(1, 1, 0, 7, 0, 3, lost=set())
    source = bench.source(abi.WRITER_RANK, 0, 7)
    bench.put(abi.KIND_KV_TAIL, source, 1, 1, 1, 2, b"again")
    source.is_final = True
    cut = bench.index.cuts.longest(1, tokens_known=10, layout_hash=LAYOUT, world=1)
    assert cut.tokens == 2
    assert [(p.token_start, p.token_end) for p in cut.pieces[0]] == [(0, 3), (1, 2)]


def cut_tokens(bench: Bench, known: int, bounds: dict[int, int] | None = None) -> tuple[int, int]:
    for source in bench.sources.values():
        source.is_final = True
    cut = bench.index.cuts.longest(1, tokens_known=known, layout_hash=LAYOUT, world=bench.world, bounds=bounds)
    assert all(piece.token_start < cut.tokens for pieces in cut.pieces.values() for piece in pieces)
    assert len(cut.block_keys) <= cut.tokens // BLOCK
    return cut.tokens, cut.incarnation


def test_tokens_that_nobody_knew_are_not_restored_when_a_newer_incarnation_branched_off() -> None:
    bench = small()
    bench.write(1, 1000, 0, 7, 0, 30, lost=set())  # 31 tokens, of which the router knew 21 when it was superseded
    bench.write(1, 2000, 0, 8, 20, 24, lost=set())  # the second went on from token 20, with other tokens
    for index in range(5):
        bench.note_key(1, 1000, 7, index, 50 + index)
        bench.note_key(1, 2000, 8, index, 50 + index)
    assert cut_tokens(bench, 100, {1: 21}) == (24, 2000)
    assert cut_tokens(bench, 100) == (24, 2000)
    assert cut_tokens(bench, 23, {1: 21}) == (22, 2000)


def test_older_incarnation_is_used_up_to_its_bound_when_the_newer_one_lost_its_records() -> None:
    bench = small()
    bench.write(1, 1000, 0, 7, 0, 30, lost=set())
    assert cut_tokens(bench, 100) == (30, 1000)
    assert cut_tokens(bench, 100, {1: 21}) == (21, 1000)
    assert cut_tokens(bench, 100, {1: 21, 2: 19}) == (19, 1000)  # the smallest of its own and the later ones
    assert cut_tokens(bench, 100, {2: 25}) == (25, 1000)
    assert cut_tokens(bench, 100, {0: 3}) == (30, 1000)  # an earlier one's bound says nothing of it
    assert cut_tokens(bench, 100, {1: 0}) == (0, 0)
    bench.write(1, 2001, 0, 8, 24, 40, lost=set())  # what it wrote from token 21 on was lost, so 24 proves nothing
    assert cut_tokens(bench, 100, {1: 21}) == (21, 1000)
    assert cut_tokens(bench, 100) == (0, 0)


def test_lives_of_one_router_incarnation_are_all_used_when_an_engine_preempted_it() -> None:
    bench = small()
    bench.write(1, 2000, 0, 7, 0, 30, lost=set())
    bench.write(1, 2001, 0, 7, 0, 8, lost=set())
    assert cut_tokens(bench, 100) == (30, 2000)
    assert cut_tokens(bench, 100, {1: 5}) == (30, 2000)
    bench.write(1, 3000, 0, 8, 0, 9, lost=set())  # it began anew: without bounds nothing of the others is proven
    assert cut_tokens(bench, 100) == (9, 3000)
    assert cut_tokens(bench, 100, {1: 5, 2: 28}) == (28, 2000)


def test_incarnations_are_counted_as_the_connector_counts_them() -> None:
    assert INCARNATION_STRIDE == identity.INCARNATION_STRIDE


def test_older_incarnation_goes_only_when_a_newer_one_has_as_much() -> None:
    bench = small()
    bench.write(1, 1, 0, 7, 0, 10, lost=set())
    bench.write(1, 2, 0, 8, 0, 9, lost=set())
    bench.index.successions.drop_superseded()
    assert set(bench.index.requests[1].incarnations) == {1, 2}
    bench.write(1, 2, 0, 8, 9, 10, lost=set())
    bench.index.successions.drop_superseded()
    assert set(bench.index.requests[1].incarnations) == {2}


def test_block_is_not_told_but_still_saved_when_it_was_named_to_go() -> None:
    bench = small()
    bench.write(1, 1, 0, 7, 0, 4, lost=set())
    bench.note_key(1, 1, 7, 0, 50)
    bench.index.finish(1, now=0.0)
    bench.index.settle(1e9)
    keys = bench.index.keys
    assert keys.condemn_oldest(100.0) > 0
    assert keys.known((LAYOUT, 1)) == []
    assert keys.drop_condemned(101.0, is_urgent=False) == 0
    bench.note_key(2, 1, 7, 0, 50)  # an engine that was told before refers to it
    assert keys.drop_condemned(1e9, is_urgent=True) == 0
    assert keys.known((LAYOUT, 1)) == [50]


def test_block_loses_its_old_key_when_it_is_given_another() -> None:
    bench = small()
    bench.write(1, 1, 0, 7, 0, 4, lost=set())
    bench.note_key(1, 1, 7, 0, 50)
    bench.note_key(1, 1, 7, 0, 60)
    assert bench.index.keys.known((LAYOUT, 1)) == [60]


def test_malformed_event_is_reported_when_it_is_no_json() -> None:
    bench = small()
    source = bench.source(abi.WRITER_SCHEDULER, 0, 7)
    for payload in (b"{", b"[1]", b"\xff", b'{"event":"x"}'):
        bench.put(abi.KIND_EVENT, source, 1, 0, 0, 0, payload)
    assert [e["event"] for _, e in bench.index.events] == ["malformed", "malformed", "malformed", "x"]


def test_block_and_life_are_promised_to_nobody_when_an_engine_found_a_difference() -> None:
    bench = Bench(1)
    for key in (1, 2):
        bench.write(key, 1000, 0, 7, 0, 6, lost=set())
        bench.note_key(key, 1000, 7, 0, 50 + key)
    bench.note_key(3, 1000, 7, 0, 51)
    for source in bench.sources.values():
        source.is_final = True
    assert bench.index.cuts.committed(1) == 6
    assert set(bench.index.keys.known((LAYOUT, 1))) == {51, 52}
    events = [{"event": "differs", "key": f"{1:032x}", "incarnation": 1000, "token_start": 0}, {"event": "differs", "key": "?"}]
    for told in events:
        bench.put(abi.KIND_EVENT, bench.source(abi.WRITER_RANK, 0, 7), 0, 0, 0, 0, json.dumps(told).encode())
    assert bench.index.cuts.longest(1, tokens_known=99, layout_hash=LAYOUT, world=1).tokens == 0
    assert bench.index.cuts.longest(2, tokens_known=99, layout_hash=LAYOUT, world=1).tokens == 6
    assert bench.index.keys.known((LAYOUT, 1)) == [52]
    assert [e["event"] for _, e in bench.index.events] == ["differs", "unprotected", "differs", "malformed"]
