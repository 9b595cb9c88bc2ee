"""`concordia serve` with real vLLM on the CPU: a death, a hang, a long prefill beside a start, an orderly end.

Invariants: a killed core and a stopped worker are noticed in time; the stream goes on to its last token, from restored state, with the ids
of an answer that never failed; a healthy engine is not killed while it
prefills beside a starting standby; after SIGTERM no process, file or shared-memory name is left and the exit code is 0.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from concordia.testing.fault_plan import Hit, Target, hit, session_processes
from concordia.testing.model import make_model
from concordia.testing.served import Served

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
]
pytest.importorskip("vllm", reason="vLLM is not installed")

TOKENS = 400  # some ten seconds, so that an engine is still at it when the hit lands
START_S = 400.0
PROMPT = "tell me " * 20


@dataclass
class Scene:
    """One running server, and what its engines had that must be gone afterwards."""

    served: Served
    journal: pathlib.Path
    run: pathlib.Path
    hang: pathlib.Path
    sessions: set[int] = field(default_factory=set)
    names: set[str] = field(default_factory=set)

    def status(self) -> dict[str, Any]:
        found = self.served.status()
        assert found is not None, self.served.tail()
        for replica in found["replicas"]:
            self.sessions.add(replica["session_id"])
            self.names |= shared_names(replica["session_id"])
        return found

    def session(self, state: str) -> int:
        return next(r["session_id"] for r in self.status()["replicas"] if r["state"] == state)


def shared_names(session: int) -> set[str]:
    """Files directly under /dev/shm that processes of a session map."""
    found = set()
    for process in session_processes(session):
        try:
            lines = pathlib.Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except OSError:
            continue
        found |= {
            f[5]
            for line in lines
            if len(f := line.split(maxsplit=5)) == 6 and f[5].startswith("/dev/shm/")
        }
    return {name for name in found if pathlib.Path(name).parent == pathlib.Path("/dev/shm")}


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="e", dir="/tmp") as name:
        folder = pathlib.Path(name)
        make_model(folder / "model", shape="140m")
        journal = pathlib.Path(f"/dev/shm/concordia-serve-{os.getpid()}")
        flags = [
            *("--replicas", "1", "--standby", "1", "--served-model-name", "m"),
            *("--max-model-len", "4096", "--kv-cache-memory-bytes", str(256 << 20)),
            *("--journal-dir", str(journal), "--journal-size", "512MiB"),
            *("--run-dir", str(folder / "run")),
            *("--", "--logits-processors", "hanging_processor:HangingProcessor"),
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CONCORDIA_RUN_DIR", str(folder / "run"))  # for `concordia status`
            patch.setenv("HANG_FILE", str(folder / "hang"))
            paths = [str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
            patch.setenv("PYTHONPATH", os.pathsep.join(p for p in paths if p))
            with Served(folder / "model", flags, log=folder / "serve.log") as served:
                served.wait_ready(timeout_s=START_S, standbys=1)
                yield Scene(served, journal, folder / "run", folder / "hang")


def make_hang(trigger: pathlib.Path, session: int) -> Hit:
    """Let the next forward of that session never end."""
    stamp = time.monotonic_ns()
    partial = trigger.with_suffix(".partial")
    partial.write_text(str(session))
    partial.rename(trigger)
    return Hit("HANG", "forward", session, stamp)


def crowding() -> float:
    """Runnable processes per core: a bound in milliseconds holds for a machine that has cores to give."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def ask_and_hit(
    scene: Scene, target: Target, number: signal.Signals | None
) -> tuple[Hit, list[int], dict[str, Any]]:
    """Stream an answer, hit the engine in its middle; the token ids and the report at the end."""
    session = scene.session("ready")
    done: list[Hit] = []

    def strike(ids: list[int]) -> None:
        if not done and len(ids) > TOKENS // 4:
            done.append(hit(session, target, number) if number else make_hang(scene.hang, session))

    ids, report = ask(scene, strike)
    return done[0], ids, report


