"""What a decode step of 32 requests costs the engine's own threads, and how even its steps are.

Runs the scheduler's and the worker's Python for each step, and what an engine does once a second
with the journal's keys, in one process without GPU, engine or journal: 32 requests whose prompts
have one length, 2K tokens of blocks of 16, so that all their blocks fill in the same steps. Writes
benchmarks/results/step_paths_cpu.json; the peers are the same done the way it was before: blocks
whole in the step that fills them, and all keys at once. Takes some 20 s.
"""

from __future__ import annotations

import json
import pathlib
import random
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from figures import Figures, figure

from concordia import abi, config
from concordia.integrations.vllm.appends import Append, Batch
from concordia.integrations.vllm.identity import Identity, KeyChain
from concordia.integrations.vllm.named_blocks import NamedBlocks
from concordia.integrations.vllm.pump import AppendPump
from concordia.integrations.vllm.step_writes import Scheduled, StepWrites
from concordia.integrations.vllm.track import Track
from concordia.integrations.vllm.write_set import WriteSet
from concordia.journal.key_changes import KeyNews
from concordia.runtime.ring import Task, pack_task
from concordia.testing.command import Parser, result_file, run_command
from concordia.testing.machine import add_figures

RESULTS: Final = pathlib.Path(__file__).parent / "results" / "step_paths_cpu.json"
REQUESTS: Final = 32
PROMPT: Final = 2048
STEPS: Final = 1600
BLOCK: Final = 16
TOKEN_BYTES: Final = 131_072  # of an 8B model: 32 layers, 8 KV heads of 128, two bytes
KEYS: Final = 20_000  # that a journal of 1.25 times 32 GiB of such KV has
COME, GONE, ROUNDS = 200, 50, 50  # keys of one second: of what 32 requests decode
PREFILL_KEYS: Final = 4096  # of 32 prompts of 2K tokens; those of the last ones go in that second


class Done:
    """A device that has done everything at once."""

    def submit_many(self, tasks: list[Task]) -> list[int]:
        for task in tasks:
            pack_task(task)
        return list(range(len(tasks)))

    def result(self, ticket: int) -> Any:
        return SimpleNamespace(status=abi.STATUS_OK)

    def wait(self, ticket: int, timeout_s: float) -> Any:
        return self.result(ticket)


