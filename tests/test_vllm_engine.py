"""integrations/vllm against real engines on the CPU, in processes of their own.

Invariants: a fresh engine resumes a whole cohort with the tokens and log-probabilities of the unfailed run; a flipped byte is caught and never
becomes a token; the same holds after preemption, chunked prefill, shared prefixes and with whole blocks only, for every rank of TP 2, and
beside another connector. Engine starts take most of the time, so each engine serves several cases.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

from concordia.journal import segment
from concordia.journal.client import JournalClient
from concordia.journal.folder import Folder
from concordia.journal.owner import spawn_owner
from concordia.journal.record import request_key
from concordia.testing.model import make_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

CHILD = pathlib.Path(__file__).with_name("vllm_child.py")
CONNECTOR = {
    "kv_connector": "ConcordiaConnector",
    "kv_connector_module_path": "concordia.integrations.vllm.connector",
    "kv_role": "kv_both",
}
BLOCK = 32
LIFE = 25  # tokens of the first life
WHOLE = 60  # tokens of the unfailed run


class Bench:
    """A journal, a model, and engines that come and go."""

    def __init__(self, model: pathlib.Path, scratch: pathlib.Path) -> None:
        self.model, self.scratch = model, scratch
        self.journal = pathlib.Path("/dev/shm") / f"concordia-test-{os.getpid()}"
        shutil.rmtree(self.journal, ignore_errors=True)
        spawn_owner(self.journal, size_bytes=192 << 20, segment_bytes=2 << 20, linger_s=250)
        self.client = JournalClient.connect(self.journal)
        self.cursor = 0
        self.lives = 0

    def engine(
        self, *steps: list[dict[str, Any]], extra: dict[str, Any] | None = None, transfer: Any = None, **engine: Any
    ) -> list[list[dict[str, Any]]]:
        """Start an engine, ask step by step, end it; the answers of each step."""
        self.lives += 1
        settings = {"journal": str(self.journal), "replica": self.lives, **(extra or {})}
        ours = CONNECTOR | {"kv_connector_extra_config": settings}
        script = {
            "engine": {
                "model": str(self.model), "dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 8, "block_size": BLOCK,
                "kv_cache_memory_bytes": 16 << 20, "enable_prefix_caching": False,
            } | engine,
            "transfer": transfer(ours) if transfer else ours,
            "steps": [{"requests": requests} for requests in steps],
        }  # fmt: skip
        path = self.scratch / f"life-{self.lives}.json"
        path.write_text(json.dumps(script))
        done = subprocess.run(
            [sys.executable, str(CHILD), str(path)], capture_output=True, text=True, timeout=270, check=False
        )
        said = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("CHILD ")]
        log = done.stdout + done.stderr
        assert [line for line in said if "ended" in line], f"ended with {done.returncode}: {log[-4000:]}"
        assert "protection is OFF" not in log, log[-4000:]
        return [step["answers"] for step in said if "answers" in step]

    def events(self) -> list[dict[str, Any]]:
        """What was said since the last call."""
        self.cursor, found = self.client.events(self.cursor)
        return found

    def restored(self, name: str, events: list[dict[str, Any]]) -> dict[str, Any]:
        (found,) = [e for e in events if e["event"] == "restored" and e["request"] == name]
        return found

    def flip(self, name: str, layout_hash: int) -> None:
        """Damage one byte of the request's KV in the journal."""
        cut = self.client.cut(request_key(name), tokens_known=10**6, layout_hash=layout_hash, world=1)
        pool, board = segment.attach(Folder(self.journal), writable=True)
        pool.view[cut.pieces[0][-1].pool_offset + 5] ^= 0x10
        pool.close()
        board.close()

    def layout_hash(self) -> int:
        pool, board = segment.attach(Folder(self.journal))
        newest = max((control.identity() for control in board.in_use()), key=lambda identity: identity.stream)
        pool.close()
        board.close()
        return newest.layout_hash


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    model = tmp_path_factory.mktemp("model")
    make_model(model, shape="tiny")
    made = Bench(model, tmp_path_factory.mktemp("lives"))
    yield made
    made.client.shutdown()


def ask(
    prompt: list[int], count: int, *, name: str | None = None, life: int = 1, cohort: tuple[str, int] | None = None
) -> dict[str, Any]:
    """One request; without a name the journal is left out of it, in a later life it is to be restored."""
    if name is None:
        return {"prompt": prompt, "count": count, "concordia": False}
    own: dict[str, Any] = {"request": name, "incarnation": life, "tokens": len(prompt), "restore": life > 1}
    if cohort is not None:
        own["cohort"] = {"id": cohort[0], "size": cohort[1], "deadline_s": 10.0}
    return {"prompt": prompt, "count": count, "concordia": own}


def prompt_of(seed: int, length: int) -> list[int]:
    return [(seed * 37 + 5 * i * (seed + 1)) % 256 for i in range(length)]


def difference(found: dict[str, Any], wanted: dict[str, Any], start: int) -> tuple[bool, float]:
    """Tokens equal from `start` on, and the largest difference of a log-probability."""
    pairs = zip(found["logprobs"], wanted["logprobs"][start:], strict=True)
    return found["tokens"] == wanted["tokens"][start:], max(abs(a - b) for a, b in pairs)


PROMPTS = [prompt_of(i, 100 + 37 * i) for i in range(4)]


