"""The seams of one answer.

Invariants: an id that comes again is compared and not taken twice; what follows the last of them is new; KV behind an id that was not compared,
or that differs, is bounded away; bounds never grow past what the next submission goes on after.
"""

from __future__ import annotations

import random

import pytest

from concordia.serving.seam import EchoDiffers, Seam

PROMPT = 10


def test_everything_is_new_when_the_answer_goes_on_after_all_its_ids() -> None:
    seam = Seam(PROMPT)
    seam.go_on(after=3, known=3)
    assert seam.take([7, 8], [1, 2, 3], is_end=False) == 0
    assert seam.take([3], [1, 2, 3, 7, 8], is_end=True) == 0, "nothing is waited for at the end"


def test_ids_are_taken_once_when_they_come_again_in_pieces() -> None:
    sent = [1, 2, 3, 4, 5]
    for after in range(5):
        for cut in range(1, 8):
            seam = Seam(PROMPT)
            seam.go_on(after=after, known=5)
            coming = [*sent[after:], 6, 7]
            found = list(sent)
            for at in range(0, len(coming), cut):
                piece = coming[at : at + cut]
                found += piece[seam.take(piece, found, is_end=False) :]
            assert found == [1, 2, 3, 4, 5, 6, 7]


def test_kv_is_bounded_where_the_answer_goes_on() -> None:
    seam = Seam(PROMPT)
    for known in (0, 4, 9):
        seam.go_on(after=known, known=known)
    assert seam.incarnation == 3
    assert seam.bounds == {1: PROMPT + 4, 2: PROMPT + 9}


def test_kv_is_bounded_before_the_id_that_differs() -> None:
    seam = Seam(PROMPT)
    seam.go_on(after=0, known=0)
    seam.go_on(after=2, known=4)
    with pytest.raises(EchoDiffers, match="position 3"):
        seam.take([3, 99], [1, 2, 3, 4], is_end=False)
    seam.go_on(after=4, known=4)
    assert seam.bounds == {1: PROMPT + 2, 2: PROMPT + 3}


def test_answer_that_ends_too_early_differs() -> None:
    seam = Seam(PROMPT)
    seam.go_on(after=0, known=3)
    with pytest.raises(EchoDiffers, match="position 2"):
        seam.take([1, 2], [1, 2, 3], is_end=True)


@pytest.mark.parametrize("seed", range(20))
def test_bounds_name_only_ids_of_this_answer_when_engines_fail_at_random(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    seam, sent = Seam(PROMPT), []
    right: dict[int, int] = {}  # incarnation -> ids of the answer that its engine was fed with
    while len(sent) < 60:
        after = max(0, len(sent) - rng.choice([0, 0, 1, 3]))
        seam.go_on(after=after, known=len(sent))
        right[seam.incarnation] = after
        for _ in range(rng.randrange(12)):
            at = right[seam.incarnation]
            token = rng.randrange(50) if at == len(sent) else sent[at] if rng.random() < 0.8 else -1
            if token < 0:
                with pytest.raises(EchoDiffers, match=f"position {at} "):
                    seam.take([token], sent, is_end=False)
                break
            again = seam.take([token], sent, is_end=False)
            sent += [token][again:]
            right[seam.incarnation] += 1
        assert all(bound <= PROMPT + right[old] for old, bound in seam.bounds.items())
