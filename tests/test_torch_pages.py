"""integrations/torch_pages.py and torch_random.py, with a real owner and real processes.

Invariants: what a process saved before SIGKILL is there for the next one, bit for bit, whatever kind of state it is; a step that was begun is
not; what cannot be saved is refused in one line; a series has one writer; random generators go on where they were.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch

from concordia import config
from concordia.errors import Corruption, JournalError, LayoutMismatch, UsageError
from concordia.integrations.torch_pages import TorchPages
from concordia.integrations.torch_random import pack_random, unpack_random
from concordia.journal.client import JournalClient
from concordia.journal.spawn import spawn_owner

HERE = pathlib.Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def journal() -> Iterator[pathlib.Path]:
    path = pathlib.Path("/dev/shm") / f"concordia-pages-{os.getpid()}"
    spawn_owner(path, size_bytes=32 << 20, linger_s=60)
    yield path
    with JournalClient.connect(path) as client:
        client.shutdown()
    shutil.rmtree(path, ignore_errors=True)


def child(action: str, kind: str, journal: pathlib.Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent / "src")}
    command = [sys.executable, str(HERE / "torch_child.py"), action, kind, str(journal)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("kind", ["adapters", "moments", "sampler", "tables", "communicator"])
def test_state_comes_back_bit_for_bit_when_its_process_was_killed(kind: str, journal: pathlib.Path) -> None:
    killed = child("save", kind, journal)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout.count("Committed(step=") == 3
    restored = child("restore", kind, journal)
    assert restored.stdout.strip() == "equal", restored.stderr


def test_tensors_may_change_at_once_when_they_were_staged(journal: pathlib.Path) -> None:
    weight = torch.ones(3, 5000)
    with TorchPages.open({"w": weight}, name="staged", journal=journal) as pages:
        assert pages.restore() is None
        pages.stage(1, b"one")
        weight.fill_(2)
        assert pages.commit().pages == 15
        pages.stage(2)
        pages.stage(3, b"three")  # commits the step before
        weight[1, 7] = 5
        assert pages.commit().pages == 0, "nothing had changed since the step before"
        assert pages.save(4, b"four").pages == 1
    weight.zero_()
    with TorchPages.open({"w": weight}, name="staged", journal=journal) as pages:
        restored = pages.restore()
        assert restored is not None
        assert (restored.step, restored.extra) == (4, b"four")
        assert float(weight.sum()) == 15_000 * 2 + 3
        assert pages.save(5).pages == 15, "a life begins with all pages"


def test_protection_is_refused_when_tensors_cannot_be_saved(journal: pathlib.Path) -> None:
    for tensors, words in (
        ({}, "no tensors"),
        ({"a": []}, "no tensors"),
        ({"a": torch.empty(0)}, "empty, sparse"),
        ({"a": torch.eye(4).to_sparse()}, "empty, sparse"),
        ({"a": torch.empty(4, device="meta")}, "use one GPU, or the CPU"),
        ({"a": torch.ones(4)}, "bytes of name"),
    ):
        with pytest.raises(UsageError, match=words):
            TorchPages.open(tensors, name="refused" * (20 if words == "bytes of name" else 1), journal=journal)


def test_restore_is_refused_when_shapes_changed_and_no_tensor_is_touched(journal: pathlib.Path) -> None:
    with TorchPages.open({"a": torch.ones(4, 6)}, name="shapes", journal=journal) as pages:
        pages.save(1)
    other = torch.full((6, 4), 3.0)
    with TorchPages.open({"a": other}, name="shapes", journal=journal) as pages, pytest.raises(LayoutMismatch, match="was saved as"):
        pages.restore()
    assert bool((other == 3).all())


def test_series_is_refused_while_another_writes_it(journal: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CHECKPOINT_FENCE_S", 0.1)
    with TorchPages.open({"a": torch.ones(4)}, name="twice", journal=journal) as pages:
        with pytest.raises(JournalError, match="end it first"):  # before either has saved
            TorchPages.open({"a": torch.ones(4)}, name="twice", journal=journal)
        pages.save(1)
        with pytest.raises(JournalError, match="end it first"):
            TorchPages.open({"a": torch.ones(4)}, name="twice", journal=journal)
    with TorchPages.open({"a": torch.ones(4)}, name="twice", journal=journal) as pages:
        assert pages.restore() is not None


def test_page_s_example_runs_and_its_limits_are_those_of_config(journal: pathlib.Path) -> None:
    text = (HERE.parent / "docs" / "regions.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    code = compile(example.replace("/dev/shm/concordia-adapters", str(journal)).replace("101", "4"), "regions.md", "exec")
    for began in (None, 3):
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["restored"] is None if began is None else names["restored"].step == began
    assert f"after {config.CHECKPOINT_WAIT_S:.0f} seconds" in text
    assert f"waits {config.CHECKPOINT_FENCE_S:.0f} seconds" in text
    assert f"up to {config.STATE_BYTES_MAX >> 20} MiB" in text
    assert f"keeps it for {config.OWNER_LINGER_S:.0f} seconds" in text


def test_generators_go_on_when_they_were_unpacked() -> None:
    random.seed(3)
    torch.manual_seed(4)
    random.gauss(0, 1)  # keeps a second number for the next call
    packed = pack_random()
    drawn = random.gauss(0, 1), random.random(), torch.randn(4).tolist()
    unpack_random(packed)
    assert (random.gauss(0, 1), random.random(), torch.randn(4).tolist()) == drawn
    before, cpu = random.getstate(), json.loads(packed)["torch"]["cpu"]
    states = ({"cpu": cpu, "cuda:63": cpu}, {"cpu": cpu, "gpu": cpu}, {"cuda:0": cpu})
    unusable = [json.dumps(json.loads(packed) | {"torch": found}).encode() for found in states]
    for wrong in (*unusable, b"", b"[]", b'{"python": [3, [1], null], "torch": {}}', packed.replace(b'"cpu"', b'"gpu"')):
        with pytest.raises(Corruption, match="no state of random generators"):
            unpack_random(wrong)
        assert random.getstate() == before, "nothing was set"
