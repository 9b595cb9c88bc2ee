"""journal/key_changes.py.

Invariants: whoever applies every answer in turn knows just what is told, however the keys came and went between; what is too long ago, or of no
number that was ever given, is answered in full.
"""

from __future__ import annotations

import random

import pytest

from concordia import config
from concordia.journal.key_changes import KeyChanges, KeyNews

GROUP, OTHER = (5, 1), (6, 1)


def test_listeners_know_what_is_told_when_they_hear_the_changes_at_random_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "KEY_CHANGES_MAX", 8)
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    changes = KeyChanges()
    cursors: list[int | None] = [None] * 3
    heard: list[set[int]] = [set() for _ in range(3)]
    kinds = set()
    for _ in range(2000):
        key = rng.randrange(30)
        (changes.tell if rng.random() < 0.6 else changes.withdraw)(rng.choice([GROUP, GROUP, OTHER]), key)
        for i, chance in enumerate((0.5, 0.2, 0.05)):
            if rng.random() < chance:
                news = changes.since(GROUP, cursors[i])
                assert not set(news.come) & set(news.gone)
                if news.is_all:
                    heard[i] = set(news.come)
                else:
                    heard[i] = (heard[i] | set(news.come)) - set(news.gone)
                assert heard[i] == set(changes.known(GROUP)), i
                cursors[i] = news.cursor
                kinds.add((i, news.is_all))
    # the first asks often, and is told everything once; the last misses more than is remembered
    assert {(0, False), (2, True)} <= kinds


def test_everything_is_told_when_a_number_was_never_given() -> None:
    changes = KeyChanges()
    changes.tell(GROUP, 1)
    assert changes.since(GROUP, 2) == KeyNews(1, True, [1], [])
    assert changes.since(GROUP, 1).is_nothing
    assert changes.since(OTHER, 0).is_nothing


def test_a_key_is_no_news_when_it_is_told_or_withdrawn_again() -> None:
    changes = KeyChanges()
    changes.tell(GROUP, 1)
    changes.tell(GROUP, 1)
    changes.withdraw(GROUP, 2)
    assert changes.since(GROUP, 0) == KeyNews(1, False, [1], [])
    assert KeyNews.from_json(changes.since(GROUP, 0).to_json()) == changes.since(GROUP, 0)
