"""A vLLM engine under a policy: what its steps change is marked.

Invariants: the regions are the KV of each layer and nothing else; over every point of an engine that fills it in full graphs, round after
round, no page of a region changed that was not marked, and pages of each did change; where the kernels of its attention mark their stores and
the others are trusted, most pages of each region are not marked; the engine says the tokens that it says without us; protection lasts to its end.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from child import HERE
from test_gpu_program import Place, place  # noqa: F401  # a fixture
from vllm_program import KV_LAYER_BYTES, LAYERS

from concordia.integrations.program.coverage import read_run
from concordia.integrations.program.run_folder import ProgramRun
from concordia.testing.model import SHAPES, make_model

ENGINE_S = 220.0
ROUNDS = 8  # of 400 steps: with copies, comparisons and hashes some 10 seconds
AUDITS = 10  # at least: each compares all pages by the host, which takes as long as many steps
POLICY = """
[program]
series = "vllm"
audit_every = 1
[journal]
place = "{journal}"
size = "6GiB"
[limits]
stage = "1GiB"
[[region]]
name = "kv"
size = "{size}B"
[[trigger]]
on = "graph-launch"
interval_ms = 5
[images]
# cuBLAS (whose kernels are those of CUTLASS, too), vLLM's own, PyTorch's with what it uses and those of its files' own (_GLOBAL__N_, then the file),
# and FlashAttention's
trust_arguments = [
    "nvjet*", "*gemm*", "*gemv*", "*cutlass*", "*splitK*", "*cublas*", "_ZN4vllm*", "_ZN2at*", "*at_cuda_detail*", "*3cub*", "*_GLOBAL__N_*_cu_*", "*flash*",
]
trust_maps = ["*"]
"""
# vLLM's attention, and hooks that are not the policy's. Triton's kernels mark their stores in PTX, and with TRITON_ATTN that is so of the one that writes
# new keys and values, too: reshape_and_cache_kernel_flash (vllm/v1/attention/ops/triton_reshape_and_cache_flash.py). It marks a region as a whole only
# where its text got no marks, and the notes that are printed say why. What vLLM chooses (FlashAttention) is machine code whose arguments point into the
# KV, and so is what writes it: it marks regions as a whole, or, with `sass-marks`, what it stores, where its stores can be followed.
ATTENTIONS = {"triton": ("TRITON_ATTN", ""), "chosen": ("", ""), "chosen-sass": ("", "entry,marks,sass-marks")}
MARKED_MOST = {"triton": 0.5, "chosen": 1.0, "chosen-sass": 1.0}  # share of all pages of a region, at all points


def print_marks(place: Place, rows: list[dict[str, Any]]) -> None:  # noqa: F811
    """By region how precise they are, and whose launches make them less so."""
    for row in rows:
        changed, marked, pages = row["pages_changed"], row["pages_marked"], row["posts"] * row["pages"]
        print(f"{row['name']}: precision {changed / max(marked, 1):.3f}: {changed} changed of {marked} marked of {pages} pages, {pages - marked} unmarked")
    newest = max((place.runs / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    coverage = read_run(ProgramRun(newest))
    for one in coverage.unseen:
        print(f"{one.count} launches or nodes marked {one.why}: {one.kernel}")
    print("\n".join([*coverage.notes, coverage.summary()]))


@pytest.mark.timeout(500)
@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_no_page_of_the_kv_changes_unmarked_when_an_engine_decodes_in_graphs(place: Place, tmp_path: Path, attention: str) -> None:  # noqa: F811
    backend, hooks = ATTENTIONS[attention]
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm for CUDA is not installed")
    assert SHAPES["140m"]["num_hidden_layers"] == LAYERS
    make_model(tmp_path / "model", shape="140m")
    policy = tmp_path / "vllm.toml"
    policy.write_text(POLICY.format(journal=place.journal, size=KV_LAYER_BYTES))
    program = [sys.executable, str(HERE / "vllm_program.py"), str(tmp_path / "model"), "1", "0", str(ROUNDS), backend]
    front = [sys.executable, "-m", "concordia.cli", "run", "--policy", str(policy), *(["--hooks", hooks] if hooks else []), "--"]
    said = []
    for words in (program, [*front, *program]):
        started = time.monotonic()
        done = subprocess.run(words, env=place.environment(), capture_output=True, text=True, timeout=ENGINE_S, check=False)
        print(f"{time.monotonic() - started:.0f} s:", done.stderr[-3000:])
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
        said.append(json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1]))
    report = place.report()
    print({key: value for key, value in report.items() if key != "regions"})
    print_marks(place, report["regions"])
    assert said[1] == said[0]
    assert report["lost"] == ""
    assert [(row["name"], row["bytes"]) for row in report["regions"]] == [(f"kv.{i}", KV_LAYER_BYTES) for i in range(LAYERS)]
    assert report["missed_pages"] == 0
    assert report["audits"] >= AUDITS
    assert [row["name"] for row in report["regions"] if row["posts"] >= 2 and not row["pages_changed"]] == []
    assert min(row["posts"] for row in report["regions"]) >= 2
    assert max(row["pages_marked"] / (row["posts"] * row["pages"]) for row in report["regions"]) <= MARKED_MOST[attention]
