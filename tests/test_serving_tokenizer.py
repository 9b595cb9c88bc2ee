"""Loading the model's tokenizer.

Invariants: it is the library's own tokenizer, with what the model's files say of generation; torch is never loaded here nor in the child; what
has no fast tokenizer has none; what cannot be loaded is one line that says why.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from concordia.errors import EnvironmentRefused
from concordia.serving import tokenizer as tokenizers
from fake_engine import TOKENIZER, encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model's folder without weights."""
    made = tmp_path_factory.mktemp("model")
    (made / "tokenizer.json").write_text(TOKENIZER.backend.to_str())
    (made / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )
    (made / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (made / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "max_new_tokens": 77, "do_sample": True})
    )
    return made


def test_tokenizer_decodes_as_the_models_own_when_it_was_loaded(folder: pathlib.Path) -> None:
    found = tokenizers.load(str(folder))
    assert found is not None
    assert found.decode(encode("漢 é")) == "漢 é"
    assert found.model_type == "llama"
    assert found.added == {256: "<s>", 257: "</s>"}
    assert found.generation["temperature"] == 0.6
    assert found.generation["max_new_tokens"] == 77


def test_torch_is_not_loaded_when_a_tokenizer_is(folder: pathlib.Path) -> None:
    code = (
        "import sys, json\n"
        "from concordia.serving import tokenizer\n"
        f"tokenizer._export({str(folder)!r}, None, False)\n"
        "print('torch' in sys.modules)"
    )
    root = str(pathlib.Path(tokenizers.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"PYTHONPATH": root, "PATH": "/usr/bin"},
    )
    assert done.stdout.strip() == "False"


def test_there_is_none_when_vllm_would_take_mistrals_own(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tekken.json").write_text("{}")
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert tokenizers.load(str(tmp_path)) is None


def test_error_is_one_line_when_there_is_no_tokenizer(tmp_path: pathlib.Path) -> None:
    with pytest.raises(EnvironmentRefused) as caught:
        tokenizers.load(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