@pytest.fixture(scope="module")
def first_life(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Requests that stop early, and the unfailed runs that they are to be equal to."""
    cohort = [ask(p, LIFE, name=f"r{i}", cohort=("first", 4)) for i, p in enumerate(PROMPTS)]
    whole = [ask(p, WHOLE, name=f"whole{i}", cohort=("whole", 4)) for i, p in enumerate(PROMPTS)]
    lone = [[ask(PROMPTS[i], LIFE, name=name)] for i, name in ((1, "spoiled"), (2, "beside"))]
    alone = [ask(PROMPTS[2], WHOLE)]
    answers = bench.engine(cohort, whole, *lone, alone, extra={"prefix_restore": False})
    names = ("cohort", "whole", "spoiled", "beside", "alone")
    found = dict(zip(names, answers, strict=True))
    for short, long in zip(found["cohort"], found["whole"], strict=True):
        assert long["tokens"][:LIFE] == short["tokens"], "a closed cohort is the same twice"
    assert [e for e in bench.events() if e["event"] not in ("restored", "appended")] == []
    return found


def test_cohort_continues_bit_for_bit_when_a_fresh_engine_restores_it(
    bench: Bench, first_life: dict[str, list[dict[str, Any]]]
) -> None:
    bench.flip("spoiled", bench.layout_hash())
    resumed = [
        ask(p + a["tokens"], WHOLE - LIFE, name=f"r{i}", life=2, cohort=("second", 4))
        for i, (p, a) in enumerate(zip(PROMPTS, first_life["cohort"], strict=True))
    ]
    known = PROMPTS[1] + first_life["spoiled"][0]["tokens"]
    answers = bench.engine(
        resumed, [ask(known, 20, name="spoiled", life=2)], [ask(known, 20)], [{"prompt": PROMPTS[3], "count": 5}]
    )
    events = bench.events()
    for i, (found, wanted) in enumerate(zip(answers[0], first_life["whole"], strict=True)):
        assert difference(found, wanted, LIFE) == (True, 0.0), f"r{i}"
        told = bench.restored(f"r{i}", events)
        assert (told["level"], told["recomputed_tokens"], told["hash_mismatches"]) == ("state-exact", 1, 0)
        assert found["cached"] == len(PROMPTS[i]) + LIFE - 1
    # The flipped byte: found by its hash, and the request is computed as if nothing had been saved.
    told = bench.restored("spoiled", events)
    assert (told["level"], "payload hash" in told["reason"]) == ("cold", True)
    assert difference(answers[1][0], answers[2][0], 0) == (True, 0.0)
    # A client that knows nothing of us asks the same prompt: its full blocks come from the journal.
    (prefix,) = [e for e in events if e.get("level") == "prefix"]
    assert prefix["restored_tokens"] == len(PROMPTS[3]) // BLOCK * BLOCK
    assert answers[3][0]["cached"] == prefix["restored_tokens"]


def test_request_continues_bit_for_bit_when_another_connector_is_there_too(
    bench: Bench, first_life: dict[str, list[dict[str, Any]]], tmp_path: pathlib.Path
) -> None:
    other = {
        "kv_connector": "ExampleConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }  # fmt: skip

    def joined(ours: dict[str, Any]) -> dict[str, Any]:
        return {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": [other, ours]}}

    known = PROMPTS[2] + first_life["beside"][0]["tokens"]
    answers = bench.engine(
        [ask(known, WHOLE - LIFE, name="beside", life=2)],
        [ask(prompt_of(9, 90), 5, name="fresh")],
        transfer=joined,
        disable_hybrid_kv_cache_manager=True,
    )
    assert difference(answers[0][0], first_life["alone"][0], LIFE) == (True, 0.0)
    assert bench.restored("beside", bench.events())["level"] == "state-exact"
    assert any(tmp_path.iterdir()), "the other connector saved what it saves"


def test_requests_continue_when_they_were_preempted_chunked_shared_and_saved_by_whole_blocks(bench: Bench) -> None:
    shared = prompt_of(7, 2 * BLOCK)
    prompts = [shared + prompt_of(20 + i, 20 + 15 * i) for i in range(4)]
    small = {"dtype": "float32", "enable_prefix_caching": True, "max_num_batched_tokens": 64}
    (short,) = bench.engine(
        [ask(p, WHOLE, name=f"p{i}") for i, p in enumerate(prompts)],
        extra={"layout": "blocks"}, num_gpu_blocks_override=14, max_model_len=256, **small,
    )  # fmt: skip
    layout = bench.layout_hash()
    lives = [
        bench.client.cut(request_key(f"p{i}"), tokens_known=10**6, layout_hash=layout, world=1).incarnation
        for i in range(4)
    ]
    assert any(life % 1000 for life in lives), f"nothing was preempted: {lives}"
    assert any(e["event"] == "whole-blocks" for e in bench.events())
    resumed = [
        ask(p + a["tokens"], 30, name=f"p{i}", life=2, cohort=("again", 4))
        for i, (p, a) in enumerate(zip(prompts, short, strict=True))
    ]
    again, whole = bench.engine(resumed, [ask(p, WHOLE + 30) for p in prompts], **small)
    events = bench.events()
    for i, (found, wanted) in enumerate(zip(again, whole, strict=True)):
        assert found["tokens"] == wanted["tokens"][WHOLE:], f"p{i}"
        assert bench.restored(f"p{i}", events)["level"] == "state-exact"


def test_request_continues_bit_for_bit_when_two_ranks_hold_its_kv(bench: Bench) -> None:
    prompt = prompt_of(5, 70)
    short, whole = bench.engine(
        [ask(prompt, 8, name="tp")], [ask(prompt, 20)], tensor_parallel_size=2, extra={"prefix_restore": False}
    )
    known = prompt + short[0]["tokens"]
    ((found,),) = bench.engine([ask(known, 12, name="tp", life=2)], tensor_parallel_size=2)
    assert difference(found, whole[0], 8) == (True, 0.0)
    assert bench.restored("tp", bench.events())["level"] == "state-exact"
