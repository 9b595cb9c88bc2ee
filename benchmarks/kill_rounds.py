"""SIGKILL of a writer at random moments of its appends: what was acknowledged is there, nothing is
there by half.

Each round forks a writer that appends without pause (kill_writer.py), kills it some milliseconds
later, seals its stream and reads it as a second process: every acknowledged record, byte for byte,
sequences without a hole, and behind them nothing, or a torn tail that is known for one. Every other
round seals while the writer is still dying. Rounds run beside each other and are derived from the
printed seed; they add up over several calls in one result file. Exit 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import select
import signal
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Final

from kill_writer import APPENDING, FAILED, STARTING, WORKLOADS, Ledger, Note, Workload, write

from concordia.errors import ConcordiaError
from concordia.journal.folder import Folder
from concordia.journal.record import Record
from concordia.journal.segment import attach
from concordia.journal.stream import End, StreamReader, has_sound_payload
from concordia.journal.stream_state import Stream
from concordia.journal.survey import survey
from concordia.testing.command import Parser, count, result_file, run_command
from concordia.testing.journal import SmallJournal
from concordia.testing.machine import machine

RESULTS: Final = pathlib.Path(__file__).parent / "results"
SEGMENTS: Final = 64
SEGMENT_BYTES: Final = 1 << 20
START_S: Final = 90.0  # a first round compiles its handlers
END_S: Final = 30.0  # from SIGKILL to the end of the process: a driver gives a GPU's memory back
WINDOW_S: Final = 0.02  # after its first acknowledged record a writer lives for at most so long
PROGRESS_S: Final = 5.0
WRONG_MAX: Final = 10  # rounds; then something is broken, and more of them tell nothing new


@dataclass(frozen=True, slots=True)
class Round:
    """One round, derived from its seed alone."""

    seed: str
    kind: str
    device: str
    lanes: int
    depth: int  # records under way at any time
    delay_s: float
    seals_first: bool  # before the writer is known to be gone

    @staticmethod
    def of(seed: int, index: int, kinds: list[str], device: str) -> Round:
        chosen = random.Random(f"{seed} {index}")
        return Round(
            seed=f"{seed}/{index}",
            kind=kinds[index % len(kinds)],
            device=device,
            lanes=chosen.choice((1, 1, 2, 4)),
            depth=chosen.choice((1, 4, 16, 64)),
            delay_s=chosen.uniform(0, WINDOW_S),
            seals_first=chosen.random() < 0.5,
        )


@dataclass(slots=True)
class Outcome:
    """What one round found."""

    seed: str
    acknowledged: int = 0
    records: int = 0
    payload_bytes: int = 0
    was_appending: bool = False  # something was under way when SIGKILL was sent
    is_torn: bool = False  # a header was there, and no commit word
    is_unfinished: bool = False  # bytes were stored behind the last record, that or less
    sealed_first: bool = False
    wrong: list[str] = field(default_factory=list)


def run_round(plan: Round) -> Outcome:
    """One writer's life and what it left."""
    outcome = Outcome(plan.seed, sealed_first=plan.seals_first)
    path = pathlib.Path("/dev/shm") / f"concordia-kill-{os.getpid()}"
    workload = WORKLOADS[plan.kind](random.Random(plan.seed).getrandbits(63))
    ledger = Ledger()
    with SmallJournal(path, segments=SEGMENTS, segment_bytes=SEGMENT_BYTES) as journal:
        stream, _ = journal.open()
        stream.ahead = SEGMENTS
        journal.streams.lend(stream)
        child = os.fork()
        if child == 0:
            write(
                path, stream.control.slot, workload=workload, device=plan.device, lanes=plan.lanes,
                depth=plan.depth, ledger=ledger,
            )  # fmt: skip
        try:
            has_begun = _wait_for_appends(child, ledger)
            time.sleep(plan.delay_s if has_begun else 0)
            known = ledger.acknowledged
        finally:
            os.kill(child, signal.SIGKILL)
        if not has_begun:
            _reap(child)
            outcome.wrong.append(f"the writer did not begin: {ledger.reason or ledger.phase}")
            return outcome
        if plan.seals_first:
            journal.streams.seal(stream)
        if not _reap(child):
            outcome.wrong.append(f"the writer was there {END_S} s after SIGKILL")
            return outcome
        outcome.was_appending = ledger.phase == APPENDING and ledger.submitted > known
        if not plan.seals_first:
            known = ledger.acknowledged
            journal.streams.seal(stream)
        judge(outcome, path, stream, workload=workload, ledger=ledger, known=known)
    ledger.close()
    return outcome


