"""integrations/vllm/restorer.py, lookup.py.

Invariants: a token is offered only after its bytes were hashed; a cohort is offered its tokens in one pass; every wait has a bound and ends in
a cold start; each request that asked is told of once; blocks of the engine's own prefix cache are not written to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from concordia import abi, config
from concordia.errors import JournalError
from concordia.integrations.vllm.identity import CohortTicket, Identity, KeyChain
from concordia.integrations.vllm.questions import Source
from concordia.integrations.vllm.restorer import Restorer
from concordia.integrations.vllm.track import Track
from concordia.journal import record
from concordia.journal.coverage import Cut, Piece

SIZE = 4
LAYOUT = 5


class FakeClient:
    """A journal that has tokens [0, held) of every request, in one piece per block and one per token of the last block."""

    def __init__(self, held: int) -> None:
        self.pool = bytearray(256)  # a segment's header, then the records
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        spans = [(i, i + SIZE) for i in range(0, held // SIZE * SIZE, SIZE)]
        spans += [(i, i + 1) for i in range(held // SIZE * SIZE, held)]
        self.held = held
        self.pieces = []
        for number, (start, end) in enumerate(spans):
            payload = bytes([number]) * 100 * (end - start)
            kind = abi.KIND_KV_BLOCK if end - start == SIZE else abi.KIND_KV_TAIL
            self.pieces.append(
                Piece(0, kind, start, end, len(self.pool), len(payload), record.payload_hash(payload), number, 1, LAYOUT)
            )
            self.pool += payload

    def cut(self, key: int, *, tokens_known: int, layout_hash: int, world: int, bounds: Any = None) -> Cut:
        assert self.gate.wait(5)
        if self.error:
            raise self.error
        tokens = min(self.held, tokens_known - 1)
        pieces = [p for p in self.pieces if p.token_start < tokens]
        return Cut(tokens, 1000, {0: pieces}, list(range(901, 901 + tokens // SIZE))) if tokens > 0 else Cut()

    def match_prefix(self, keys: list[int], *, layout_hash: int, world: int) -> Cut:
        assert self.gate.wait(5)
        if self.error:
            raise self.error
        count = min(len(keys), self.held // SIZE)
        return Cut(count * SIZE, 0, {0: self.pieces[:count]}, list(keys[:count])) if count else Cut()


class World:
    """A restorer over a fake journal, and what it said."""

    def __init__(self, held: int, known: Callable[[int], bool] = lambda _: False) -> None:
        self.client = FakeClient(held)
        self.said: list[dict[str, Any]] = []
        source = Source(self.client, memoryview(self.client.pool), 1 << 30, LAYOUT, 1, SIZE)  # type: ignore[arg-type]
        self.kept: dict[int, int] = {}  # block -> key of the record that it was filled from
        self.restorer = Restorer(
            source, say=self.said.append, is_known=known, is_kept=lambda block, key: self.kept.get(block) == key,
            is_prefix_restored=True,
        )  # fmt: skip

    def arrive(self, name: str, tokens: int, **identity: Any) -> Track:
        track = Track(Identity(name=name, **identity), KeyChain(b"seed", block_tokens=SIZE), list(range(tokens)))
        self.restorer.arrive(name, track)
        return track

    def until(self, name: str, track: Track, hit: int = 0) -> int:
        """Ask again as the scheduler does, pass after pass, until there is an answer."""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            found = self.restorer.match(name, track, hit)
            if found is not None:
                return found
            self.restorer.idle()
            self.restorer.settle()
        raise AssertionError(f"no answer for {name}")


@pytest.fixture
def world() -> Iterator[World]:
    made = World(10)
    yield made
    made.client.gate.set()
    made.restorer.close()


def test_all_but_the_last_token_is_offered_when_the_journal_has_it(world: World) -> None:
    track = world.arrive("a", 11, is_restore=True)
    assert world.until("a", track) == 10
    world.restorer.allocate("a", [5, 6, 7], 10)
    step = world.restorer.take_step(["a"])
    (load,) = step.loads
    assert [p.token_end for p in load.pieces[0]] == [4, 8, 9, 10]
    assert (load.blocks, load.first_block) == ((5, 6, 7), 0)
    assert step.keys == {"a": {0: 901, 1: 902}}
    assert world.said == [], "told only when the bytes are in place"
    world.restorer.confirm("a", 0)
    (told,) = world.said
    assert (told["level"], told["restored_tokens"], told["recomputed_tokens"]) == ("state-exact", 10, 1)


def test_own_prefix_is_left_alone_when_the_engine_has_a_part_itself(world: World) -> None:
    track = world.arrive("a", 11, is_restore=True)
    assert world.until("a", track, hit=4) == 6
    world.restorer.allocate("a", [5, 6, 7], 6)
    (load,) = world.restorer.take_step(["a"]).loads
    assert load.first_block == 1
    assert [p.token_start for p in load.pieces[0]] == [4, 8, 9]


def test_own_prefix_is_not_called_exact_when_nobody_compared_it(world: World) -> None:
    track = world.arrive("a", 11, is_restore=True)
    assert world.until("a", track, hit=4) == 6
    world.restorer.allocate("a", [5, 6, 7], 6)
    world.restorer.take_step(["a"])
    world.restorer.confirm("a", 0)
    (told,) = world.said
    assert (told["level"], told["restored_tokens"], told["own_tokens"], told["recomputed_tokens"]) == ("partial", 6, 4, 1)
    assert "4 tokens are the engine's own" in told["reason"]


def load_and_hit(world: World, *, flip: bool = False) -> dict[str, Any]:
    """One request is restored into blocks 5, 6, 7; another with these tokens hits the first block. What is said of the other."""
    first = world.arrive("a", 11, is_restore=True)
    world.until("a", first)
    world.restorer.allocate("a", [5, 6, 7], 10)
    world.kept |= {5: 901, 6: 902}
    world.restorer.take_step(["a"])
    world.restorer.confirm("a", 0)
    if flip:  # its records have other bytes under the same key
        piece = world.client.pieces[0]
        world.client.pool[piece.pool_offset] ^= 1
        payload = bytes(world.client.pool[piece.pool_offset : piece.pool_offset + piece.payload_bytes])
        world.client.pieces[0] = replace(piece, payload_hash=record.payload_hash(payload))
    second = world.arrive("b", 11, is_restore=True)
    world.until("b", second, hit=4)
    world.restorer.allocate("b", [5, 8, 9], 6)
    world.restorer.take_step(["b"])
    world.restorer.confirm("b", 0)
    return world.said[-1]


def test_own_prefix_is_exact_when_it_was_filled_from_the_same_records(world: World) -> None:
    told = load_and_hit(world)
    assert (told["level"], told["restored_tokens"], told["own_tokens"], told["recomputed_tokens"]) == ("state-exact", 6, 4, 1)


def test_shared_prefix_is_exact_when_a_cohort_is_restored_in_one_step(world: World) -> None:
    both = {name: world.arrive(name, 11, is_restore=True, cohort=CohortTicket("c", 2, 5.0)) for name in "ab"}
    for name, hit, blocks in (("a", 0, [5, 6, 7]), ("b", 4, [5, 8, 9])):
        assert world.until(name, both[name], hit=hit) == 10 - hit
        world.restorer.allocate(name, blocks, 10 - hit)  # the engine shares the block that the first is only about to fill
    world.restorer.take_step(["a", "b"])
    for name in "ab":
        world.restorer.confirm(name, 0)
    assert [told["level"] for told in world.said if told["event"] == "restored"] == ["state-exact", "state-exact"]
    # In a later step the block may be somebody else's.
    later = world.arrive("d", 11, is_restore=True)
    world.until("d", later, hit=4)
    world.restorer.allocate("d", [5, 8, 9], 6)
    world.restorer.take_step(["d"])
    world.restorer.confirm("d", 0)
    assert world.said[-1]["level"] == "partial"


def test_own_prefix_is_not_exact_when_it_was_filled_from_other_records(world: World) -> None:
    assert load_and_hit(world, flip=True)["level"] == "partial"


def test_nothing_is_loaded_when_the_engine_has_as_much_itself(world: World) -> None:
    track = world.arrive("a", 9, is_restore=True)
    assert world.until("a", track, hit=8) == 0
    world.restorer.allocate("a", [5, 6, 7], 0)
    assert world.restorer.take_step(["a"]).loads == []


def test_partial_level_is_told_when_the_journal_has_less(world: World) -> None:
    track = world.arrive("a", 20, is_restore=True)
    assert world.until("a", track) == 10
    world.restorer.allocate("a", [1, 2, 3, 4, 5], 10)
    world.restorer.take_step(["a"])
    world.restorer.confirm("a", 0)
    assert (world.said[0]["level"], world.said[0]["recomputed_tokens"]) == ("partial", 10)


def test_request_starts_cold_with_the_reason_when_a_byte_was_flipped(world: World) -> None:
    world.client.pool[256 + 3] ^= 1
    track = world.arrive("a", 11, is_restore=True)
    assert world.until("a", track) == 0
    world.restorer.take_step(["a"])
    assert world.said[0]["level"] == "cold"
    assert "payload hash" in world.said[0]["reason"]


def test_journal_is_asked_again_when_a_segment_was_given_to_somebody_else(world: World) -> None:
    track = world.arrive("a", 11, is_restore=True)
    assert world.until("a", track) == 10
    world.client.pool[0] ^= 1  # another salt: it may lie elsewhere now
    assert world.restorer.match("a", track, 0) is None
    assert world.until("a", track) == 10


def test_difference_is_not_believed_when_the_second_look_finds_none(world: World) -> None:
    world.client.pool[256] ^= 1
    whole = world.client.cut
    asked: list[int] = []

    def cut(*args: Any, **kwargs: Any) -> Cut:
        asked.append(1)
        if len(asked) == 2:
            world.client.pool[256] ^= 1
        return whole(*args, **kwargs)

    world.client.cut = cut  # type: ignore[method-assign]
    assert world.until("a", world.arrive("a", 11, is_restore=True)) == 10


def test_request_starts_cold_when_the_journal_fails(world: World) -> None:
    world.client.error = JournalError("owner is gone")
    track = world.arrive("a", 11, is_restore=True)
    assert world.until("a", track) == 0
    world.restorer.take_step(["a"])
    assert world.said[0]["reason"] == "owner is gone"


def test_request_starts_cold_when_the_answer_is_late(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "RESTORE_WAIT_S", 0.05)
    world.client.gate.clear()
    track = world.arrive("a", 11, is_restore=True)
    assert world.until("a", track) == 0
    world.restorer.take_step(["a"])
    assert "in time" in world.said[0]["reason"]


def test_cohort_is_offered_in_one_pass_when_all_members_are_verified(world: World) -> None:
    ticket = CohortTicket("c", 2, 5.0)
    first = world.arrive("a", 11, is_restore=True, cohort=ticket)
    outsider = world.arrive("x", 5)
    until = time.monotonic() + 1
    while world.restorer._lookups.is_waiting and time.monotonic() < until:
        world.restorer.idle()
    world.restorer.settle()
    assert world.restorer.match("a", first, 0) is None
    assert world.restorer.match("x", outsider, 0) is None
    second = world.arrive("b", 11, is_restore=True, cohort=ticket)
    world.until("b", second)
    assert world.restorer.match("a", first, 0) == 10
    assert world.restorer.match("x", outsider, 0) is None
    world.restorer.take_step(["a", "b"])
    assert world.restorer.match("x", outsider, 0) == 0


def test_fresh_cohort_starts_in_one_pass_when_nothing_is_restored(world: World) -> None:
    ticket = CohortTicket("c", 2, 5.0)
    first = world.arrive("a", 5, cohort=ticket)
    assert world.restorer.match("a", first, 0) is None
    second = world.arrive("b", 5, cohort=ticket)
    assert world.until("a", first) == 0
    assert world.restorer.match("b", second, 0) == 0


def test_fresh_cohort_is_offered_its_prefixes_in_one_pass_when_answers_come_one_by_one() -> None:
    world = World(10, known=lambda _: True)
    ticket = CohortTicket("c", 2, 5.0)
    world.client.gate.clear()
    first, second = world.arrive("a", 10, cohort=ticket), world.arrive("b", 10, cohort=ticket)
    world.restorer.settle()
    assert world.restorer.match("a", first, 0) is None
    world.client.gate.set()
    assert world.until("a", first) == 8
    assert world.restorer.match("b", second, 0) == 8
    world.restorer.close()


def test_request_is_held_no_longer_than_the_bound_when_a_cohort_and_a_look_up_both_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "RESTORE_WAIT_S", 0.2)
    world = World(10, known=lambda _: True)
    world.client.gate.clear()
    world.arrive("a", 10, is_restore=True, cohort=CohortTicket("c", 2, 0.2))
    came = time.monotonic()
    assert world.until("x", world.arrive("x", 10)) == 0
    assert time.monotonic() - came < config.LOOKUP_WAIT_S
    world.client.gate.set()
    world.restorer.close()


def test_restored_request_starts_at_once_when_a_clients_cohort_is_forming(world: World) -> None:
    world.arrive("a", 5, cohort=CohortTicket("client-c", 4096, 10.0))
    came = time.monotonic()
    track = world.arrive("r", 11, is_restore=True, cohort=CohortTicket("1-2", 1, 10.0))
    assert world.until("r", track) == 10
    assert time.monotonic() - came < 5


def test_late_cohort_is_told_of_when_a_member_never_comes(world: World) -> None:
    track = world.arrive("a", 11, is_restore=True, cohort=CohortTicket("c", 2, 0.05))
    assert world.until("a", track) == 10
    assert world.said[0]["event"] == "cohort-late"


def test_prefix_is_restored_for_anybody_when_the_journal_is_known_to_have_it() -> None:
    world = World(10, known=lambda _: True)
    track = world.arrive("plain", 10)
    assert world.until("plain", track) == 8
    world.restorer.allocate("plain", [1, 2, 3], 8)
    step = world.restorer.take_step(["plain"])
    assert len(step.loads[0].pieces[0]) == 2
    assert track.chain is not None
    assert step.keys["plain"] == dict(enumerate(track.chain.keys[:2]))
    world.restorer.confirm("plain", 0)
    assert world.said[0]["level"] == "prefix"
    world.restorer.close()


def test_prefix_that_the_journal_did_not_give_is_told_of_when_it_was_known_to_have_it() -> None:
    world = World(10, known=lambda _: True)
    world.client.error = JournalError("no answer")
    track = world.arrive("plain", 10)
    assert world.until("plain", track) == 0
    world.restorer.take_step(["plain"])
    assert world.said == [{"event": "prefix-missed", "request": "plain", "reason": "no answer"}]
    world.restorer.close()


def test_journal_is_not_asked_when_it_is_not_known_to_have_the_prefix(world: World) -> None:
    world.client.gate.clear()
    assert world.restorer.match("a", world.arrive("a", 10), 0) == 0


def test_request_that_left_is_forgotten_when_its_answer_comes_later(world: World) -> None:
    world.client.gate.clear()
    track = world.arrive("a", 11, is_restore=True)
    assert world.restorer.match("a", track, 0) is None
    world.restorer.leave("a")
    world.client.gate.set()
    world.restorer.idle()
    world.restorer.settle()
    assert world.said == []


def start_cohort(world: World, names: str) -> None:
    tracks = {
        name: world.arrive(name, 11, is_restore=True, cohort=CohortTicket("c", len(names), 5.0)) for name in names
    }
    for name, track in tracks.items():
        assert world.until(name, track) == 10
        world.restorer.allocate(name, [5, 6, 7], 10)
    world.restorer.take_step(list(names))


def test_cohort_says_once_where_its_time_went_when_all_members_are_in_place(world: World) -> None:
    start_cohort(world, "abc")
    for name in "abc":
        assert not [told for told in world.said if told["event"] == "cohort-restored"]
        world.restorer.confirm(name, 0, load_s=0.25)
    (told,) = (told for told in world.said if told["event"] == "cohort-restored")
    assert (told["cohort"], told["loaded"], told["is_mapped"]) == ("c", 3, True)
    assert told["bytes"] == 3 * 1000
    assert list(told["phases"]) == ["gather", "look_up", "enter", "load"]
    assert min(told["phases"].values()) >= 0
    assert told["phases"]["load"] == 0.25
    assert told["cut_s_max"] >= 0
    assert told["verify_s_max"] >= 0


def test_cohort_says_where_its_time_went_when_a_member_left_before_it_was_in_place(world: World) -> None:
    start_cohort(world, "ab")
    world.restorer.confirm("a", 0, load_s=0.1)
    world.restorer.leave("b")
    (told,) = (told for told in world.said if told["event"] == "cohort-restored")
    assert told["loaded"] == 1


def test_cohort_says_nothing_of_its_time_when_nothing_was_loaded(world: World) -> None:
    world.client.error = JournalError("gone")
    tracks = {name: world.arrive(name, 11, is_restore=True, cohort=CohortTicket("c", 2, 5.0)) for name in "ab"}
    for name, track in tracks.items():
        assert world.until(name, track) == 0
    world.restorer.take_step(["a", "b"])
    assert {told["event"] for told in world.said} == {"restored"}
    assert not world.restorer._times._times
    assert not world.restorer._times._of
