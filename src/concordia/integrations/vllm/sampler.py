"""Sampling by counter, for engines whose own generator cannot be restored (vLLM's V1 runner, so
every CPU engine).

Owns: `CounterSampler`, a stock logits-processor plug-in. Promises: the token drawn depends on
(seed, absolute position, logits) alone, so a resumed request draws what the unfailed one would
have; requests without `concordia_seed` are not touched. The draw is Gumbel-max over the tempered,
truncated distribution (Gumbel 1954; Maddison et al. 2014), with Philox4x64 (Salmon et al. 2011) as
the counter-based generator. The router sends such a request as greedy, so that the engine's argmax
takes the drawn token. Not for penalties: those keep a history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

PREFIX: Final = "concordia_"
NEVER: Final = float("-inf")


@dataclass(slots=True)
class Draw:
    """How one request draws, and the list that its position is read from."""

    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    prompt_count: int
    outputs: list[int]

    @staticmethod
    def from_params(
        params: SamplingParams, prompt: list[int] | None, outputs: list[int]
    ) -> Draw | None:
        """None for a request that does not ask for it."""
        extra: dict[str, Any] = params.extra_args or {}
        if PREFIX + "seed" not in extra:
            return None
        return Draw(
            seed=int(extra[PREFIX + "seed"]) & (2**64 - 1),
            temperature=float(extra[PREFIX + "temperature"]),
            top_p=float(extra.get(PREFIX + "top_p", 1.0)),
            top_k=int(extra.get(PREFIX + "top_k", 0)),
            min_p=float(extra.get(PREFIX + "min_p", 0.0)),
            prompt_count=len(prompt or ()),
            outputs=outputs,
        )

    def noise(self, count: int) -> torch.Tensor:
        """Gumbel noise for this position, shape [count], float64."""
        position = self.prompt_count + len(self.outputs)
        # The generator's own counter counts within one draw; the position has a word of its own, so
        # draws never overlap.
        philox = np.random.Philox(key=self.seed, counter=[0, position, 0, 0])
        uniform = np.random.Generator(philox).random(count)
        return torch.from_numpy(-np.log(-np.log(uniform + 2.0**-54)))

    def perturb(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits whose argmax is a sample; shape [vocabulary], float64."""
        tempered = logits.double() / self.temperature
        if self.min_p > 0.0:
            floor = tempered.max() + float(np.log(self.min_p))
            tempered = tempered.masked_fill(tempered < floor, NEVER)
        if 0 < self.top_k < tempered.numel():
            smallest = tempered.topk(self.top_k).values[-1]
            tempered = tempered.masked_fill(tempered < smallest, NEVER)
        if self.top_p < 1.0:
            ordered, index = tempered.sort(descending=True)
            before = ordered.softmax(0).cumsum(0) - ordered.softmax(0)
            tempered = tempered.index_fill(0, index[before >= self.top_p], NEVER)
        return tempered + self.noise(tempered.numel())


class CounterSampler(LogitsProcessor):  # type: ignore[misc]  # vLLM ships no types here
    """Replaces the logits of each request that carries `concordia_seed` by perturbed ones."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.draws: dict[int, Draw] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch: rows are removed, added, then moved, in this order."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.draws.pop(row, None)
        for row, params, prompt, outputs in batch_update.added:
            draw = Draw.from_params(params, prompt, outputs)
            self.draws.pop(row, None)
            if draw is not None:
                self.draws[row] = draw
        for source, target, direction in batch_update.moved:
            moved, displaced = self.draws.pop(source, None), self.draws.pop(target, None)
            if moved is not None:
                self.draws[target] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                self.draws[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, draw in self.draws.items():
            chosen = int(draw.perturb(logits[row]).argmax())
            logits[row].fill_(NEVER)
            logits[row, chosen] = 0.0
        return logits
