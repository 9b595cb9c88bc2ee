"""The demo: four answers outlive two dead engines.

Serves a random-weight model through stock vLLM, asks four questions without a fault (twice, to know
whether this engine repeats itself), then again while the engine is killed and its successor frozen,
then once more with restore switched off as the control. Prints a table and one JSON line, draws
timeline.png, and exits non-zero when a token was lost, doubled or changed or the proof does not
hold.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import pathlib
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Final

from openai import AsyncOpenAI
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from concordia.errors import ConcordiaError
from concordia.testing.fault_plan import Hit, Target, hit
from concordia.testing.load import Answer, Question, ask_all, first_difference, make_questions
from concordia.testing.machine import machine
from concordia.testing.model import make_model
from concordia.testing.served import Served

START_TIMEOUT_S: Final = 240.0
WARM_TOKENS: Final = 8
RUN_TIMEOUT_S: Final = 300.0
KILL_AT: Final = 0.08  # share of the answer after which the first engine dies
STOP_AT: Final = 0.6  # earliest share at which its successor freezes
STOP_AT_LATEST: Final = 0.95  # freeze it here even when no standby is ready yet
# share of the answer that is repeated to know whether unfailed runs agree, and that the control
# runs for
AGAIN: Final = 0.3
ON_THEIR_WAY_S: Final = 1.0  # tokens of a dead engine reach its clients within this

console = Console(stderr=True)


@dataclass(slots=True)
class Run:
    """One pass over all questions: what the clients saw and what was broken meanwhile."""

    name: str
    answers: list[Answer] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    started: float = 0.0
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)

    def counted(self, name: str) -> int:
        """Growth of one of the server's counters during this run."""
        return int(self.after["counters"][name]) - int(self.before["counters"][name])

    @property
    def faults(self) -> list[dict[str, Any]]:
        """Faults that the server noticed during this run, oldest first."""
        return list(self.after["faults"][len(self.before["faults"]) :])


async def perform(
    served: Served,
    client: AsyncOpenAI,
    questions: list[Question],
    run: Run,
    *,
    faults: list[tuple[float, float, signal.Signals]],
    concordia: dict[str, Any] | None = None,
) -> Run:
    """Ask all questions at once as a closed cohort and hit the serving engine at the given shares
    of progress.
    """
    total = sum(q.max_tokens for q in questions)
    pending = list(faults)
    run.before = await asyncio.to_thread(served.status) or {}
    run.started = time.monotonic()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(run.name, total=total)
        seen = 0

        def on_token(answer: Answer) -> None:
            nonlocal seen
            seen += 1
            progress.update(bar, completed=seen)

        asking = asyncio.create_task(
            ask_all(
                client,
                "demo",
                questions,
                cohort=f"{run.name}-{time.monotonic_ns()}",
                on_token=on_token,
                concordia=concordia,
            )
        )
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while not asking.done() and time.monotonic() < deadline:
            await asyncio.wait({asking}, timeout=0.05)
            if pending and seen >= pending[0][0] * total:
                status = await asyncio.to_thread(served.status) or {}
                states = [r["state"] for r in status["replicas"]]
                if "ready" in states and ("standby" in states or seen >= pending[0][1] * total):
                    session = next(
                        r["session_id"] for r in status["replicas"] if r["state"] == "ready"
                    )
                    run.hits.append(hit(session, Target.ENGINE_CORE, pending.pop(0)[2]))
                    alone = "" if "standby" in states else "; the next standby still starts"
                    progress.console.log(
                        f"{run.hits[-1].kind} sent to the engine at token {seen}{alone}"
                    )
        if not asking.done():
            asking.cancel()
            raise ConcordiaError(f"{run.name}: no end within {RUN_TIMEOUT_S:.0f} s")
        run.answers = asking.result()
    run.after = await asyncio.to_thread(served.status) or {}
    return run


async def wait_standby(served: Served) -> None:
    """A run starts only when a standby is there to take over."""
    with console.status("waiting for the next standby"):
        await asyncio.to_thread(served.wait_ready, timeout_s=START_TIMEOUT_S, standbys=1)


async def perform_all(served: Served, questions: list[Question], *, kill_at: float) -> list[Run]:
    client = AsyncOpenAI(base_url=served.url, api_key="demo", max_retries=0, timeout=RUN_TIMEOUT_S)
    # The first pass fills the prefix cache; from then on every pass prefills the same tokens in the
    # same shape.
    warm = [dataclasses.replace(q, max_tokens=WARM_TOKENS) for q in questions]
    await perform(served, client, warm, Run("warm-up"), faults=[])
    parts = [dataclasses.replace(q, max_tokens=int(AGAIN * q.max_tokens)) for q in questions]
    kill = (kill_at, 1.0, signal.SIGKILL)
    stop = (STOP_AT, STOP_AT_LATEST, signal.SIGSTOP)
    runs = []
    for name, asked, faults, concordia in (
        ("unfailed", questions, [], None),
        ("unfailed again", parts, [], None),
        ("with faults", questions, [kill, stop], None),
        ("control: restore off", parts, [kill], {"restore": False}),
    ):
        await wait_standby(served)
        runs.append(
            await perform(served, client, asked, Run(name), faults=faults, concordia=concordia)
        )
    await client.close()
    return runs


