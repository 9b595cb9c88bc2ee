"""integrations/vllm/compat.py, identity.py: what computes the KV, as this vLLM says it.

Invariants: an identity differs when anything that computes the KV does, and is the same otherwise; a context that is longer than what was trained is
another model; only an engine that may give its memory away has its blocks looked at in steps.
"""

from __future__ import annotations

import pathlib
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import torch

from concordia.integrations.vllm import compat
from concordia.integrations.vllm.identity import seed_bytes
from vllm_facts import vllm_config


@pytest.mark.parametrize(
    "other",
    [
        {"model": "another"},
        {"model_weights": "s3://bucket/another"},
        {"revision": "2"},
        {"code_revision": "2"},
        {"dtype": torch.float16},
        {"quantization": "fp8"},
        {"quantization_config": {"linear": "fp8"}},
        {"model_impl": "transformers"},
        {"hf_config": {"rope_theta": 10000}},
        {"hf_config": SimpleNamespace(_commit_hash="2")},
        {"hf_text_config": SimpleNamespace(original_max_position_embeddings=4096), "max_model_len": 8192},
        {"cache_dtype": "fp8"},
        {"cache": {"kv_cache_dtype_skip_layers": ["0"]}},
        {"parallel": {"world_size": 2}},
        {"speculative": SimpleNamespace(method="ngram")},
    ],
    ids=lambda other: next(iter(other)),
)
def test_identity_differs_when_what_computes_the_kv_does(other: dict[str, Any]) -> None:
    path = pathlib.Path("/nowhere")
    plain, repeated = (seed_bytes(compat.model_identity(vllm_config(path))) for _ in range(2))
    assert plain == repeated
    assert seed_bytes(compat.model_identity(vllm_config(path, **other))) != plain


def test_longer_context_is_another_model_only_when_it_passes_the_trained_length() -> None:
    def identity(length: int) -> Any:
        text = SimpleNamespace(rope_parameters={"original_max_position_embeddings": 4096})
        return compat.model_identity(vllm_config(pathlib.Path("/nowhere"), hf_text_config=text, max_model_len=length))

    assert identity(2048) == identity(4096)
    assert identity(4097) != identity(4096)


def test_blocks_are_looked_at_in_steps_only_when_the_engine_may_give_its_memory_away() -> None:
    path = pathlib.Path("/nowhere")
    assert compat.may_sleep(vllm_config(path, enable_sleep_mode=True))
    assert not compat.may_sleep(vllm_config(path))