class Steps:
    """Decode of one engine, step by step."""

    def __init__(self, *, is_spread: bool) -> None:
        self.writes = WriteSet(block_tokens=BLOCK)
        self.writes.spread(is_spread)
        self.pump = AppendPump(Done(), is_threaded=False)
        rng = random.Random(1)
        blocks = -(-PROMPT // BLOCK)
        self._next = REQUESTS * blocks
        self.tokens: dict[str, list[int]] = {}
        first = []
        for number in range(REQUESTS):
            name = f"request-{number}"
            self.tokens[name] = [rng.randrange(50_000) for _ in range(PROMPT)]
            chain = KeyChain(b"seed", block_tokens=BLOCK)
            self.writes.tracks[name] = Track(Identity(name), chain, self.tokens[name])
            ids = list(range(number * blocks, (number + 1) * blocks))
            first.append(Scheduled(name, ids, True, 0, PROMPT))
        self.writes.step(first, step=1)

    def run(self, step: int) -> tuple[float, float, int]:
        """Seconds of the scheduler's and of the worker's side, and bytes to append."""
        scheduled = []
        for name, tokens in self.tokens.items():
            tokens.append(step)
            end = len(tokens)
            fresh = [self._next] if (end - 1) % BLOCK == 0 else []
            self._next += len(fresh)
            scheduled.append(Scheduled(name, fresh, False, end - 1, end))
        started = time.perf_counter()
        result = self.writes.step(scheduled, step=step)
        decided = time.perf_counter()
        self._save(result, step)
        saved = time.perf_counter()
        tokens = sum(
            BLOCK * len(write.full) + (write.tail[1] - write.tail[0] if write.tail else 0)
            for write in result.writes
        )
        return decided - started, saved - decided, tokens * TOKEN_BYTES

    def _save(self, result: StepWrites, step: int) -> None:
        batch = Batch()
        for write in result.writes:
            places = [(abi.KIND_KV_BLOCK, at * BLOCK, (at + 1) * BLOCK, b) for at, b in write.full]
            if write.tail is not None:
                places.append((abi.KIND_KV_TAIL, *write.tail))
            for kind, start, end, block in places:
                task = Task(
                    opcode=1, kind=abi.TASK_APPEND, region=1, record_kind=kind, key=write.key,
                    incarnation=write.incarnation, token_start=start, token_end=end,
                    blocks=(block,), step=step,
                )  # fmt: skip
                batch.appends.append(Append(write.request, start, (block,), task))
        self.pump.submit(batch)
        self.pump.collect()
        self.pump.wait_for(result.reused, timeout_s=1.0)


def measure_steps(*, is_spread: bool) -> dict[str, list[float]]:
    """Every step's figures."""
    steps = Steps(is_spread=is_spread)
    found: dict[str, list[float]] = {"scheduler": [], "worker": [], "bytes": []}
    for step in range(2, 2 + STEPS):
        for name, value in zip(found, steps.run(step), strict=True):
            found[name].append(value)
    return found


def measure_keys(*, is_all: bool) -> tuple[list[float], list[float]]:
    """Seconds of the scribe's thread, which hold the interpreter's lock, and of the step's own."""
    rng = random.Random(2)
    keys = [rng.getrandbits(128) for _ in range(KEYS)]
    steps = Steps(is_spread=True)
    steps.writes.learn(set(keys), before_step=0)
    parsed, learned = [], []
    for number in range(ROUNDS):
        come = [rng.getrandbits(128) for _ in range(COME)]
        gone, keys = keys[:GONE], [*keys[GONE:], *come]
        news = KeyNews(number, True, keys, []) if is_all else KeyNews(number, False, come, gone)
        line = json.dumps(news.to_json())
        started = time.perf_counter()
        heard = KeyNews.from_json(json.loads(line))
        known = set(heard.come) if is_all else set()
        read = time.perf_counter()
        if is_all:
            steps.writes.learn(known, before_step=0)
        else:
            steps.writes.learn_news(heard.come, heard.gone, before_step=0)
        parsed.append(read - started)
        learned.append(time.perf_counter() - read)
    return parsed, learned


def measure_prefill_keys() -> list[float]:
    """Seconds of each step that schedules nothing, beside 32 requests, until the keys of a prefill
    are learned, and those of the one before, whose blocks the engine still holds, are taken away.
    """
    rng = random.Random(3)
    spent: list[float] = []
    for _ in range(20):
        steps = Steps(is_spread=True)
        writes, named = steps.writes, NamedBlocks()
        old, new = ([rng.getrandbits(128) for _ in range(PREFILL_KEYS)] for _ in range(2))
        for block, key in enumerate([*old, *new]):
            named.author(block, key, step=1, is_shared=True)
        named.learn(old, [], before_step=1)
        writes._named = named
        started = time.perf_counter()
        writes.learn_news(new, old, before_step=2)
        for step in range(3, 60):
            writes.step([], step=step)
            spent.append(time.perf_counter() - started)
            if not named.has_missing:
                break
            started = time.perf_counter()
    return spent


def us_with_peer(values: list[float], peer: str, before: list[float]) -> dict[str, Any]:
    """Median, 95th percentile and the most of it, beside what it was."""
    in_us, was_us = ([1e6 * value for value in found] for found in (values, before))
    worst = {"median": round(sorted(was_us)[len(was_us) // 2], 1), "max": round(max(was_us), 1)}
    return {
        **figure(in_us, "us", digits=1),
        "max": round(max(in_us), 1),
        "peer": {peer: worst["median"], f"{peer}, at most": worst["max"]},
    }


def measure() -> Figures:
    """All figures."""
    now, before = measure_steps(is_spread=True), measure_steps(is_spread=False)
    found: Figures = {
        f"decode_step_{side}": us_with_peer(now[side], "at once", before[side])
        for side in ("scheduler", "worker")
    }
    steady = now["bytes"][STEPS // 4 :]
    found["decode_step_bytes_max_to_mean"] = {
        **figure([max(steady) / (sum(steady) / len(steady))], "ratio"),
        "peer": {"at once": round(max(before["bytes"]) * STEPS / sum(before["bytes"]), 3)},
    }
    news, whole = measure_keys(is_all=False), measure_keys(is_all=True)
    for at, name in enumerate(("key_news_read", "key_news_learn")):
        found[name] = us_with_peer(news[at], "all keys", whole[at])
    parts = measure_prefill_keys()
    with mock.patch.object(config, "KEYS_TAKEN", 1 << 20):
        found["key_news_prefill"] = us_with_peer(parts, "in one step", measure_prefill_keys())
    return found


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    parser = Parser(__doc__)
    parser.add_argument("--output", type=result_file("figures"), default=RESULTS)
    options = parser.parse_args(arguments)
    found = measure()
    for name, value in found.items():
        print(f"{name:32} {json.dumps(value)}")
    add_figures(options.output, found)
    return 0


if __name__ == "__main__":
    run_command(main)