def judge(runs: list[Run]) -> tuple[dict[str, Any], list[str]]:
    """The JSON line and the list of what is wrong (empty when the proof holds)."""
    reference, again, failed, control = runs
    wrong = [f"{r.name}: {a.error}" for r in runs for a in r.answers if a.error]
    pairs = list(zip(reference.answers, failed.answers, strict=True))
    lost = sum(max(0, len(a.tokens) - len(b.tokens)) for a, b in pairs)
    doubled = sum(max(0, len(b.tokens) - len(a.tokens)) for a, b in pairs)
    same_tokens = all(a.tokens == b.tokens and a.text == b.text for a, b in pairs)
    repeats = all(begins_like(a, b) for a, b in zip(reference.answers, again.answers, strict=True))
    same_logprobs = all(a.logprobs == b.logprobs for a, b in pairs)
    control_differs = any(
        not begins_like(a, b) for a, b in zip(reference.answers, control.answers, strict=True)
    )
    faults = []
    for injected, noticed in zip(failed.hits, failed.faults, strict=False):
        faults.append(
            {
                "kind": noticed["kind"],
                "detected_ms": round((noticed["detected_ns"] - injected.stamp_ns) / 1e6, 1),
                "next_token_ms": round(pause_after(failed, noticed["detected_ns"] / 1e9) * 1e3, 1),
            }
        )
    tokens = sum(len(a.tokens) for a in failed.answers)
    recomputed = failed.counted("recomputed_tokens")
    unavoidable = len(failed.answers) * len(failed.hits) + failed.counted("uncommitted_tokens")
    result = {
        "tokens_lost": lost,
        "tokens_duplicated": doubled,
        "identical": same_tokens,
        "restored_tokens": failed.counted("restored_tokens"),
        "recomputed_tokens": recomputed,
        "kv_hash_mismatches": failed.counted("hash_mismatches"),
        "faults": faults,
        "journal_bytes_per_token": round(failed.counted("journal_bytes") / max(1, tokens)),
        "unfailed_runs_agree": repeats,
        "logprobs_identical": same_logprobs,
        "control": {
            "restored_tokens": control.counted("restored_tokens"),
            "recomputed_tokens": control.counted("recomputed_tokens"),
            "logprobs_differ": control_differs,
        },
    }
    checks = {
        "a token was lost": lost > 0,
        "a token was doubled": doubled > 0,
        "an answer changed": not same_tokens,
        "a restored byte differs": result["kv_hash_mismatches"] > 0,
        "more was recomputed than had to be": recomputed > unavoidable,
        "nothing was restored": result["restored_tokens"] == 0,
        "not every fault was noticed": len(faults) != 2,
        "the control restored something": result["control"]["restored_tokens"] > 0,
        "the control recomputed nothing": result["control"]["recomputed_tokens"] == 0,
        "the control cannot be told apart": not control_differs,
        "log-probabilities changed though unfailed runs repeat them": repeats and not same_logprobs,
    }
    return result, wrong + [text for text, is_wrong in checks.items() if is_wrong]


def begins_like(whole: Answer, part: Answer) -> bool:
    """Whether the part is how the whole begins: tokens and log-probabilities."""
    count = len(part.tokens)
    return whole.tokens[:count] == part.tokens and whole.logprobs[:count] == part.logprobs


def pause_after(run: Run, detected: float) -> float:
    """Seconds from the fault's detection until every answer had its next token.

    Tokens that were on their way when the engine died still arrive, so an answer's pause is its
    longest silence of those that began until shortly after the fault.
    """
    resumed = []
    for answer in run.answers:
        pairs = zip(answer.stamps, answer.stamps[1:], strict=False)
        silences = [(b - a, b) for a, b in pairs if b > detected and a < detected + ON_THEIR_WAY_S]
        if silences:
            resumed.append(max(silences)[1] - detected)
    return max(resumed, default=float("inf"))