def attempt(plan: Round) -> Outcome:
    """The same; what could not be run at all counts as wrong."""
    try:
        return run_round(plan)
    except (ConcordiaError, OSError) as error:
        return Outcome(plan.seed, wrong=[f"the round was not run: {error}"])


def _wait_for_appends(child: int, ledger: Ledger) -> bool:
    """Until the first record is acknowledged; False when the writer ends, fails or takes too
    long.
    """
    until = time.monotonic() + START_S
    while ledger.phase == STARTING and time.monotonic() < until:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.0005)
    return ledger.phase not in (STARTING, FAILED)


def _reap(child: int) -> bool:
    """Whether the process is gone within END_S: then no thread of it stores any more."""
    descriptor = os.pidfd_open(child)
    try:
        is_gone = bool(select.select([descriptor], [], [], END_S)[0])
    finally:
        os.close(descriptor)
    if is_gone:
        os.waitpid(child, 0)
    return is_gone


def judge(
    outcome: Outcome, path: pathlib.Path, stream: Stream, *, workload: Workload, ledger: Ledger,
    known: int,
) -> None:  # fmt: skip
    """Read the journal as somebody who has nothing but its files. `known` records were acknowledged
    before the seal.
    """
    wrong = outcome.wrong
    pool, board = attach(Folder(path))
    seen = survey(pool, board)
    found = next(s for s in seen.streams if s.identity.stream == stream.identity.stream)
    wrong += seen.damage + found.damage
    # what lies there whatever the seal says: all of it was committed, so all of it is whole
    reader = StreamReader(pool, stream.identity.stream)
    for lent in found.control.lent():
        reader.lend(lent)
    there = reader.read(1 << 30)
    end = reader.classify(found.control.committed_count, is_final=True)
    if end not in (End.CLEAN, End.TORN):
        wrong.append(f"the stream ends {end.value} after record {len(there)}")
    if found.records != there[: found.sealed_count]:
        wrong.append(f"{len(found.records)} records read, sealed at {found.sealed_count}")
    if known > found.sealed_count:
        wrong.append(f"{known} records were acknowledged, the seal is {found.sealed_count}")
    if len(there) > ledger.submitted:
        wrong.append(f"{len(there)} records of {ledger.submitted} tasks")
    wrong += _judge_records(pool.view, there, workload, ledger.notes(ledger.acknowledged))
    outcome.acknowledged, outcome.records = ledger.acknowledged, len(there)
    outcome.payload_bytes = sum(record.payload_bytes for record in there)
    outcome.is_torn = end is End.TORN
    if there:
        last = there[-1].end_offset
        rest = pool.view[last : -(-last // SEGMENT_BYTES) * SEGMENT_BYTES]
        outcome.is_unfinished = any(bytes(rest))  # the pool was all zeroes
    pool.close()
    board.close()


def _judge_records(
    view: memoryview, there: list[Record], workload: Workload, notes: list[Note]
) -> list[str]:
    """What is wrong with the records, against what their numbers say and what was acknowledged."""
    wrong = []
    number = -1
    for sequence, record in enumerate(there):
        payload = bytes(view[record.payload_offset : record.payload_offset + record.payload_bytes])
        if record.sequence != sequence or record.step <= number:
            wrong.append(f"record {sequence} says {record.sequence}, task {record.step}")
        if (record.kind, record.token_start, record.token_end) != workload.names(record.step):
            wrong.append(f"record {sequence} is named {record}")
        if payload != workload.payload(record.step) or not has_sound_payload(view, record):
            wrong.append(f"record {sequence} has other bytes than task {record.step} wrote")
        number = record.step
    for note in notes:
        if note.sequence >= len(there):
            wrong.append(f"record {note.sequence} was acknowledged and is not there")
            break
        record = there[note.sequence]
        if (record.step, record.payload_hash) != (note.number, note.payload_hash):
            wrong.append(f"record {note.sequence} is not what was acknowledged: {note}")
    return wrong


def run_all(options: argparse.Namespace, kinds: list[str]) -> list[Outcome]:
    """Rounds beside each other until there are enough, or the time is over; the first of each kind
    alone, for they compile.
    """
    plans = (Round.of(options.seed, i, kinds, options.device) for i in range(options.rounds))
    until = time.monotonic() + options.seconds
    if options.device != "host":
        # once for all children; importing touches no GPU
        for name in ("concordia.device.cuda", "cuda.bindings.driver", "cuda.bindings.nvrtc"):
            importlib.import_module(name)
    outcomes = [attempt(plan) for plan in itertools.islice(plans, len(kinds))]
    context = multiprocessing.get_context("fork")
    told = time.monotonic()
    with ProcessPoolExecutor(options.children, mp_context=context) as pool:
        running: set[Future[Outcome]] = set()
        try:
            for plan in plans:
                if time.monotonic() > until or summary(outcomes)["violations"] >= WRONG_MAX:
                    break
                running.add(pool.submit(attempt, plan))
                if len(running) == options.children:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    outcomes += [future.result() for future in done]
                if time.monotonic() - told > PROGRESS_S:
                    told = time.monotonic()
                    print(_line(summary(outcomes)), flush=True)
            outcomes += [future.result() for future in running]
        except BrokenProcessPool as error:  # what was found so far is kept
            outcomes.append(Outcome(f"{options.seed}/?", wrong=[f"a judge died: {error}"]))
    return outcomes


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts over rounds."""
    return {
        "rounds": len(outcomes),
        "killed_during_append": sum(o.was_appending for o in outcomes),
        "sealed_while_dying": sum(o.sealed_first for o in outcomes),
        "unfinished_records": sum(o.is_unfinished for o in outcomes),
        "torn_tails": sum(o.is_torn for o in outcomes),
        "acknowledged": sum(o.acknowledged for o in outcomes),
        "records": sum(o.records for o in outcomes),
        "payload_bytes": sum(o.payload_bytes for o in outcomes),
        "violations": sum(bool(o.wrong) for o in outcomes),
    }


def _line(counts: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value}" for name, value in counts.items())


def add_run(path: pathlib.Path, run: dict[str, Any]) -> dict[str, Any]:
    """Put one run behind those before it; the totals over all of them."""
    old = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    runs = [*old, run]
    names = summary([])
    total = {name: sum(each[name] for each in runs) for name in names}
    found = machine()
    result = {"machine": found, "commit": found["commit"], "total": total, "runs": runs}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return total


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=count, default=100)
    parser.add_argument("--seconds", type=float, default=540.0, help="no round begins after it")
    parser.add_argument("--device", default=None, help="host or cuda:N; the first GPU if any")
    parser.add_argument("--kind", choices=(*WORKLOADS, "all"), default="all")
    parser.add_argument("--children", type=count, default=None, help="rounds beside each other")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--output", type=result_file("runs"), default=None)
    options = parser.parse_args(arguments)
    gpus = machine()["gpus"]
    options.device = options.device or ("cuda:0" if gpus else "host")
    if options.device not in ("host", *(f"cuda:{i}" for i in range(len(gpus)))):
        parser.error(f"--device {options.device}: use host, or cuda:0 where there is a GPU")
    options.children = options.children or min(8, max(2, (os.cpu_count() or 2) // 2))
    name = "kill_rounds_cpu.json" if options.device == "host" else "kill_rounds_h200.json"
    kinds = list(WORKLOADS) if options.kind == "all" else [options.kind]
    print(f"seed {options.seed}, {options.rounds} rounds on {options.device}", flush=True)
    started = time.monotonic()
    outcomes = run_all(options, kinds)
    counts = summary(outcomes)
    wrong = [{"seed": o.seed, "wrong": o.wrong[:5]} for o in outcomes if o.wrong]
    run = {
        **counts,
        "device": options.device,
        "kinds": kinds,
        "seed": options.seed,
        "children": options.children,
        "seconds": round(time.monotonic() - started, 1),
        "commit": machine()["commit"],
        "wrong": wrong,
    }
    total = add_run(options.output or RESULTS / name, run)
    for entry in wrong:
        print(f"WRONG  round {entry['seed']}: {'; '.join(entry['wrong'])}")
    print(f"this run   {_line(counts)}  seconds {run['seconds']}")
    print(f"all runs   {_line(total)}")
    return 1 if counts["violations"] else 0


if __name__ == "__main__":
    run_command(main)
