"""integrations/vllm/write_set.py.

Invariants: every token of a protected request is appended or named by a key once its step is over; drafts never are; a key never names
other bytes than the ones it was given for; KV computed anew has a new incarnation; blocks handed out are all reported.
"""

from __future__ import annotations

import random

import pytest

from concordia import config
from concordia.integrations.vllm.identity import KeyChain, private_key
from concordia.integrations.vllm.named_blocks import NamedBlocks
from concordia.integrations.vllm.retry import Retries
from concordia.integrations.vllm.step_writes import Scheduled, runs_of
from concordia.integrations.vllm.write_set import WriteSet
from write_set_steps import SEED, SIZE, more, new, track


def test_prefill_appends_full_blocks_and_a_tail_when_a_request_starts() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(10)))
    done = held.step([new("a", [7, 8, 9], 10)], step=1)
    (write,) = done.writes
    assert write.full == ((0, 7), (1, 8))
    assert write.tail == (8, 10, 9)
    assert write.incarnation == 1000
    assert [index for index, _ in done.notes[0].entries] == [0, 1]
    assert done.reused == [7, 8, 9]


def test_blocks_that_follow_each_other_are_appended_together() -> None:
    assert runs_of([(0, 7), (1, 8), (3, 2), (4, 9), (5, 1)], 2) == [(0, (7, 8)), (3, (2, 9)), (5, (1,))]
    assert runs_of(()) == []


def test_chunks_and_decode_cover_every_token_once_when_a_prompt_is_split() -> None:
    held = WriteSet(block_tokens=SIZE)
    tokens = list(range(9))
    held.tracks["a"] = track("a", tokens)
    first = held.step([new("a", [1, 2], 6)], step=1).writes[0]
    second = held.step([more("a", 6, 9, (3,))], step=2).writes[0]
    assert (first.full, first.tail) == (((0, 1),), (4, 6, 2))
    # The second chunk completes block 1, which is then appended whole, and begins block 2.
    assert (second.full, second.tail) == (((1, 2),), (8, 9, 3))
    tokens.append(9)
    third = held.step([more("a", 9, 10)], step=3).writes[0]
    assert (third.full, third.tail) == ((), (9, 10, 3))


def test_key_is_noted_later_when_token_ids_come_after_the_step() -> None:
    held = WriteSet(block_tokens=SIZE)
    tokens = [0, 1, 2]
    held.tracks["a"] = track("a", tokens)
    held.step([new("a", [1], 3)], step=1)
    done = held.step([more("a", 3, 4)], step=2)  # its token is sampled, but the scheduler has not seen it yet
    assert done.writes[0].full == ((0, 1),)
    assert done.notes == []
    tokens += [3, 4]
    assert held.step([more("a", 4, 5, (2,))], step=3).notes[0].entries[0][0] == 0


def test_hit_is_named_by_key_when_the_block_is_in_the_journal() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(10)))
    (note,) = held.step([new("a", [1, 2, 3], 10)], step=1).notes
    held.tracks["b"] = track("b", [*range(8), 50, 51])
    done = held.step([new("b", [1, 2, 4], 10, start=8, hit=8)], step=2)
    assert done.writes[0].full == ()
    assert done.writes[0].tail == (8, 10, 4)
    assert done.notes[0].entries == note.entries
    assert done.reused == [4]


def test_hit_is_appended_when_the_journal_does_not_have_the_block() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["b"] = track("b", list(range(10)))
    done = held.step([new("b", [1, 2, 4], 10, start=8, hit=8)], step=1)
    assert done.writes[0].full == ((0, 1), (1, 2))


def test_hit_is_appended_when_its_record_was_cleaned_away() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(8)))
    held.step([new("a", [1, 2], 8)], step=1)
    held.finish("a", step=1)
    held.learn(set(), before_step=2)
    held.tracks["b"] = track("b", list(range(9)))
    done = held.step([new("b", [1, 2, 3], 9, start=8, hit=8)], step=2)
    assert done.writes[0].full == ((0, 1), (1, 2))