def show(runs: list[Run], result: dict[str, Any]) -> None:
    """The table that a person reads."""
    reference = runs[0]
    table = Table(title="What the clients received")
    for column in ("run", "request", "tokens", "first difference", "longest pause", "level"):
        table.add_column(column)
    for run in runs:
        for index, answer in enumerate(run.answers):
            gaps = [b - a for a, b in zip(answer.stamps, answer.stamps[1:], strict=False)]
            wanted = reference.answers[index].tokens[: answer.question.max_tokens]
            difference = first_difference(wanted, answer.tokens)
            table.add_row(
                run.name if index == 0 else "",
                str(index),
                str(len(answer.tokens)),
                "none" if difference is None else f"token {difference}",
                f"{max(gaps, default=0.0):.2f} s",
                str(answer.report.get("level", "-")),
            )
        table.add_section()
    console.print(table)
    for fault in result["faults"]:
        console.print(
            f"{fault['kind']}: detected after {fault['detected_ms']} ms, every answer goes on "
            f"{fault['next_token_ms']} ms later"
        )


def draw(runs: list[Run], path: pathlib.Path) -> None:
    """Tokens over time, one line per request, faults marked."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    reference, failed = runs[0], runs[2]
    figure, axes = pyplot.subplots(figsize=(10, 5.5))
    for index, answer in enumerate(failed.answers):
        times = [s - failed.started for s in answer.stamps]
        axes.plot(times, range(1, len(times) + 1), label=f"request {index}", linewidth=1.8)
    longest = reference.answers[0]
    axes.plot(
        [s - reference.started for s in longest.stamps],
        range(1, len(longest.stamps) + 1),
        color="0.6",
        linestyle="--",
        label="request 0, no fault",
    )
    for injected in failed.hits:
        at = injected.stamp_ns / 1e9 - failed.started
        axes.axvline(at, color="crimson", linestyle=":")
        axes.annotate(
            f"{injected.kind}\nto the engine",
            (at, 0),
            xytext=(4, 8),
            textcoords="offset points",
            color="crimson",
            fontsize=9,
        )
    axes.set_xlabel("seconds since the questions were asked")
    axes.set_ylabel("tokens received by the client")
    axes.set_title("Four answers outlive two dead engines")
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="140m", help="size of the model: tiny, 140m, 1b")
    parser.add_argument("--model-seed", type=int, default=3, help="seed of the weights")
    parser.add_argument("--seed", type=int, default=1, help="seed of the questions")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2000, help="length of each answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-mib", type=int, default=512, help="KV cache of each engine in MiB")
    parser.add_argument(
        "--kill-at", type=float, default=KILL_AT, help="share of progress at SIGKILL"
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("demo-output"))
    parser.add_argument(
        "--result", type=pathlib.Path, help="also write the result and the machine here"
    )
    parser.add_argument("serve", nargs="*", help="more flags for `concordia serve`, after --")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    output: pathlib.Path = options.output
    model = output / f"model-{options.shape}-{options.model_seed}"
    output.mkdir(parents=True, exist_ok=True)
    with console.status(f"making a random-weight {options.shape} Llama in {model}"):
        parameters = make_model(model, shape=options.shape, seed=options.model_seed)
    console.log(f"model with {parameters / 1e6:.0f} M parameters")
    questions = make_questions(
        options.requests,
        seed=options.seed,
        max_tokens=options.tokens,
        temperature=options.temperature,
    )
    flags = [
        *("--replicas", "1", "--standby", "1", "--served-model-name", "demo"),
        *("--dtype", options.dtype, "--max-model-len", "4096"),
        *("--kv-cache-memory-bytes", str(options.kv_mib << 20)),
        *("--journal-dir", str(journal_folder())),
        *options.serve,
    ]
    with Served(model, flags, log=output / "serve.log") as served:
        with console.status("starting two engines of stock vLLM (their imports take most of it)"):
            served.wait_ready(timeout_s=START_TIMEOUT_S, standbys=1)
        console.log("serving")
        runs = asyncio.run(perform_all(served, questions, kill_at=options.kill_at))
        code = served.close()
    result, wrong = judge(runs)
    if code != 0:
        wrong.append(f"the server ended with {code}")
    show(runs, result)
    draw(runs, output / "timeline.png")
    console.print(f"picture: {output / 'timeline.png'}")
    for text in wrong:
        console.print(f"[red]wrong: {text}")
    if options.result is not None:
        setting = {"shape": options.shape, "requests": options.requests, "tokens": options.tokens}
        setting |= {
            "temperature": options.temperature,
            "dtype": options.dtype,
            "seed": options.seed,
        }
        whole = {"machine": machine(), "setting": setting, "wrong": wrong, **result}
        options.result.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
    return 1 if wrong else 0


def journal_folder() -> pathlib.Path:
    """A journal of its own, so that a demo never touches another server's."""
    return pathlib.Path("/dev/shm") / f"concordia-demo-{time.time_ns()}"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConcordiaError as error:
        console.print(f"demo: {error}")
        sys.exit(error.exit_code)