def ask(scene: Scene, watch: Callable[[list[int]], None]) -> tuple[list[int], dict[str, Any]]:
    """Stream an answer; `watch` sees the ids so far. The token ids and the report at the end."""
    body = {
        **{"model": "m", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0},
        **{
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
            "concordia": {"report": True},
        },
    }
    ids: list[int] = []
    report: dict[str, Any] = {}
    with httpx.stream("POST", f"{scene.served.url}/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            report = event.get("concordia") or report
            for choice in event["choices"]:
                ids += choice.get("token_ids") or []
            watch(ids)
    return ids, report


def test_stream_goes_on_when_a_core_is_killed_a_worker_stopped_or_a_forward_hangs(
    scene: Scene,
) -> None:
    # From the second answer on the prompt's whole blocks come from the cache, or out of the journal: every prefill has the same shape.
    first = {"model": "m", "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
    assert httpx.post(f"{scene.served.url}/completions", json=first, timeout=120).status_code == 200
    reference, report = ask(scene, lambda ids: None)
    assert (len(reference), report["failovers"]) == (TOKENS, 0)
    for target, number, kind, bound_ms in (
        (Target.ENGINE_CORE, signal.SIGKILL, "process-death", 100),
        (Target.RANK_LAST, signal.SIGSTOP, "process-stopped", 100),
        (Target.RANK_LAST, None, "step-overdue", 1500),
    ):
        scene.served.wait_ready(timeout_s=START_S, standbys=1)
        seen = len(scene.status()["faults"])
        injected, ids, report = ask_and_hit(scene, target, number)
        fault = scene.status()["faults"][seen]
        detected_ms = (fault["detected_ns"] - injected.stamp_ns) / 1e6
        print(f"{kind}: detected after {detected_ms:.1f} ms, {scene.status()['failovers'][-1]}")
        assert fault["kind"] == kind
        assert detected_ms < bound_ms * crowding()
        assert len(ids) == TOKENS
        assert report["failovers"] == 1
        assert report["level"] == "state-exact"
        assert report["restored_tokens"] > 0
        assert ids == reference


def test_healthy_engine_is_left_alone_when_it_prefills_beside_a_start(scene: Scene) -> None:
    os.kill(scene.session("standby"), signal.SIGKILL) if _has_standby(scene) else None
    deadline = time.monotonic() + START_S
    while not any(r["state"] == "starting" for r in scene.status()["replicas"]):
        assert time.monotonic() < deadline
    seen = [f["kind"] for f in scene.status()["faults"]]
    for start in range(3):
        body = {"model": "m", "prompt": [start + i % 200 for i in range(4000)], "max_tokens": 4}
        answer = httpx.post(f"{scene.served.url}/completions", json=body, timeout=240)
        assert answer.status_code == 200, answer.text
    assert [f["kind"] for f in scene.status()["faults"]] == seen


def test_nothing_is_left_when_the_server_is_told_to_end(scene: Scene) -> None:
    scene.status()
    drained = subprocess.run(
        [sys.executable, "-m", "concordia.cli", "drain", "--port", str(scene.served.port)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (drained.returncode, drained.stdout) == (0, "drained\n"), drained.stderr
    body = {"model": "m", "prompt": "x", "max_tokens": 1}
    refused = httpx.post(f"{scene.served.url}/completions", json=body, timeout=60)
    assert refused.status_code == 503
    assert scene.served.close() == 0, scene.served.tail()
    left = [p.pid for session in scene.sessions for p in session_processes(session)]
    assert left == []
    assert [name for name in scene.names if pathlib.Path(name).exists()] == []
    assert not scene.journal.exists()
    assert not scene.run.exists()


def _has_standby(scene: Scene) -> bool:
    return any(r["state"] == "standby" for r in scene.status()["replicas"])