def test_copy_of_known_tokens_gets_a_key_of_its_own_when_it_was_computed_again() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(5)))
    held.tracks["b"] = track("b", list(range(5)))
    done = held.step([new("a", [1, 2], 5), new("b", [3, 4], 5)], step=1)
    first, second = (note.entries[0][1] for note in done.notes)
    shared = KeyChain(SEED, block_tokens=SIZE)
    shared.extend(list(range(4)), limit=4)
    assert first == shared.keys[0]
    assert second == private_key(first, request=held.tracks["b"].identity.key, incarnation=1000)
    # A third request that hits the *second* copy refers to the second copy's bytes.
    held.tracks["c"] = track("c", list(range(5)))
    note = held.step([new("c", [3, 5], 5, start=4, hit=4)], step=2).notes[0]
    assert note.entries == ((0, second),)


def test_key_is_forgotten_when_the_block_is_given_to_somebody_else() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(4)))
    held.step([new("a", [1], 4)], step=1)
    held.finish("a", step=1)
    held.tracks["b"] = track("b", list(range(100, 104)))
    held.step([new("b", [1], 4)], step=2)
    held.tracks["c"] = track("c", list(range(100, 105)))
    key = held.step([new("c", [1, 2], 5, start=4, hit=4)], step=3).notes[0].entries[0][1]
    chain = KeyChain(SEED, block_tokens=SIZE)
    chain.extend(list(range(100, 104)), limit=4)
    assert key == chain.keys[0]


@pytest.mark.parametrize("drafts", [1, 3])
def test_drafts_wait_until_accepted_when_decoding_speculatively(drafts: int) -> None:
    held = WriteSet(block_tokens=SIZE)
    tokens = list(range(3))
    held.tracks["a"] = track("a", tokens)
    held.step([new("a", [1, 2], 3)], step=1)
    tokens.append(3)
    done = held.step([more("a", 3, 4 + drafts, drafts=drafts)], step=2)
    assert done.writes[0].full == ((0, 1),)
    assert done.writes[0].tail is None
    # One draft was accepted: its KV is appended now, together with the next sure token.
    tokens += [4, 5]
    done = held.step([more("a", 5, 6 + drafts, drafts=drafts)], step=3)
    assert done.writes[0].tail == (4, 6, 2)


def test_incarnation_is_new_when_a_preempted_request_comes_back() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(6)))
    held.step([new("a", [1, 2], 6)], step=1)
    done = held.step([new("a", [5, 6], 6)], step=2)
    assert done.writes[0].incarnation == 1001
    assert done.writes[0].full == ((0, 5),)
    assert done.writes[0].tail == (4, 6, 6)


def test_incarnation_is_new_when_the_engine_computes_again_what_it_had() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(6)))
    held.step([new("a", [1, 2], 6)], step=1)
    done = held.step([more("a", 4, 6)], step=2)
    assert done.writes[0].incarnation == 1001
    assert done.writes[0].full == (), "block 0 is as it was, and has a key"
    assert done.writes[0].tail == (4, 6, 2)
    assert done.notes[0].entries[0][0] == 0
    assert done.reused == [2]


def test_restored_blocks_are_named_and_the_tail_is_appended_when_a_request_resumes() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(11)))
    done = held.step(
        [new("a", [1, 2, 3], 11, start=10, loaded_keys={0: 111, 1: 222})], step=1
    )
    assert done.writes[0].full == ()
    assert done.writes[0].tail == (8, 11, 3)
    assert done.notes[0].entries == ((0, 111), (1, 222))
    assert done.reused == [1, 2, 3]


