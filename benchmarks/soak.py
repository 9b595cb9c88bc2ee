"""Faults at random moments under load, and what the clients and the machine saw of them.

Each round picks a target (API process, engine core, last rank, standby, router, owner), a way to
fail (SIGKILL, SIGSTOP, a forward that raises) and a moment (prefill, decode, idle, during recovery)
from its printed seed, asks questions whose unfailed answers are known, and compares. Rows go to a
state file as they happen, so a soak that was interrupted goes on where it was. Ends with one JSON
result.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import pathlib
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import psutil
from openai import AsyncOpenAI
from rich.console import Console

from concordia.errors import ConcordiaError
from concordia.testing.command import Parser, count, file_in_folder, run_command
from concordia.testing.fault_plan import RAISE_FILE_ENV, Target, hit, make_forward_raise
from concordia.testing.load import Answer, Question, ask_all, first_difference, make_questions
from concordia.testing.machine import machine
from concordia.testing.model import make_model
from concordia.testing.served import Served

START_TIMEOUT_S: Final = 240.0
ROUND_TIMEOUT_S: Final = 240.0
# a hang is noticed after its learned deadline, two seconds at most for this model, on loaded cores
# later
PAUSE_MAX_S: Final = 10.0
SETTLE_S: Final = 2.5  # the counters hear of a round once a second
QUESTIONS: Final = 12
AT_ONCE: Final = 4

TARGETS: Final = ("engine-core", "api", "rank-last", "standby", "owner", "router")
TARGET_WEIGHTS: Final = (6, 3, 3, 2, 1, 1)
MOMENTS: Final = ("decode", "prefill", "idle", "recovery")
MOMENT_WEIGHTS: Final = (5, 2, 1, 2)

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Round:
    """What one round does; derived from its seed alone."""

    seed: int
    target: str
    way: str
    moment: str
    share: float

    @staticmethod
    def from_seed(seed: int, *, may_raise: bool) -> Round:
        """`may_raise`: whether the engine can be told to raise in a forward; else that round kills
        its core.
        """
        rng = random.Random(seed)
        target = rng.choices(TARGETS, TARGET_WEIGHTS)[0]
        ways = ["SIGKILL", "SIGKILL", "SIGSTOP"]
        if target == "engine-core":
            ways.append("RAISE")
        way = "SIGKILL" if target in ("owner", "router") else rng.choice(ways)
        moment = rng.choices(MOMENTS, MOMENT_WEIGHTS)[0]
        if way == "RAISE":
            moment = "decode"  # a raise needs a forward to happen in
            way = "RAISE" if may_raise else "SIGKILL"
        return Round(seed, target, way, moment, rng.uniform(0.1, 0.8))


class Soak:
    """One server under fault after fault."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: pathlib.Path = options.output
        self.model = self.folder / f"model-{options.shape}-3"
        self.journal = pathlib.Path(f"/dev/shm/concordia-soak-{os.getpid()}")
        self.trigger = self.folder / "raise-now"
        os.environ[RAISE_FILE_ENV] = str(self.trigger.resolve())
        self.questions = make_questions(QUESTIONS, seed=7, max_tokens=options.tokens)
        self.references: list[Answer] = []
        self.served: Served | None = None
        self.sessions: set[int] = set()
        processor = ["--logits-processors", "concordia.testing.raising:RaisingProcessor"]
        self.raising = [] if options.without_raise else processor
        # In float32 tokens agree in every batch; else the same questions are asked together, as a
        # closed cohort.
        self.is_closed = options.dtype != "float32"

    def start(self) -> Served:
        flags = [
            *("--replicas", "1", "--standby", str(self.options.standby)),
            *("--served-model-name", "soak"),
            *("--dtype", self.options.dtype, "--max-model-len", "4096"),
            *("--kv-cache-memory-bytes", str(256 << 20)),
            *("--journal-dir", str(self.journal), "--journal-size", "2GiB"),
            *("--tensor-parallel-size", str(self.options.tensor_parallel_size)),
            "--",
            *self.raising,
            *self.options.engine,
        ]
        served = Served(self.model, flags, log=self.folder / "serve.log")
        served.wait_ready(timeout_s=START_TIMEOUT_S)
        return served

    async def ask(self, questions: list[Question], on_token: Any = None) -> list[Answer]:
        assert self.served is not None
        client = AsyncOpenAI(
            base_url=self.served.url, api_key="soak", max_retries=0, timeout=ROUND_TIMEOUT_S
        )
        cohort = f"soak-{time.monotonic_ns()}" if self.is_closed else None
        answers = await ask_all(client, "soak", questions, cohort=cohort, on_token=on_token)
        await client.close()
        return answers

    def status(self) -> dict[str, Any]:
        assert self.served is not None
        for _ in range(5):
            found = self.served.status()
            if found is not None:
                self.sessions.update(r["session_id"] for r in found["replicas"] if r["session_id"])
                return found
        raise ConcordiaError("the server does not answer; last lines:\n" + self.served.tail())

    def inject(self, plan: Round, status: dict[str, Any]) -> list[str]:
        """Hit the planned target of a server of this status; returns what was hit (empty: it was
        not there).
        """
        states = {r["state"]: r["session_id"] for r in status["replicas"]}
        number = signal.SIGSTOP if plan.way == "SIGSTOP" else signal.SIGKILL
        if plan.target == "owner":
            os.kill(status["owner_pid"], signal.SIGKILL)
            return ["owner"]
        if plan.target == "router":
            assert self.served is not None
            self.served.process.kill()
            return ["router"]
        session = states.get("standby" if plan.target == "standby" else "ready")
        if session is None:
            return []
        if plan.way == "RAISE":
            make_forward_raise(self.trigger, session)
            return ["forward"]
        place = Target.ENGINE_CORE if plan.target == "standby" else Target(plan.target)
        return [hit(session, place, number).target]

    async def play(self, plan: Round) -> dict[str, Any]:
        """One round: ask, hit, wait for every answer, compare with the unfailed ones."""
        rng = random.Random(plan.seed + 1)
        first = AT_ONCE * rng.randrange(QUESTIONS // AT_ONCE)
        together = list(range(first, first + AT_ONCE))
        chosen = together if self.is_closed else rng.sample(range(QUESTIONS), AT_ONCE)
        questions = [self.questions[i] for i in chosen]
        total = sum(q.max_tokens for q in questions)
        seen: Counter[str] = Counter()  # tokens by question

        def on_token(answer: Answer) -> None:
            seen[answer.question.text] = len(answer.tokens)

        before = self.status()
        standbys = sum(r["state"] == "standby" for r in before["replicas"])
        started = time.monotonic()
        hits: list[str] = []
        at_hit: list[int] = []
        if plan.moment == "idle":
            hits += self.inject(plan, before)
        asking = asyncio.create_task(self.ask(questions, on_token))
        wanted = {"prefill": 0.0, "idle": 2.0}.get(plan.moment, plan.share) * total
        while not asking.done() and time.monotonic() - started < ROUND_TIMEOUT_S:
            await asyncio.wait({asking}, timeout=0.02)
            if not hits and seen.total() >= wanted:
                # By the status from before: asking takes a second, and the answers no longer.
                hits += await asyncio.to_thread(self.inject, plan, before)
                at_hit = [seen[question.text] for question in questions]
                if plan.moment == "recovery" and plan.target not in ("owner", "router", "standby"):
                    await asyncio.sleep(rng.uniform(0.0, 1.0))
                    status = await asyncio.to_thread(self.status)
                    hits += await asyncio.to_thread(self.inject, plan, status)
        asking.cancel() if not asking.done() else None
        answers = await asyncio.gather(asking, return_exceptions=True)
        row = {"seed": plan.seed, "target": plan.target, "way": plan.way, "moment": plan.moment}
        row |= {"standbys": standbys, "hits": hits, "tokens_at_hit": at_hit}
        row |= {"seconds": round(time.monotonic() - started, 2)}
        if plan.target == "router":
            row |= await self.after_router(questions, chosen)
        elif isinstance(answers[0], BaseException):
            row |= {"wrong": [f"no end within {ROUND_TIMEOUT_S} s"]}
        else:
            row |= self.compare(answers[0], chosen)
            row |= counted(before, await self.settled(before))
            row["wrong"] += self.unkept(row, plan)
            if len(hits) <= standbys and row["longest_pause_s"] > self.options.pause_max:
                row["wrong"].append(f"a pause of {row['longest_pause_s']} s beside a ready standby")
        return row

    async def after_router(self, questions: list[Question], chosen: list[int]) -> dict[str, Any]:
        """The router died: its streams ended, its engines must go, a retry must be restored."""
        assert self.served is not None
        self.served.close()
        deadline = time.monotonic() + 20
        while any(self.alive()) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        left = self.alive()
        self.served = await asyncio.to_thread(self.start)
        before = self.status()
        row = self.compare(await self.ask(questions), chosen)
        row |= counted(before, await self.settled(before))
        if left:
            row["wrong"].append(f"processes outlived their router: {left}")
        return row

    async def settled(self, before: dict[str, Any]) -> dict[str, Any]:
        """The server's status once its counters have heard of the round: what engines say comes
        through the journal, about once a second.
        """
        found = self.status()
        if len(found["faults"]) > len(before["faults"]):
            deadline = time.monotonic() + SETTLE_S
            while time.monotonic() < deadline and not grown(
                before, found, "restored_tokens"
            ) + grown(before, found, "recomputed_tokens"):
                await asyncio.sleep(0.2)
                found = self.status()
        return found

    def unkept(self, row: dict[str, Any], plan: Round) -> list[str]:
        """What Concordia promises and the round did not show, tokens apart."""
        found = []
        if row["hash_mismatches"]:
            found.append(f"{row['hash_mismatches']} hash mismatches")
        if row["hits"] and plan.target not in ("owner", "router") and not row["noticed"]:
            found.append("the fault was never noticed")
        if (
            plan.moment == "decode"
            and plan.target not in ("owner", "router", "standby")
            and row["hits"]
            and not row["restored_tokens"]
        ):
            found.append("nothing was restored")
        return found

    def alive(self) -> list[int]:
        """Processes of any session that a replica of ours ever had."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) in self.sessions and process.status() != "zombie":
                    found.append(process.pid)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def compare(self, answers: list[Answer], chosen: list[int]) -> dict[str, Any]:
        lost = doubled = changed = 0
        differs = []  # where each answer leaves the unfailed one
        wrong = [a.error for a in answers if a.error]
        for answer, index in zip(answers, chosen, strict=True):
            reference = self.references[index]
            lost += max(0, len(reference.tokens) - len(answer.tokens))
            doubled += max(0, len(answer.tokens) - len(reference.tokens))
            changed += answer.tokens != reference.tokens or answer.text != reference.text
            differs.append(first_difference(answer.tokens, reference.tokens))
        if lost or doubled or changed:
            wrong.append(f"lost {lost}, doubled {doubled}, answers changed {changed}")
        gaps = [b - a for x in answers for a, b in itertools.pairwise(x.stamps)]
        return {
            "lost": lost,
            "doubled": doubled,
            "changed": changed,
            "differs_at": differs,
            "longest_pause_s": round(max(gaps, default=0.0), 2),
            "levels": sorted({str(a.report.get("level")) for a in answers}),
            "wrong": wrong,
        }

    def run(self, state: pathlib.Path) -> list[dict[str, Any]]:
        rows = (
            [json.loads(line) for line in state.read_text().splitlines()] if state.exists() else []
        )
        deadline = time.monotonic() + self.options.seconds
        self.served = self.start()
        self.references = asyncio.run(self.first_answers())
        while len(rows) < self.options.faults and time.monotonic() < deadline:
            plan = Round.from_seed(self.options.seed + len(rows), may_raise=bool(self.raising))
            if plan.moment != "recovery":
                self.served.wait_ready(timeout_s=START_TIMEOUT_S, standbys=1)
            row = asyncio.run(self.play(plan))
            rows.append(row)
            with state.open("a", encoding="utf-8") as sink:
                sink.write(json.dumps(row) + "\n")
            verdict = "; ".join(row["wrong"]) or "ok"
            console.log(
                f"{len(rows)}/{self.options.faults} seed {plan.seed} {plan.way} {plan.target} at "
                f"{plan.moment}: "
                f"{verdict}, longest pause {row.get('longest_pause_s')} s"
            )
        return rows

    async def first_answers(self) -> list[Answer]:
        """Unfailed answers, twice: tokens are only compared where the engine repeats itself."""
        groups = [self.questions[at : at + AT_ONCE] for at in range(0, QUESTIONS, AT_ONCE)]
        # Fills the prefix cache: from here on every prefill has the same shape.
        for group in groups:
            await self.ask([dataclasses.replace(q, max_tokens=2) for q in group])
        alone = [[question] for question in self.questions]
        first = [
            a for asked in (groups if self.is_closed else alone) for a in await self.ask(asked)
        ]
        second = [a for asked in groups for a in await self.ask(asked)]
        for a, b in zip(first, second, strict=True):
            if a.error or b.error or a.tokens != b.tokens:
                raise ConcordiaError(
                    f"unfailed runs do not agree, so tokens cannot be compared: {a.error} {b.error}"
                )
        return first

    def leftovers(self, names_before: set[str]) -> list[str]:
        """Processes and shared-memory names that outlived everything."""
        assert self.served is not None
        code = self.served.close()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (self.alive() or self.journal.exists()):
            time.sleep(0.1)
        names = sorted(set(os.listdir("/dev/shm")) - names_before)
        found = [f"process {pid}" for pid in self.alive()] + [f"/dev/shm/{n}" for n in names]
        return found + ([f"exit code {code}"] if code else [])


def grown(before: dict[str, Any], after: dict[str, Any], name: str) -> int:
    """How far a counter came in between."""
    return int(after["counters"][name] - before["counters"].get(name, 0))


def counted(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Growth of the server's counters over a round, and the faults it noticed."""
    names = (
        "restored_tokens",
        "recomputed_tokens",
        "prefix_restored_tokens",
        "prefixes_missed",
        "stepped_back_tokens",
        "hash_mismatches",
    )
    row: dict[str, Any] = {name: grown(before, after, name) for name in names}
    row["noticed"] = [f["kind"] for f in after["faults"][len(before["faults"]) :]]
    return row


def summarise(
    rows: list[dict[str, Any]], left: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    hits = [h for row in rows for h in row["hits"]]
    pauses = sorted(
        row["longest_pause_s"]
        for row in rows
        if row.get("longest_pause_s") is not None and 0 < len(row["hits"]) <= row["standbys"]
    )
    return {
        "machine": machine(),
        "first_seed": options.seed,
        "tensor_parallel_size": options.tensor_parallel_size,
        "standbys": options.standby,
        "dtype": options.dtype,
        "rounds": len(rows),
        "faults_injected": len(hits),
        "by_target": Counter(row["target"] for row in rows for _ in row["hits"]),
        "by_way": Counter(row["way"] for row in rows),
        "by_moment": Counter(row["moment"] for row in rows),
        "tokens_lost": sum(row.get("lost", 0) for row in rows),
        "tokens_doubled": sum(row.get("doubled", 0) for row in rows),
        "answers_changed": sum(row.get("changed", 0) for row in rows),
        "hash_mismatches": sum(row.get("hash_mismatches", 0) for row in rows),
        "restored_tokens": sum(row.get("restored_tokens", 0) for row in rows),
        "recomputed_tokens": sum(row.get("recomputed_tokens", 0) for row in rows),
        "stepped_back_tokens": sum(row.get("stepped_back_tokens", 0) for row in rows),
        "prefixes_missed": sum(row.get("prefixes_missed", 0) for row in rows),
        "pause_beside_ready_standby_s": {
            "median": pauses[len(pauses) // 2] if pauses else None,
            "max": pauses[-1] if pauses else None,
        },
        "rounds_wrong": [row for row in rows if row["wrong"]],
        "left_behind": left,
    }


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--faults", type=count, default=100)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--tokens", type=count, default=1500)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument(
        "--dtype", default="float32", help="others than float32 are asked as closed cohorts"
    )
    parser.add_argument(
        "--without-raise",
        action="store_true",
        help="kill where a forward was to raise: for engines that take no logits processor",
    )
    parser.add_argument("--standby", type=int, default=1)
    parser.add_argument(
        "--pause-max",
        type=float,
        default=PAUSE_MAX_S,
        help="longest pause where a standby was ready, in seconds",
    )
    parser.add_argument("--tensor-parallel-size", type=count, default=1)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("soak-output"))
    parser.add_argument("--result", type=file_in_folder, default=None)
    parser.add_argument("engine", nargs="*", help="more flags for vLLM, after --")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    names_before = set(os.listdir("/dev/shm"))
    console.log(f"first seed {options.seed}; state in {options.output}")
    soak = Soak(options)
    make_model(soak.model, shape=options.shape)
    rows: list[dict[str, Any]] = []
    try:
        rows = soak.run(
            options.output / f"state-{options.seed}-tp{options.tensor_parallel_size}.jsonl"
        )
    finally:
        left = soak.leftovers(names_before) if soak.served is not None else []
    result = summarise(rows, left, options)
    if options.result is not None:
        options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
    return 1 if result["rounds_wrong"] or left else 0


if __name__ == "__main__":
    run_command(main)
