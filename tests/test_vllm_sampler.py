"""Sampling by counter.

Invariants: a draw depends on seed, position and logits alone; the distribution is the tempered and truncated softmax; a row without our
seed is never touched; rows follow the batch's removals, additions and moves. Needs vLLM.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
import torch

from concordia.integrations.vllm.sampler import CounterSampler, Draw


def a_draw(outputs: list[int], **changes: float) -> Draw:
    values = {"seed": 5, "temperature": 0.9, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | changes
    return Draw(**values, prompt_count=10, outputs=outputs)  # type: ignore[arg-type]


def test_draw_is_equal_when_prompt_and_output_are_split_elsewhere() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(1))
    unfailed = a_draw([1, 2, 3])
    resumed = Draw(5, 0.9, 1.0, 0, 0.0, prompt_count=12, outputs=[3])
    assert torch.equal(unfailed.perturb(logits), resumed.perturb(logits))


def test_draw_differs_when_position_or_seed_differ() -> None:
    logits = torch.zeros(1000)
    chosen = {int(a_draw([0] * n).perturb(logits).argmax()) for n in range(50)}
    chosen |= {int(a_draw([], seed=s).perturb(logits).argmax()) for s in range(50)}
    assert len(chosen) > 80


def test_distribution_is_the_tempered_softmax_when_many_are_drawn() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = [int(a_draw([0] * n).perturb(logits).argmax()) for n in range(20_000)]
    expected = (logits.double() / 0.9).softmax(0)
    for token, share in enumerate(expected.tolist()):
        assert abs(draws.count(token) / len(draws) - share) < 0.015


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.5}, {0}), ({"min_p": 0.3}, {0, 1})],
)
def test_only_allowed_tokens_are_drawn_when_truncated(
    changes: dict[str, float], allowed: set[int]
) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = {int(a_draw([0] * n, **changes).perturb(logits).argmax()) for n in range(500)}
    assert draws == allowed


def test_rows_follow_the_batch_when_it_is_moved_and_condensed() -> None:
    sampler = CounterSampler(None, torch.device("cpu"), False)
    ours = SimpleNamespace(extra_args={"concordia_seed": 7, "concordia_temperature": 1.0})
    foreign = SimpleNamespace(extra_args=None)
    added = [(0, foreign, [1], []), (1, ours, [1], [])]
    sampler.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
    logits = torch.zeros(2, 16)
    before = logits.clone()
    sampler.apply(logits)
    assert torch.equal(logits[0], before[0])
    assert not torch.equal(logits[1], before[1])
    from vllm.v1.sample.logits_processor import MoveDirectionality

    moved = [(1, 0, MoveDirectionality.UNIDIRECTIONAL)]
    sampler.update_state(SimpleNamespace(removed=[0], added=[], moved=moved))
    assert list(sampler.draws) == [0]
