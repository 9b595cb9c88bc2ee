"""A plain generation loop on transformers: a small Llama with random weights samples text. It knows
nothing of Concordia; `concordia run` saves and resumes it (docs/program.md):

    concordia run --policy examples/plain.toml -- python examples/plain_generation.py --tokens 300

Prints every token as it comes.
"""

from __future__ import annotations

import argparse
import os

# read when cuBLAS starts: the same sums in every run
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer


class Printer(BaseStreamer):
    """Says each token of a batch of one."""

    def __init__(self) -> None:
        self.count = 0

    def put(self, value: torch.Tensor) -> None:
        for token in value.reshape(-1).tolist():
            self.count += 1
            print(self.count, token, flush=True)

    def end(self) -> None:
        print("end", flush=True)


def main() -> None:
    """Sample until enough tokens are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    torch.manual_seed(11)
    torch.use_deterministic_algorithms(True)
    shape = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(shape).to(options.device).eval()
    prompt = torch.randint(512, (1, 16), device=options.device)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=options.tokens,
        min_new_tokens=options.tokens,
        do_sample=True,
        top_k=50,
        temperature=0.9,
        pad_token_id=0,
        streamer=Printer(),
    )


if __name__ == "__main__":
    main()
