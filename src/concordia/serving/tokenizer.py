"""The model's tokenizer, in a process that never loads torch.

Owns: `Tokenizer` and how it is loaded. Promises: the same object of the `tokenizers` library that
vLLM decodes with: transformers builds it in a child process from which torch is hidden, and it
crosses as the library's own JSON. Called by the server's start. Does not encode: prompts are
rendered by the engine. A model without a fast tokenizer has none here (`load` returns None): its
requests are passed through.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import tokenizers
from tokenizers.decoders import DecodeStream

from concordia import config
from concordia.errors import EnvironmentRefused

REPLACEMENT: Final = "\ufffd"
_ROOT: Final = str(pathlib.Path(__file__).parents[2])
_CONTEXT_TOKENS: Final = 4  # UTF-8 spreads a character over at most four byte tokens


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Ids to text, one token at a time (`stream`) or each for itself (`name`)."""

    backend: tokenizers.Tokenizer
    # stands for a leading space in the vocabulary, which a lone decode would lose
    marker: str | None = None
    generation: Mapping[str, Any] = field(
        default_factory=dict
    )  # of the model's generation_config.json
    added: Mapping[int, str] = field(default_factory=dict)
    model_type: str = ""

    def stream(self, prompt: Sequence[int], *, skips_special: bool) -> DecodeStream:
        """An incremental decoder that has seen the prompt."""
        return DecodeStream(ids=list(prompt), skip_special_tokens=skips_special)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def name(self, token: int, before: Sequence[int]) -> str:
        """How vLLM shows this token in log-probabilities; `before` are the ids of the answer ahead
        of it.

        A token that ends inside a character is shown as nothing, and the whole character at the
        token that completes it.
        """
        text = self._alone(token)
        if not text.endswith(REPLACEMENT):
            return text
        for count in range(1, min(len(before), _CONTEXT_TOKENS) + 1):
            context = list(before[len(before) - count :])
            joined = self.decode([*context, token])
            if joined.endswith(REPLACEMENT):
                continue
            while context and self.decode(context[-1:]).endswith(REPLACEMENT):
                context.pop()
            clean = self.decode(context) if context else ""
            return joined[_common(clean, joined) :]
        return ""

    def _alone(self, token: int) -> str:
        text = self.decode([token])
        if self.marker is None:
            return text
        raw = self.backend.id_to_token(token) or ""
        wanted = len(raw) - len(raw.lstrip(self.marker))
        missing = wanted - (len(text) - len(text.lstrip(" "))) if wanted else 0
        return " " * missing + text


def load(
    model: str, *, revision: str | None = None, trusts_remote_code: bool = False
) -> Tokenizer | None:
    """Load the tokenizer of `model` (a folder or a hub name); None when it has no fast one.

    Raises EnvironmentRefused with the loader's last line when it cannot be loaded at all.
    """
    # The child finds this package where this process found it.
    path = os.pathsep.join(part for part in (_ROOT, os.environ.get("PYTHONPATH")) if part)
    command = [sys.executable, "-m", __name__, model, revision or "", str(int(trusts_remote_code))]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=config.TOKENIZER_LOAD_S,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentRefused(
            f"the tokenizer of {model} did not load within {config.TOKENIZER_LOAD_S:.0f} s"
        ) from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EnvironmentRefused(f"the tokenizer of {model} cannot be loaded: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["backend"] is None:
        return None
    return from_json(
        found["backend"], generation=found["generation"], model_type=found["model_type"]
    )


def from_json(
    text: str, *, generation: Mapping[str, Any] | None = None, model_type: str = ""
) -> Tokenizer:
    """A tokenizer from the `tokenizers` library's own JSON."""
    backend = tokenizers.Tokenizer.from_str(text)
    added = {token: str(one) for token, one in _added(backend).items()}
    return Tokenizer(backend, _marker(json.loads(text)), generation or {}, added, model_type)


def _added(backend: tokenizers.Tokenizer) -> dict[int, str]:
    return {token: one.content for token, one in backend.get_added_tokens_decoder().items()}


def _marker(spec: Mapping[str, Any]) -> str | None:
    first = spec.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", []) if first.get("type") == "Sequence" else [first]
    for step in steps:
        if step.get("type") == "Metaspace":
            return str(step.get("replacement", "\u2581"))
    return None


def _common(left: str, right: str) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count


def _export(model: str, revision: str | None, trusts_remote_code: bool) -> dict[str, Any]:
    """Runs in the child: what `load` needs, as one JSON object."""
    import importlib.util

    find = importlib.util.find_spec
    # Torch takes five seconds and 300 MB to import, and no tokenizer needs it.
    importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
    from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

    found = AutoTokenizer.from_pretrained(
        model, revision=revision, trust_remote_code=trusts_remote_code
    )
    backend = getattr(found, "backend_tokenizer", None)
    if _is_mistrals_own(pathlib.Path(model)):
        backend = None  # vLLM prefers Mistral's own tokenizer there, which is not this library's
    config_type = PreTrainedConfig.get_config_dict(model, revision=revision)[0].get("model_type")
    try:
        generation = GenerationConfig.from_pretrained(model, revision=revision).to_diff_dict()
    except OSError:
        generation = {}
    return {
        "backend": backend.to_str() if isinstance(backend, tokenizers.Tokenizer) else None,
        "model_type": str(config_type or ""),
        "generation": {k: v for k, v in generation.items() if isinstance(v, int | float)},
    }


def _is_mistrals_own(folder: pathlib.Path) -> bool:
    has_weights = any(folder.glob("consolidated*.safetensors"))
    return has_weights and any(
        found for name in ("tekken.json", "tokenizer.model.v*") for found in folder.glob(name)
    )


if __name__ == "__main__":
    print(json.dumps(_export(sys.argv[1], sys.argv[2] or None, sys.argv[3] == "1")))
