"""What verifying a restore costs a process that never touched the pool, and one that mapped it.

Hashes 1 GiB of records of 2 MiB in /dev/shm, as an engine does before it restores them, through a
new mapping each time: as it is, and after journal/mapped_ahead.py has mapped it, whose time is
told, too. One thread, no GPU. Writes benchmarks/results/first_touch_cpu.json. Takes some 15 s.
"""

from __future__ import annotations

import json
import mmap
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from figures import figure

from concordia.device.memory import Mapping
from concordia.device.payload_hash import PayloadHash
from concordia.journal.mapped_ahead import MappedAhead
from concordia.testing.command import Parser, result_file, run_command
from concordia.testing.machine import add_figures

RESULTS: Final = pathlib.Path(__file__).parent / "results" / "first_touch_cpu.json"
SIZE: Final = 1 << 30
RECORD: Final = 2 << 20
ROUNDS: Final = 7
AHEAD_S_MAX: Final = 60.0


@contextmanager
def mapped(path: pathlib.Path) -> Iterator[Mapping]:
    """A new read-only mapping, as a restoring process has."""
    with path.open("rb") as file:
        found = Mapping(mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ), SIZE)
    try:
        yield found
    finally:
        found.close()


def verify(mapping: Mapping) -> float:
    """GB/s."""
    hashing = PayloadHash()
    started = time.perf_counter()
    for offset in range(0, SIZE, RECORD):
        hashing.of(mapping.address + offset, RECORD)
    return SIZE / (time.perf_counter() - started) / 1e9


def map_ahead(mapping: Mapping) -> float:
    """Seconds of the thread that does it."""
    started = time.perf_counter()
    ahead = MappedAhead(mapping)
    while not ahead.is_done and time.perf_counter() - started < AHEAD_S_MAX:
        time.sleep(0.001)
    seconds = time.perf_counter() - started
    ahead.close()
    return seconds


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    parser = Parser(__doc__)
    parser.add_argument("--output", type=result_file("figures"), default=RESULTS)
    options = parser.parse_args(arguments)
    path = pathlib.Path("/dev/shm") / f"concordia-first-touch-{os.getpid()}"
    fresh, ahead, seconds = [], [], []
    try:
        with path.open("wb") as file:
            for _ in range(SIZE // RECORD):
                file.write(os.urandom(RECORD))
        for _ in range(ROUNDS):
            with mapped(path) as mapping:
                fresh.append(verify(mapping))
            with mapped(path) as mapping:
                seconds.append(map_ahead(mapping))
                ahead.append(verify(mapping))
    finally:
        path.unlink(missing_ok=True)
    first = figure(fresh, "GB/s")
    found = {
        "verify_mapped_ahead": {**figure(ahead, "GB/s"), "peer": {"first touch": first["median"]}},
        "map_ahead_gib": {**figure(seconds, "s"), "peer": {}},
    }
    for name, value in found.items():
        print(f"{name:24} {json.dumps(value)}")
    add_figures(options.output, found)
    return 0


if __name__ == "__main__":
    run_command(main)
