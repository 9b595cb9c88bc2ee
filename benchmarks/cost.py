"""What protection costs: tokens per second with and without it, through the same router.

Two servers stand side by side, one without the connector and the journal; they are asked in turn (A
B, B A, ...), and each pair gives one ratio. Writes the median ratio with its 95 % interval (order
statistics) to benchmarks/results/cost_cpu.json and prints it. The servers are started anew several
times, because two engines of one configuration differ, too.

With --one-engine both arms are one engine, asked past the router, with and without the connector's
work for each request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from figures import interval
from openai import AsyncOpenAI
from rich.console import Console

from concordia.errors import ConcordiaError
from concordia.testing.command import Parser, count, file_in_folder, run_command
from concordia.testing.load import ask_all, make_questions
from concordia.testing.machine import machine
from concordia.testing.model import make_model
from concordia.testing.served import Served

START_TIMEOUT_S: Final = 240.0
console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Arm:
    """Whom to ask, and what to say in each request."""

    url: str
    api_key: str = "bench"
    extra: dict[str, Any] = field(default_factory=dict)


async def tokens_per_second(
    arm: Arm, *, requests: int, tokens: int, seed: int, words_max: int
) -> float:
    """One load: all requests at once, counted from the first question to the last token."""
    client = AsyncOpenAI(base_url=arm.url, api_key=arm.api_key, max_retries=0, timeout=300)
    questions = make_questions(
        requests, seed=seed, max_tokens=tokens, words_min=min(20, words_max), words_max=words_max
    )
    questions = [dataclasses.replace(question, extra=arm.extra) for question in questions]
    started = time.monotonic()
    answers = await ask_all(client, "bench", questions)
    ended = max(a.stamps[-1] for a in answers if a.stamps)
    await client.close()
    errors = [a.error for a in answers if a.error]
    if errors:
        raise ConcordiaError(f"a request failed: {errors[0]}")
    return sum(len(a.tokens) for a in answers) / (ended - started)


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--pairs", type=count, default=12)
    parser.add_argument(
        "--starts",
        type=count,
        default=4,
        help="how often the servers are started anew: two of one kind differ, too",
    )
    parser.add_argument("--requests", type=count, default=4)
    parser.add_argument("--tokens", type=count, default=256)
    parser.add_argument("--shape", default="140m")
    parser.add_argument("--words", type=count, default=120, help="longest prompt")
    parser.add_argument(
        "--one-engine", action="store_true", help="compare within one engine, past the router"
    )
    parser.add_argument(
        "--commit",
        choices=["release", "before-emit"],
        default="release",
        help="as of concordia serve",
    )
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("demo-output"))
    parser.add_argument(
        "--result", type=file_in_folder, default=pathlib.Path("benchmarks/results/cost_cpu.json")
    )
    options = parser.parse_args(arguments)
    model = options.folder / f"model-{options.shape}-3"
    make_model(model, shape=options.shape)
    rows: list[dict[str, float]] = []
    for start in range(options.starts):
        servers = start_servers(model, options, is_plain_first=start % 2 == 1)
        with servers as arms:
            pairs = range(len(rows), options.pairs * (start + 1) // options.starts)
            rows += measure(*arms, options, pairs)
    return report(rows, options)


@contextlib.contextmanager
def start_servers(
    model: pathlib.Path, options: argparse.Namespace, *, is_plain_first: bool
) -> Iterator[tuple[Arm, Arm]]:
    """The protected arm and the plain one, ready and warm."""
    common = [
        *("--replicas", "1", "--standby", "0", "--served-model-name", "bench"),
        *("--dtype", "bfloat16", "--max-model-len", "4096"),
        *("--kv-cache-memory-bytes", str(512 << 20)),
    ]
    journal = f"/dev/shm/concordia-bench-{time.time_ns()}"
    flags = {
        "protected": [*common, "--commit", options.commit, "--journal-dir", journal],
        "plain": [*common, "--no-protect"],
    }
    if options.one_engine:
        del flags["plain"]
    with contextlib.ExitStack() as stack:
        served = {}
        for name in sorted(flags, reverse=not is_plain_first):
            log = options.folder / f"bench-{name}.log"
            served[name] = stack.enter_context(Served(model, flags[name], log=log))
        with console.status(f"starting {len(served)} server(s)"):
            for server in served.values():
                server.wait_ready(timeout_s=START_TIMEOUT_S)
        if options.one_engine:
            arms = arms_of(served["protected"])
        else:
            arms = Arm(served["protected"].url), Arm(served["plain"].url)
        for arm in arms:
            load(arm, options, seed=1)  # warm-up, not counted
        yield arms


def arms_of(served: Served) -> tuple[Arm, Arm]:
    """The one engine of a server, with protection and without."""
    replica = served.active()
    environment = pathlib.Path(f"/proc/{replica['session_id']}/environ").read_bytes().split(b"\0")
    (key,) = [
        entry.partition(b"=")[2].decode()
        for entry in environment
        if entry.startswith(b"VLLM_API_KEY=")
    ]
    url = f"{replica['base_url']}/v1"
    return Arm(url, key), Arm(url, key, {"kv_transfer_params": {"concordia": False}})


def load(arm: Arm, options: argparse.Namespace, *, seed: int) -> float:
    """Tokens per second of one load."""
    requests, tokens, words = options.requests, options.tokens, options.words
    return asyncio.run(
        tokens_per_second(arm, requests=requests, tokens=tokens, seed=seed, words_max=words)
    )


def measure(
    protected: Arm, plain: Arm, options: argparse.Namespace, pairs: range
) -> list[dict[str, float]]:
    """Both arms, in turn, once for each pair."""
    rows = []
    for pair in pairs:
        first, second = (protected, plain) if pair % 2 == 0 else (plain, protected)
        # In one engine each arm has questions of its own: what the first computed would be the
        # second's prefix.
        apart = 1000 if options.one_engine else 0
        speeds = {
            id(arm): load(arm, options, seed=100 + pair + place * apart)
            for place, arm in enumerate((first, second))
        }
        with_, without = speeds[id(protected)], speeds[id(plain)]
        row = {"protected": with_, "plain": without, "ratio": with_ / without}
        rows.append(row)
        console.log(
            f"pair {pair + 1}/{options.pairs}: {row['protected']:.1f} against "
            f"{row['plain']:.1f} tokens/s, ratio {row['ratio']:.4f}"
        )
    return rows


def report(rows: list[dict[str, float]], options: argparse.Namespace) -> int:
    ratios = [row["ratio"] for row in rows]
    low, high = interval(ratios)
    result = {
        "what": "tokens/s with protection over tokens/s without, "
        + ("of one engine, past the router" if options.one_engine else "both through the router"),
        "machine": machine(),
        "starts": options.starts,
        "requests": options.requests,
        "tokens_per_request": options.tokens,
        "shape": options.shape,
        "commit": options.commit,
        "prompt_words_max": options.words,
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_interval_95": [round(low, 4), round(high, 4)],
        "protected_tokens_per_s_median": round(statistics.median(r["protected"] for r in rows), 1),
        "plain_tokens_per_s_median": round(statistics.median(r["plain"] for r in rows), 1),
        "pairs": [{key: round(value, 4) for key, value in row.items()} for row in rows],
    }
    options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "pairs"}))
    return 0 if result["ratio_median"] >= 0.97 else 1


if __name__ == "__main__":
    run_command(main)
