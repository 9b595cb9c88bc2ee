"""integrations/vllm/weights.py.

Invariants: a byte, a size, a name or a time that differs at a place looked at makes another fingerprint; what has no files is None; an adapter
is refused once its files have changed; nothing is asked of a network.
"""

from __future__ import annotations

import os
import pathlib

import pytest

from concordia import config
from concordia.errors import RecoveryError
from concordia.integrations.vllm.weights import Adapters, fingerprint, locate


def make(folder: pathlib.Path, name: str = "model.safetensors", data: bytes = b"weights") -> pathlib.Path:
    """A file of a given time, so that only what a test changes differs."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    os.utime(folder / name, ns=(10**9, 10**9))
    return folder


def test_fingerprint_is_the_same_when_another_folder_holds_the_same(tmp_path: pathlib.Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first) is not None
    make(first, "tokenizer.json", b"of no account")
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first / "model.safetensors") == fingerprint(second), "one file, as GGUF models are"


@pytest.mark.parametrize("name", ["more.safetensors", "modeling.py", "adapter_config.json"])
def test_fingerprint_differs_when_a_file_is_added(tmp_path: pathlib.Path, name: str) -> None:
    plain = fingerprint(make(tmp_path / "a"))
    assert fingerprint(make(tmp_path / "a", name)) != plain


def test_fingerprint_differs_when_only_the_time_does(tmp_path: pathlib.Path) -> None:
    plain = fingerprint(make(tmp_path / "a"))
    os.utime(tmp_path / "a" / "model.safetensors", ns=(1, 1))
    assert fingerprint(tmp_path / "a") != plain


def test_fingerprint_differs_when_weights_of_one_size_and_time_do(tmp_path: pathlib.Path) -> None:
    size = 3 * config.WEIGHT_SAMPLES * config.WEIGHT_SAMPLE_BYTES
    plain = fingerprint(make(tmp_path / "a", data=bytes(size)))
    assert fingerprint(make(tmp_path / "a", data=bytes([1]) * size)) != plain
    assert fingerprint(make(tmp_path / "a", data=bytes(size - 1) + b"1")) != plain, "the last byte is looked at"
    small = fingerprint(make(tmp_path / "a", data=bytes(9000)))
    assert fingerprint(make(tmp_path / "a", data=bytes(4500) + b"1" + bytes(4499))) != small, "a small file is read whole"


def test_there_is_no_fingerprint_when_there_are_no_weights(tmp_path: pathlib.Path) -> None:
    assert fingerprint(make(tmp_path / "a", "README.md")) is None
    assert fingerprint(tmp_path / "none") is None


def test_repository_is_found_when_its_files_are_in_the_cache(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    root = tmp_path / "models--some--model"
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    assert locate("some/model", cache=str(tmp_path)) == snapshot
    assert locate("some/model", revision="other", cache=str(tmp_path)) is None
    assert locate("s3://bucket/model", cache=str(tmp_path)) is None
    assert locate(str(tmp_path)) == tmp_path


def test_adapter_is_known_by_its_content_when_its_name_is_the_same(tmp_path: pathlib.Path) -> None:
    first = Adapters().identify("poet", 1, str(make(tmp_path / "a", data=b"first")))
    again = Adapters().identify("poet", 1, str(make(tmp_path / "a", data=b"first")))
    other = Adapters().identify("poet", 1, str(make(tmp_path / "a", data=b"other")))
    assert first == again
    assert first != other


def test_adapter_is_refused_when_its_files_changed_under_a_running_engine(tmp_path: pathlib.Path) -> None:
    held = Adapters()
    folder = make(tmp_path / "a")
    first = held.identify("poet", 1, str(folder))
    assert held.identify("poet", 1, str(folder)) == first
    make(folder, data=b"other weights")
    with pytest.raises(RecoveryError, match="have changed"):
        held.identify("poet", 1, str(folder))
    make(folder)
    assert held.identify("poet", 1, str(folder)) == first


def test_adapter_is_refused_when_it_has_no_files_here_or_there_are_too_many(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Adapters()
    with pytest.raises(RecoveryError, match="cannot be read"):
        held.identify("poet", 1, str(tmp_path / "none"))
    monkeypatch.setattr(config, "ADAPTERS_KNOWN_MAX", 0)
    with pytest.raises(RecoveryError, match="no more"):
        held.identify("poet", 1, str(make(tmp_path / "a")))
