"""A plain training loop: a small transformer is frozen, LoRA matrices beside its layers are trained
with Adam. It knows nothing of Concordia; `concordia run` saves and resumes it (docs/program.md):

    concordia run --policy examples/plain.toml -- python examples/plain_training.py --steps 200

Prints every step's loss, with all of its bits.
"""

from __future__ import annotations

import argparse
import os
from typing import Final

# read when cuBLAS starts: the same sums in every run
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import nn

VOCABULARY, WIDTH, HEADS, LAYERS, RANK, LENGTH, BATCH = 256, 512, 8, 4, 16, 64, 16
STEPS: Final = 200


class Lora(nn.Module):
    """A frozen matrix and what is trained beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(inputs, RANK) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(RANK, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + nn.functional.dropout(x, 0.1, self.training) @ self.down @ self.up


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.first.requires_grad_(False)
        self.second.requires_grad_(False)
        self.mix, self.out = Lora(WIDTH, 3 * WIDTH), Lora(WIDTH, WIDTH)
        self.wide, self.narrow = Lora(WIDTH, 4 * WIDTH), Lora(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        shape = batch, length, 3, HEADS, WIDTH // HEADS
        query, key, value = self.mix(self.first(x)).view(shape).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        ahead = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        found = scores.masked_fill(ahead, float("-inf")).softmax(-1) @ value
        x = x + self.out(found.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.narrow(nn.functional.gelu(self.wide(self.second(x))))


class Model(nn.Module):
    """Tokens to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x @ self.embedding.weight.T / WIDTH**0.5


def main() -> None:
    """Train, and say each loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    torch.manual_seed(7)
    torch.use_deterministic_algorithms(True)
    model = Model().to(options.device)
    adapters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(adapters, lr=1e-3)
    for step in range(1, options.steps + 1):
        start = torch.randint(VOCABULARY, (BATCH, 1))
        stride = torch.randint(1, 7, (BATCH, 1))
        tokens = ((start + stride * torch.arange(LENGTH + 1)) % VOCABULARY).to(options.device)
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(step, loss.item().hex(), flush=True)


if __name__ == "__main__":
    main()
