"""Many records by one call: back into a region (restore_burst.py's rounds, Checkpointer.restore_kv), and out of it, whole blocks of one task.

Invariants: no two pieces of a round name the same block; a block's pieces keep their order; the last piece on a byte is the one that stays;
a piece with another hash is named and no other; what lies outside pool or region is refused; of a task's blocks those are
records that the journal had room for.
"""

from __future__ import annotations

import pathlib
import random
import sys

import pytest

from concordia import abi
from concordia.checkpoint.restore_burst import in_rounds
from concordia.checkpoint.restore_tasks import KvPiece

sys.path.insert(0, str(pathlib.Path(__file__).parent / "gpu"))
from scenarios_kv import grouped, restored


def piece(*blocks: int) -> KvPiece:
    return KvPiece(abi.KIND_KV_TAIL, 0, 1, blocks, 0, 0, 0)


def test_one_round_when_no_block_is_named_twice() -> None:
    assert in_rounds([piece(1), piece(2, 3), piece(4)]) == [[0, 1, 2]]
    assert in_rounds([]) == []


def test_rounds_keep_the_order_of_each_block_and_name_none_twice() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(200):
        pieces = [piece(*rng.sample(range(12), rng.randrange(1, 4))) for _ in range(rng.randrange(60))]
        rounds = in_rounds(pieces)
        assert sorted(index for one in rounds for index in one) == list(range(len(pieces)))
        for one in rounds:
            named = [block for index in one for block in pieces[index].blocks]
            assert len(named) == len(set(named))
        for block in range(12):
            order = [index for one in rounds for index in one if block in pieces[index].blocks]
            assert order == sorted(order)


@pytest.mark.parametrize("shape", ["flash", "odd", "tiled"])
def test_pieces_are_restored_in_their_order_when_they_lie_on_each_other(shape: str, tmp_path: pathlib.Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    answer = restored("host", shape, seed, str(tmp_path / "journal"), 600)
    assert answer["wrong"] == []
    assert answer["said"]
    assert answer["named"] == list(range(0, 24, 3))
    assert answer["refused"] == [False, False]


@pytest.mark.parametrize(("shape", "segment"), [("flash", 1 << 20), ("latent", 1 << 18), ("odd", 1 << 15)])
def test_blocks_of_one_task_go_on_in_the_next_segment_until_none_is_lent(
    shape: str, segment: int, tmp_path: pathlib.Path
) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    answer = grouped("host", 1, shape, seed, path=str(tmp_path / "journal"), segment_bytes=segment)
    assert answer["wrong"] == []
    assert answer["full"] == [abi.STATUS_JOURNAL_FULL]
    assert answer["odd"] == abi.STATUS_BAD_TASK
