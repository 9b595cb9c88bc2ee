"""What lies between a killed engine and its successor's first load, part by part, on a CPU.

seal     of a stream that was lent 20 segments of 64 MiB ahead, as after a prefill
cut      what the owner does to tell 128 pieces to one request, its search for them apart
counts   what is committed of 32 requests, asked through the owner's socket
verify   how much faster 1 GiB of records of 2 MiB is hashed by look-up threads, beside a thread
         that holds the interpreter's lock for 2 ms of every 4, as an engine does that waits: the
         ratio to what was before, by pairs, and its interval

Writes benchmarks/results/recovery_paths_cpu.json; the peers are the same done as it was before:
all that was lent searched, fields of a piece looked up one by one, a question each, a call for each
record. Needs 2.5 GiB in /dev/shm and no GPU. Takes some 30 s.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final

from figures import Figures, figure, with_interval

from concordia import abi, config
from concordia.device.memory import SharedFile
from concordia.device.payload_hash import PayloadHash, Promised
from concordia.journal.client import JournalClient
from concordia.journal.coverage import Cut, Piece
from concordia.journal.owner import spawn_owner
from concordia.journal.writer import Entry
from concordia.recovery.restore import RestorePlan, verify
from concordia.testing.command import Parser, result_file, run_command
from concordia.testing.journal import SmallJournal
from concordia.testing.machine import add_figures

RESULTS: Final = pathlib.Path(__file__).parent / "results" / "recovery_paths_cpu.json"
ROUNDS, VERIFY_ROUNDS = 9, 41
LENT: Final = 20
SEGMENT: Final = 64 << 20
REQUESTS: Final = 32
PIECES: Final = 128  # blocks of a request of 2K tokens
RECORD: Final = 2 << 20
VERIFIED: Final = 1 << 30
BUSY_S, IDLE_S = 0.002, 0.002


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turn(
    now: Callable[[], Any], before: Callable[[], Any], scale: float, rounds: int = ROUNDS
) -> tuple[list[float], list[float]]:
    """Both, in turn, after one round that is not counted."""
    now(), before()
    pairs = []
    for number in range(rounds):
        if number % 2:
            pairs.append((timed(now), timed(before)))
        else:
            second = timed(before)
            pairs.append((timed(now), second))
    return [scale * a for a, _ in pairs], [scale * b for _, b in pairs]


def with_peer(values: tuple[list[float], list[float]], unit: str, peer: str) -> dict[str, Any]:
    now, before = values
    return {**figure(now, unit), "peer": {peer: figure(before, unit)["median"]}}


def measure_seal(folder: pathlib.Path) -> dict[str, Any]:
    """seal: what the end of the stream means, which is all of a seal that takes time."""
    with SmallJournal(folder / "seal", segments=2 * LENT, segment_bytes=SEGMENT) as journal:
        stream, writer = journal.open()
        for index in range(REQUESTS):
            writer.append(Entry(abi.KIND_KV_TAIL, 1, 1, index, index + 1), bytes(100))
        stream.ahead = LENT
        journal.streams.lend_all()
        journal.streams.scan_all()
        count, classify = stream.control.committed_count, stream.reader.classify
        found = in_turn(
            lambda: classify(count, is_final=True, taken_count=stream.control.taken_count),
            lambda: classify(count, is_final=True),
            1e3,
        )
    return with_peer(found, "ms", "all that was lent")


def measure_cut() -> dict[str, Any]:
    """cut: an answer's way into bytes."""
    rng = random.Random(3)
    pieces = [
        Piece(
            0, abi.KIND_KV_BLOCK, 16 * i, 16 * i + 16, rng.getrandbits(36), RECORD,
            rng.getrandbits(128), i, 7, rng.getrandbits(64), 3, rng.getrandbits(64),
        )
        for i in range(PIECES)
    ]  # fmt: skip
    cut = Cut(16 * PIECES, 1000, {0: pieces}, [rng.getrandbits(128) for _ in pieces])
    found = in_turn(lambda: json.dumps(cut.to_json()), lambda: json.dumps(asdict(cut)), 1e3)
    return with_peer(found, "ms", "fields looked up one by one")


def measure_counts(folder: pathlib.Path) -> dict[str, Any]:
    """counts: through the socket of an owner that has nothing else to do."""
    journal = folder / "counts"
    spawn_owner(journal, size_bytes=64 << 20, linger_s=60.0)
    with JournalClient.connect(journal) as client:
        keys = list(range(1, REQUESTS + 1))

        def one_by_one() -> None:
            with ThreadPoolExecutor(REQUESTS) as threads:  # as a router asked
                list(threads.map(client.committed, keys))

        found = in_turn(lambda: client.committed_all(keys), one_by_one, 1e3)
        client.shutdown()
    return with_peer(found, "ms", "a question each")


@contextmanager
def busy_engine() -> Iterator[None]:
    """A thread of this process that goes round as an engine with nothing to run does."""
    is_over = threading.Event()

    def go_round() -> None:
        while not is_over.wait(IDLE_S):
            until = time.perf_counter() + BUSY_S
            while time.perf_counter() < until:
                pass

    thread = threading.Thread(target=go_round)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def measure_verify(folder: pathlib.Path) -> dict[str, Any]:
    """verify: seconds before over seconds now."""
    file = SharedFile.create(folder / "pool", VERIFIED)
    noise = os.urandom(RECORD)
    for at in range(0, VERIFIED, RECORD):
        file.view[at : at + RECORD] = noise
    digest = PayloadHash().of(file.address, RECORD)
    pieces = [
        Piece(0, abi.KIND_KV_BLOCK, i, i + 1, at, RECORD, digest, i, 7)
        for i, at in enumerate(range(0, VERIFIED, RECORD))
    ]
    plans = [
        RestorePlan(PIECES, 1, {0: tuple(pieces[at : at + PIECES])}, (), {})
        for at in range(0, len(pieces), PIECES)
    ]
    until = time.monotonic() + 600

    def now(plan: RestorePlan) -> None:
        verify(plan, file.view, deadline=until)

    def before(plan: RestorePlan) -> None:
        hasher = PayloadHash()
        for piece in plan.pieces[0]:
            if time.monotonic() >= until:
                raise TimeoutError
            found = hasher.of(file.address + piece.pool_offset, piece.payload_bytes)
            assert found == piece.payload_hash

    assert PayloadHash().first_other([Promised(file.address, RECORD, digest)]) is None
    with ThreadPoolExecutor(config.LOOKUP_THREADS) as threads, busy_engine():
        seconds = in_turn(
            lambda: list(threads.map(now, plans)),
            lambda: list(threads.map(before, plans)),
            1.0,
            VERIFY_ROUNDS,
        )
    file.close()
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    best = [round(VERIFIED / min(found) / 1e9, 2) for found in seconds]
    return {**with_interval(ratios, "ratio"), "best_gb_per_s": best}


def measure() -> Figures:
    """All figures."""
    folder = pathlib.Path("/dev/shm") / f"concordia-recovery-paths-{os.getpid()}"
    folder.mkdir()
    try:
        return {
            "seal": measure_seal(folder),
            "cut": measure_cut(),
            "counts": measure_counts(folder),
            "verify": measure_verify(folder),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    parser = Parser(__doc__)
    parser.add_argument("--output", type=result_file("figures"), default=RESULTS)
    options = parser.parse_args(arguments)
    found = measure()
    for name, value in found.items():
        print(f"{name:10} {json.dumps(value)}")
    sys.stdout.flush()
    add_figures(options.output, found)
    return 0


if __name__ == "__main__":
    run_command(main)
