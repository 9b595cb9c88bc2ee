"""recovery/restore.py.

Invariants: a plan exists only for contiguous pieces of every rank, of this layout and model, within the pool; one flipped bit anywhere is found, and
named, before a token is promised; verification ends at its deadline.
"""

from __future__ import annotations

import pathlib
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from concordia import abi, config
from concordia.device.memory import SharedFile
from concordia.device.payload_hash import PayloadHash
from concordia.errors import Corruption, RecoveryError, WaitTimeout
from concordia.journal import record
from concordia.journal.coverage import Cut, Piece
from concordia.recovery.restore import plan_restore, verify

LAYOUT = 0xABC
MODEL = 0xDEF


def pieces(pool: bytearray, spans: list[tuple[int, int]], *, rank: int, seed: int) -> list[Piece]:
    """Pieces with random payloads, put one behind the other into the pool."""
    rng = random.Random(seed)
    found = []
    for number, (start, end) in enumerate(spans):
        payload = rng.randbytes(700 * (end - start))
        kind = abi.KIND_KV_BLOCK if end - start == 4 else abi.KIND_KV_TAIL
        found.append(
            Piece(
                rank, kind, start, end, len(pool), len(payload), record.payload_hash(payload),
                number, 7 + rank, LAYOUT, 0, MODEL,
            )
        )  # fmt: skip
        pool += payload
    return found


def cut_of(pool: bytearray, world: int = 2) -> Cut:
    spans = [(0, 4), (4, 8), (8, 9), (9, 10)]
    found = {rank: pieces(pool, spans, rank=rank, seed=rank) for rank in range(world)}
    return Cut(10, 1000, found, [1, 2])


def test_plan_holds_every_rank_when_the_cut_is_whole() -> None:
    pool = bytearray()
    plan = plan_restore(cut_of(pool), world=2, layout_hash=LAYOUT, pool=memoryview(pool), segment_bytes=1 << 20, model_hash=MODEL)
    assert plan.tokens == 10
    assert plan.payload_bytes == len(pool)
    verify(plan, memoryview(pool), deadline=time.monotonic() + 5)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: [*p[:1], *p[2:]], "needed from 4"),
        (lambda p: p[:3], "has 9 of 10"),
        (lambda p: [replace(p[0], layout_hash=1), *p[1:]], "has layout 1"),
        (lambda p: [*p[:3], replace(p[3], model_hash=1)], "another model"),
        (lambda p: [replace(p[0], model_hash=0), *p[1:]], "another model"),
        (lambda p: [replace(p[0], kind=abi.KIND_EVENT), *p[1:]], "of kind 6"),
        (lambda p: [replace(p[0], pool_offset=1 << 40), *p[1:]], "outside the pool"),
        (lambda p: [replace(p[0], payload_bytes=-1), *p[1:]], "outside the pool"),
        (lambda _: [], "has 0 of 10"),
    ],
)
def test_plan_is_refused_when_one_rank_lacks_something(
    spoil: Callable[[list[Piece]], list[Piece]], words: str
) -> None:
    pool = bytearray()
    cut = cut_of(pool)
    cut.pieces[1] = spoil(cut.pieces[1])
    with pytest.raises(RecoveryError, match=words):
        plan_restore(cut, world=2, layout_hash=LAYOUT, pool=memoryview(pool), segment_bytes=1 << 20, model_hash=MODEL)


def test_plan_is_refused_when_the_journal_has_nothing() -> None:
    with pytest.raises(RecoveryError, match="nothing"):
        plan_restore(Cut(), world=1, layout_hash=LAYOUT, pool=memoryview(b""), segment_bytes=1 << 20, model_hash=MODEL)


def test_flipped_bit_is_named_when_any_byte_differs() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    pool = bytearray()
    plan = plan_restore(cut_of(pool), world=2, layout_hash=LAYOUT, pool=memoryview(pool), segment_bytes=1 << 20, model_hash=MODEL)
    for _ in range(20):
        at, bit = rng.randrange(len(pool)), 1 << rng.randrange(8)
        pool[at] ^= bit
        with pytest.raises(Corruption, match="committed"):
            verify(plan, memoryview(pool), deadline=time.monotonic() + 5)
        pool[at] ^= bit
    verify(plan, memoryview(pool), deadline=time.monotonic() + 5)


def test_plan_is_no_longer_current_when_its_segment_has_another_salt() -> None:
    pool = bytearray()
    cut = cut_of(pool)
    view = memoryview(pool)
    plan = plan_restore(cut, world=2, layout_hash=LAYOUT, pool=view, segment_bytes=1 << 20, model_hash=MODEL)
    assert plan.is_current(view)
    view[16] ^= 1
    assert not plan.is_current(view)


def test_verification_ends_when_its_deadline_has_passed() -> None:
    pool = bytearray()
    plan = plan_restore(cut_of(pool), world=2, layout_hash=LAYOUT, pool=memoryview(pool), segment_bytes=1 << 20, model_hash=MODEL)
    with pytest.raises(WaitTimeout, match="0 of 4"):
        verify(plan, memoryview(pool), deadline=time.monotonic() - 1)


def test_pool_stays_mapped_while_it_is_hashed(tmp_path: pathlib.Path) -> None:
    """An engine that shuts down closes its mapping beside a look-up's thread."""
    size = 256 << 20
    file = SharedFile.create(tmp_path / "pool", size)
    digest = PayloadHash().of(file.address, size)
    found = [Piece(0, abi.KIND_KV_BLOCK, 0, 4, 0, size, digest, 0, 7, LAYOUT, 0, MODEL)]
    plan = plan_restore(Cut(4, 1000, {0: found}, [1]), world=1, layout_hash=LAYOUT, pool=file.view, segment_bytes=size, model_hash=MODEL)
    with ThreadPoolExecutor(1) as pool:
        verifying = pool.submit(verify, plan, file.view, deadline=time.monotonic() + 60)
        while not verifying.running():
            time.sleep(0.001)
        time.sleep(0.005)  # it hashes for 30 ms
        file.close()
        verifying.result()


def test_difference_is_named_when_it_lies_behind_what_is_hashed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "VERIFY_BYTES", 6000)  # three pieces
    pool = bytearray()
    found = pieces(pool, [(at, at + 4) for at in range(0, 64, 4)], rank=0, seed=5)
    cut, view = Cut(64, 1000, {0: found}, [1] * 16), memoryview(pool)
    plan = plan_restore(cut, world=1, layout_hash=LAYOUT, pool=view, segment_bytes=1 << 20, model_hash=MODEL)
    verify(plan, view, deadline=time.monotonic() + 5)
    for piece in found:
        view[piece.pool_offset + 7] ^= 4
        other = record.payload_hash(view[piece.pool_offset : piece.pool_offset + piece.payload_bytes])
        words = f"tokens {piece.token_start}..{piece.token_end} of rank 0 .*payload hash {other:032x}"
        with pytest.raises(Corruption, match=words):
            verify(plan, view, deadline=time.monotonic() + 5)
        view[piece.pool_offset + 7] ^= 4
