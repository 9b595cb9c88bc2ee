"""What protection costs a real engine on a GPU, and how soon its answers go on after it is killed.

One `concordia serve` with standbys; a Llama-3.1-8B-shaped model with dummy weights by default.
Decode and prefill are measured past the router within one engine, with and without the connector's
work for each request, in turn; each pair gives one ratio. Then answers run through the router and
their engine gets SIGKILL, once with restore and once without: the peer. Writes figures into
benchmarks/results/device_runtime_h200.json, where --output does not say otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import pathlib
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from cost import arms_of, interval
from rich.console import Console

from concordia.errors import ConcordiaError
from concordia.testing.fault_plan import Target, find_target
from concordia.testing.machine import add_figures
from concordia.testing.model import make_skeleton
from concordia.testing.served import Served
from gpu import figure

RESULTS: Final = pathlib.Path(__file__).parent / "results" / "device_runtime_h200.json"
START_TIMEOUT_S: Final = 300.0
ANSWER_TIMEOUT_S: Final = 120.0
console = Console(stderr=True)
Figures = dict[str, dict[str, Any]]


@dataclass(slots=True)
class Stream:
    """One answer as its client saw it."""

    stamps: list[float] = field(default_factory=list)  # of each token
    ids: list[int] = field(default_factory=list)
    started: float = 0.0


class Client:
    """Asks one endpoint with prompts of token ids; parses no more than it must."""

    def __init__(self, url: str, api_key: str, extra: dict[str, Any]) -> None:
        self._url, self._extra = f"{url}/completions", extra
        self._headers = {"Authorization": f"Bearer {api_key}"}

    async def ask(
        self, session: aiohttp.ClientSession, prompt: list[int], tokens: int, into: Stream
    ) -> Stream:
        body = {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "return_token_ids": True,
            **self._extra,
        }
        into.started = time.monotonic()
        async with session.post(self._url, json=body, headers=self._headers) as response:
            if response.status != 200:
                raise ConcordiaError(f"{response.status}: {await response.text()}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                now, event = time.monotonic(), json.loads(line[6:])
                if "error" in event:
                    raise ConcordiaError(f"an answer ended: {event['error']}")
                for choice in event["choices"]:
                    ids = choice.get("token_ids") or []
                    into.ids += ids
                    into.stamps += [now] * len(ids)
        if len(into.ids) != tokens:
            raise ConcordiaError(f"{len(into.ids)} of {tokens} tokens came")
        return into

    async def ask_all(
        self, prompts: list[list[int]], tokens: int, streams: list[Stream] | None = None
    ) -> list[Stream]:
        """All at once; `streams` may be watched meanwhile."""
        streams = [Stream() for _ in prompts] if streams is None else streams
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            asked = zip(prompts, streams, strict=True)
            return list(await asyncio.gather(*(self.ask(session, p, tokens, s) for p, s in asked)))


def make_prompts(count: int, tokens: int, rng: random.Random) -> list[list[int]]:
    """Prompts that share no block with any other, of lengths that differ by a block: else all of
    them would fill their blocks in the same step, which arrivals at random do not.
    """
    lengths = [tokens - rng.randrange(16) for _ in range(count)]
    return [[rng.randrange(1, 250) for _ in range(length)] for length in lengths]


def decode_figures(streams: list[Stream]) -> tuple[float, float]:
    """Tokens per second while all of them decode, and the 99th percentile of the time between two
    tokens of one stream in that window, in seconds.
    """
    opened = max(s.stamps[0] for s in streams)
    closed = min(s.stamps[-1] for s in streams)
    tokens = sum(opened < stamp <= closed for s in streams for stamp in s.stamps)
    gaps = sorted(
        b - a for s in streams for a, b in zip(s.stamps, s.stamps[1:], strict=False) if a >= opened
    )
    return tokens / (closed - opened), gaps[math.ceil(0.99 * len(gaps)) - 1]


def ratio_figure(ratios: list[float], **peers: float) -> dict[str, Any]:
    """A figure of the result file, with the 95 % interval of its median."""
    low, high = interval(ratios)
    return {
        **figure(ratios, "ratio", digits=4),
        "interval_95": [round(low, 4), round(high, 4)],
        "peer": peers,
    }


def measure_cost(served: Served, options: argparse.Namespace) -> Figures:
    """decode_ratio, decode_p99_ratio, prefill_ratio."""
    arms = [Client(arm.url, arm.api_key, arm.extra) for arm in arms_of(served)]
    rng = random.Random(options.seed)
    speeds: list[float] = []
    tails: list[float] = []
    prefills: list[float] = []

    def decode(arm: Client) -> tuple[float, float]:
        prompts = make_prompts(options.requests, options.context, rng)
        return decode_figures(asyncio.run(arm.ask_all(prompts, options.tokens)))

    def prefill(arm: Client) -> float:
        (stream,) = asyncio.run(arm.ask_all(make_prompts(1, options.prefill, rng), 1))
        return stream.stamps[0] - stream.started

    for arm in arms:  # not counted
        decode(arm)
        prefill(arm)
    for pair in range(options.pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        found = {i: decode(arms[i]) for i in order}
        speeds.append(found[0][0] / found[1][0])
        tails.append(found[0][1] / found[1][1])
        console.log(
            f"decode {pair + 1}/{options.pairs}: {found[0][0]:.0f} against {found[1][0]:.0f} "
            f"tokens/s, p99 {found[0][1] * 1e3:.2f} against {found[1][1] * 1e3:.2f} ms"
        )
    for pair in range(2 * options.pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        spent = {i: prefill(arms[i]) for i in order}
        prefills.append(spent[1] / spent[0])
    console.log(f"prefill of {options.prefill} tokens: {spent[0]:.3f} against {spent[1]:.3f} s")
    return {
        "decode_ratio": ratio_figure(speeds),
        "decode_p99_ratio": ratio_figure(tails),
        "prefill_ratio": ratio_figure(prefills),
    }


async def break_once(
    served: Served, options: argparse.Namespace, rng: random.Random, *, restore: bool
) -> list[float]:
    """Seconds from the kill to the next token of each answer."""
    victim = find_target(served.active()["session_id"], Target.ENGINE_CORE)
    client = Client(served.url, "bench", {"concordia": {"restore": restore}})
    streams = [Stream() for _ in range(options.requests)]
    prompts = make_prompts(options.requests, options.context, rng)
    asking = asyncio.create_task(client.ask_all(prompts, options.tokens, streams))
    while min(len(s.ids) for s in streams) < options.tokens // 4:
        if asking.done():
            asking.result()
            raise ConcordiaError("the answers ended before the kill")
        await asyncio.sleep(0.005)
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    await asking
    # What was on its way when the engine died may still have come: the pause is the longest gap.
    pauses = []
    for stream in streams:
        gaps = zip(stream.stamps, stream.stamps[1:], strict=False)
        _, after = max((b - a, b) for a, b in gaps if b > killed)
        pauses.append(after - killed)
    return pauses


def measure_recovery(served: Served, options: argparse.Namespace) -> Figures:
    """recovery_next_token, beside the same kill without restore."""
    rng = random.Random(options.seed + 1)
    found: dict[bool, list[float]] = {}
    for restore in (True, False):
        served.wait_ready(timeout_s=START_TIMEOUT_S, standbys=1)
        found[restore] = sorted(asyncio.run(break_once(served, options, rng, restore=restore)))
        console.log(
            f"next token with{'' if restore else 'out'} restore: median "
            f"{statistics.median(found[restore]):.3f} s, last {found[restore][-1]:.3f} s"
        )
    pauses = found[True]
    return {
        "recovery_next_token": {
            **figure(pauses, "s", digits=4),
            "max": round(pauses[-1], 4),
            "peer": {"recompute": round(statistics.median(found[False]), 4)},
        }
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=192, help="tokens of each answer")
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the long prompt")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--kv-cache", default=str(12 << 30), help="bytes of each engine")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("bench-output"))
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", choices=["cost", "recovery"], default=["cost"])
    parser.add_argument("engine_flags", nargs="*", help="after --: to vLLM")
    options = parser.parse_args(arguments)
    model = options.folder / f"model-{options.shape}"
    make_skeleton(model, shape=options.shape)
    flags = [
        *("--replicas", "1", "--standby", "2" if "recovery" in options.only else "0"),
        *("--served-model-name", "bench", "--load-format", "dummy", "--dtype", "bfloat16"),
        *("--max-model-len", str(options.prefill + 512), "--max-num-seqs", str(options.requests)),
        *("--kv-cache-memory-bytes", options.kv_cache),
        *("--journal-dir", f"/dev/shm/concordia-bench-{time.time_ns()}"),
        *("--", *options.engine_flags),
    ]
    figures: Figures = {}
    with Served(model, flags, log=options.folder / "engine.log") as served:
        with console.status("starting the engines"):
            served.wait_ready(timeout_s=START_TIMEOUT_S)
        if "cost" in options.only:
            # Standbys that load take cores; one serves alone until they are there.
            standbys = 2 if "recovery" in options.only else 0
            served.wait_ready(timeout_s=START_TIMEOUT_S, standbys=standbys)
            figures |= measure_cost(served, options)
        if "recovery" in options.only:
            figures |= measure_recovery(served, options)
    add_figures(options.output, figures)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConcordiaError as error:
        console.print(f"engine: {error}")
        sys.exit(error.exit_code)