def test_request_appends_its_blocks_anew_when_the_journal_let_go_of_those_it_shared() -> None:
    held = WriteSet(block_tokens=SIZE)
    tokens = list(range(8))
    held.tracks["a"] = track("a", tokens)
    held.step([new("a", [1, 2], 8)], step=1)
    held.finish("a", step=2)
    held.tracks["b"] = track("b", [*tokens, 8])
    done = held.step([new("b", [1, 2, 3], 9, start=8, hit=8)], step=3)
    assert done.writes[0].full == (), "their keys are enough while the journal has them"
    held.learn(set(), before_step=4)  # and now it has none of them
    held.tracks["b"].tokens.append(9)
    (write,) = held.step([more("b", 9, 10)], step=5).writes
    assert write.full == ((0, 1), (1, 2))
    assert write.tail == (8, 10, 3)


def test_restored_block_is_appended_when_its_key_is_not_known() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(11)))
    done = held.step([new("a", [1, 2, 3], 11, start=10, loaded_keys={0: 111})], step=1)
    assert done.writes[0].full == ((1, 2),)


def test_nothing_is_shared_when_tokens_do_not_determine_the_kv() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(5)), seed=None)
    done = held.step([new("a", [1, 2], 5)], step=1)
    assert done.notes == []
    held.tracks["b"] = track("b", list(range(5)), seed=None)
    assert held.step([new("b", [1, 3], 5, start=4, hit=4)], step=2).writes[0].full == ((0, 1),)


def test_request_stops_appending_when_the_worker_lost_it() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(5)))
    held.step([new("a", [1, 2], 5)], step=1)
    held.lose("a")
    assert held.step([more("a", 5, 6)], step=2).writes == []
    held.tracks["b"] = track("b", list(range(5)))
    assert held.step([new("b", [1, 3], 5, start=4, hit=4)], step=3).writes[0].full == ((0, 1),)


def test_whoever_relied_on_a_block_names_it_anew_when_it_was_not_saved() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(10)))
    held.tracks["b"] = track("b", [*range(8), 50])
    held.step([new("a", [1, 2, 3], 10), new("b", [1, 2, 4], 9, start=8, hit=8)], step=1)
    held.rewind("a", 5)
    done = held.step([more("a", 10, 11), more("b", 9, 10)], step=2)
    assert [write.full for write in done.writes] == [((1, 2),), ()]
    assert done.notes[0].entries == done.notes[1].entries
    assert [write.tail for write in done.writes] == [(8, 11, 3), (8, 10, 4)]
    assert [write.incarnation for write in done.writes] == [1000, 1000]


def test_nothing_is_appended_while_a_request_rests() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(10)))
    held.step([new("a", [1, 2], 6)], step=1)
    held.tracks["a"].is_resting = True
    assert held.step([more("a", 6, 7)], step=2).writes == []
    held.tracks["a"].is_resting = False
    assert held.step([more("a", 7, 8)], step=3).writes[0].full == ((1, 2),)


def test_shared_key_never_names_other_bytes_when_its_block_was_perhaps_not_saved() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(6)))
    shared = held.step([new("a", [1, 2], 6)], step=1).notes[0].entries[0][1]
    held.rewind("a", 0)
    held.tracks["b"] = track("b", list(range(6)))
    done = held.step([new("b", [3, 4], 6), more("a", 6, 7)], step=2)
    named = [note.entries[0][1] for note in done.notes]
    assert shared not in named
    assert len(set(named)) == 2


def test_waits_double_and_end_when_appends_fail_and_go_well_again() -> None:
    waits = Retries()
    waits.miss("a", now=0.0)
    waits.miss("a", now=0.0)  # the same failure, seen twice
    assert waits.take_due(now=0.05) == []
    assert waits.take_due(now=0.1) == ["a"]
    waits.miss("a", now=0.2)
    assert waits.take_due(now=0.35) == []
    assert waits.take_due(now=0.4) == ["a"]
    assert waits.take_recovered(now=1.0) == []
    assert waits.take_recovered(now=1.5) == ["a"]
    assert waits.take_due(now=99.0) == []


def test_request_is_lost_with_a_reason_when_its_blocks_do_not_add_up() -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(9)))
    done = held.step([new("a", [1], 9)], step=1)
    assert done.writes == []
    assert done.lost == [("a", "1 blocks known for 9 tokens")]


