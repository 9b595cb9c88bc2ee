"""A vLLM engine under a policy: what its steps change is marked.

Invariants: over every point of an engine that fills its KV in full graphs, no page of a region changed that was not marked; the engine says
the tokens that it says without us; protection lasts to its end.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from child import HERE
from test_gpu_program import Place, place  # noqa: F401  # a fixture

from concordia.testing.model import make_model

ENGINE_S = 220.0
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
size = ["12MiB", "20MiB"]
[[trigger]]
on = "stream-synchronize"
interval_ms = 5
"""


@pytest.mark.timeout(500)
def test_no_page_of_the_kv_changes_unmarked_when_an_engine_decodes_in_graphs(place: Place, tmp_path: Path) -> None:  # noqa: F811
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm for CUDA is not installed")
    make_model(tmp_path / "model", shape="140m")
    policy = tmp_path / "vllm.toml"
    policy.write_text(POLICY.format(journal=place.journal))
    program = [sys.executable, str(HERE / "vllm_program.py"), str(tmp_path / "model"), "1", "0"]
    front = [sys.executable, "-m", "concordia.cli", "run", "--policy", str(policy), "--"]
    said = []
    for words in (program, [*front, *program]):
        done = subprocess.run(words, env=place.environment(), capture_output=True, text=True, timeout=ENGINE_S, check=False)
        print(done.stderr[-3000:])
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
        said.append(json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1]))
    report = place.report()
    for row in report["regions"]:
        print(f"{row['name']}: {row['pages_changed']} changed of {row['pages_marked']} marked of {row['posts'] * row['pages']} pages")
    print({key: value for key, value in report.items() if key != "regions"})
    assert said[1] == said[0]
    assert report["lost"] == ""
    assert report["missed_pages"] == 0
    assert report["audits"] >= 3  # each compares all pages by the host, which takes as long as many steps
    assert sum(row["pages_changed"] for row in report["regions"]) > 0
