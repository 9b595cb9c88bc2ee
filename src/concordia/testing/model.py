"""A small random-weight Llama with a byte tokenizer, made on the spot.

Owns: the shapes and the making of test models. Promises: the same name and seed give the same
weights; the tokenizer round-trips every byte; nothing is downloaded. Called by the demo, the
benchmarks and the engine tests. Needs torch and transformers; imports them late.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any, Final

VOCABULARY: Final = 512  # of a model whose answers are to be read
LLAMA_VOCABULARY: Final = 128_256  # of Llama 3.1
SHAPES: Final[dict[str, dict[str, int]]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "140m": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
# Large enough that greedy answers vary: near-constant weights fall into two-token cycles and would
# hide a lost token.
INITIALIZER_RANGE: Final = {"tiny": 0.12, "140m": 0.06, "1b": 0.05, "8b": 0.04}
CHAT_TEMPLATE: Final = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
)


def make_model(folder: pathlib.Path, *, shape: str = "140m", seed: int = 3) -> int:
    """Write a model and its tokenizer into `folder`; returns the number of parameters.

    Raises KeyError for an unknown shape. A folder that already holds this shape and seed is left as
    it is.
    """
    stamp = folder / "concordia-model.json"
    wanted = {"shape": shape, "seed": seed, **SHAPES[shape]}
    if stamp.exists():
        found: dict[str, Any] = json.loads(stamp.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in wanted} == wanted:
            return int(found["parameters"])
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(folder)
    parameters = _write_weights(folder, vocabulary, shape=shape, seed=seed)
    stamp.write_text(json.dumps({**wanted, "parameters": parameters}), encoding="utf-8")
    return parameters


def make_skeleton(folder: pathlib.Path, *, shape: str) -> None:
    """Write what a model is without its weights, for engines that make up their own (vLLM's
    `--load-format dummy`). Its vocabulary is as large as Llama's, and nearly every token is text by
    itself: bytes at random are none, and a server that waits for the rest of a character decodes
    all that it holds back again with each token. Raises KeyError for an unknown shape.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _config(_write_tokenizer(folder, LLAMA_VOCABULARY), shape).save_pretrained(str(folder))


def _write_tokenizer(folder: pathlib.Path, size: int = VOCABULARY) -> dict[str, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for name in ("<s>", "</s>", "<pad>"):
        vocabulary[name] = len(vocabulary)
    while len(vocabulary) < size:
        vocabulary[f"<x{len(vocabulary)}>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    return vocabulary


def _write_weights(
    folder: pathlib.Path, vocabulary: dict[str, int], *, shape: str, seed: int
) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(vocabulary, shape)
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(str(folder))
    return sum(p.numel() for p in model.parameters())


def _config(vocabulary: dict[str, int], shape: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=131072 if shape == "8b" else 8192,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        pad_token_id=vocabulary["<pad>"],
        initializer_range=INITIALIZER_RANGE[shape],
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        **SHAPES[shape],
    )


if __name__ == "__main__":
    print(
        make_model(
            pathlib.Path(sys.argv[1]),
            shape=sys.argv[2] if len(sys.argv) > 2 else "140m",
            seed=int(sys.argv[3]) if len(sys.argv) > 3 else 3,
        )
    )