def test_unknown_request_still_reports_its_blocks_when_it_is_not_tracked() -> None:
    held = WriteSet(block_tokens=SIZE)
    assert held.step([new("x", [1, 2], 8, start=4, hit=4)], step=1, given=[9]).reused == [9, 2]


def test_every_token_is_covered_once_when_engines_do_random_things() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    held = WriteSet(block_tokens=SIZE)
    tokens = [rng.randrange(100) for _ in range(3)]
    held.tracks["a"] = track("a", tokens)
    blocks, computed, covered, step = 0, 0, set[int](), 0
    incarnation = 1000
    while len(tokens) < 200:
        step += 1
        if computed and rng.random() < 0.05:  # preempted
            computed, blocks, covered, incarnation = 0, 0, set(), incarnation + 1
        count = min(rng.randrange(1, 9), len(tokens) - computed)
        need = -(-(computed + count) // SIZE) - blocks
        ids = [step * 1000 + i for i in range(need)]
        blocks += need
        done = held.step([Scheduled("a", ids, computed == 0, computed, computed + count)], step=step)
        for write in done.writes:
            assert write.incarnation == incarnation
            for index, _ in write.full:
                covered |= set(range(index * SIZE, (index + 1) * SIZE))
            if write.tail:
                fresh = set(range(write.tail[0], write.tail[1]))
                assert not fresh & covered
                covered |= fresh
        computed += count
        assert covered == set(range(computed))
        if computed == len(tokens):
            tokens.append(rng.randrange(100))


def differences(one: NamedBlocks, other: NamedBlocks, *, keys: int, blocks: int) -> list[str]:
    """Where two say something else."""
    found = [f"key {key}" for key in range(keys) if one.is_journaled(key) != other.is_journaled(key)]
    found += [f"block {b}" for b in range(blocks) if one.key_of(b) != other.key_of(b) or (b in one) != (b in other)]
    found += [
        f"block {b} of {one.key_of(b)}" for b in range(blocks) if one.is_from_journal(b, one.key_of(b)) != other.is_from_journal(b, one.key_of(b))
    ]
    return found


def test_keys_name_the_same_at_any_time_when_they_are_taken_away_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    whole, parts = NamedBlocks(), NamedBlocks()
    journal, before = {rng.randrange(1, 400) for _ in range(300)}, 0
    waited, is_told = 0, False
    for step in range(1, 120):
        for block in rng.sample(range(300), rng.randrange(60)):
            key = rng.randrange(1, 400)
            for named in (whole, parts):
                if block % 2:
                    named.fill(block, key, step=step)
                else:
                    named.author(block, key, step=step, is_shared=True)
        for _ in range(rng.randrange(3)):  # answers that were read while nobody stepped
            told = set(journal)
            journal ^= {rng.randrange(1, 400) for _ in range(rng.randrange(80))}
            before = max(before, step - rng.randrange(3))
            monkeypatch.setattr(config, "KEYS_TAKEN", 1 << 20)
            whole.learn_all(set(journal), before_step=before)
            for block in whole.take_away():
                whole.drop(block)
            assert not whole.has_missing
            monkeypatch.setattr(config, "KEYS_TAKEN", 4)
            if is_told and rng.random() < 0.9:
                parts.learn(journal - told, told - journal, before_step=before)
            else:
                parts.learn_all(set(journal), before_step=before)
            is_told = True
        for _ in range(rng.randrange(3)):
            for block in parts.take_away():
                parts.drop(block)
        waited += parts.has_missing
        assert differences(whole, parts, keys=400, blocks=300) == []
    assert waited > 20


def test_step_takes_a_bounded_part_away_when_a_prefill_s_keys_go() -> None:
    held = WriteSet(block_tokens=SIZE)
    keys = list(range(1, 8001))
    for block, key in enumerate(keys):
        held._named.author(block, key, step=1, is_shared=True)
    held.learn(set(keys), before_step=2)
    held.learn_news([], keys, before_step=3)
    left = [len(held._named._keys)]
    assert not any(held.is_journaled(key) for key in keys)  # and nobody is told of the others
    assert not any(block in held._named or held._named.key_of(block) for block in range(len(keys)))
    while left[-1]:
        held.step([], step=3 + len(left))
        left.append(len(held._named._keys))
        assert 0 < left[-2] - left[-1] <= 500
    assert len(left) < 40


def test_all_goes_in_the_next_step_when_it_has_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    held = WriteSet(block_tokens=SIZE)
    for block in range(8000):
        held._named.author(block, block + 1, step=1, is_shared=True)
    held.learn(set(range(1, 8001)), before_step=2)
    held.learn_news([], list(range(1, 8001)), before_step=3)
    monkeypatch.setattr(config, "KEYS_WAIT_S", 0.0)
    held.step([], step=4)
    assert not held._named._keys


def test_hit_is_appended_when_its_key_went_and_is_not_taken_away_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(8)))
    held.step([new("a", [1, 2], 8)], step=1)
    held.finish("a", step=1)
    monkeypatch.setattr(config, "KEYS_TAKEN", 0)
    held.learn(set(), before_step=2)
    assert held._named.has_missing
    held.tracks["b"] = track("b", list(range(9)))
    done = held.step([new("b", [1, 2, 3], 9, start=8, hit=8)], step=2)
    assert held._named.has_missing
    assert done.writes[0].full == ((0, 1), (1, 2))


def test_request_appends_its_blocks_anew_when_their_keys_went_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "KEYS_TAKEN", 1)
    held = WriteSet(block_tokens=SIZE)
    held.tracks["a"] = track("a", list(range(40 * SIZE)))
    held.step([new("a", list(range(40)), 40 * SIZE)], step=1)
    keys = [held._named.key_of(block) for block in range(40)]
    assert held.tracks["a"].covered == 40 * SIZE
    held.learn(set(keys), before_step=2)
    held.learn_news([], keys[30:], before_step=3)
    steps = 3
    while held.tracks["a"].covered != 30 * SIZE:
        steps += 1
        held.step([], step=steps)
        assert steps < 40
    assert [held._named.key_of(block) for block in range(40)] == [*keys[:30], *[0] * 10]


def test_changes_teach_the_same_as_the_whole_list_when_keys_come_and_go() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    whole, changes = NamedBlocks(), NamedBlocks()
    journal, told, before = set[int](), set[int](), 0
    for step in range(1, 400):
        for _ in range(rng.randrange(4)):
            block, key = rng.randrange(20), rng.randrange(1, 30)
            match rng.randrange(4):
                case 0:
                    assert whole.drop(block) == changes.drop(block)
                case 1:
                    for named in (whole, changes):
                        named.fill(block, key, step=step)
                case _:
                    is_shared = not whole.is_journaled(key)
                    for named in (whole, changes):
                        named.author(block, key if is_shared else key + 100, step=step, is_shared=is_shared)
        for _ in range(rng.randrange(4)):
            journal ^= {rng.choice([*range(1, 30), *range(101, 130)])}
        if rng.random() < 0.5:
            before = max(before, step - rng.randrange(4))
            whole.learn_all(set(journal), before_step=before)
            lapsed = sorted(set(whole.take_away()))
            if rng.random() < 0.1:
                changes.learn_all(set(journal), before_step=before)
            else:
                changes.learn(journal - told, told - journal, before_step=before)
            assert sorted(set(changes.take_away())) == lapsed
            told = set(journal)
            for block in lapsed:
                assert whole.drop(block)
                assert changes.drop(block)
        for key in range(130):
            assert whole.is_journaled(key) == changes.is_journaled(key), (step, key)
        for block in range(20):
            assert whole.key_of(block) == changes.key_of(block)
            assert whole.is_from_journal(block, whole.key_of(block)) == changes.is_from_journal(block, changes.key_of(block))
