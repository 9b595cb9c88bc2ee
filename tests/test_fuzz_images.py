"""benchmarks/fuzz_images.py, fuzzing.py, mutation.py: the fuzzer finds what it is for, and finds nothing in a short run.

Invariants: a planted wrong exception, segmentation fault, endless loop (also one that hears no alarm) and hunger for memory are found with the input, and the input is
made small; an input that goes new ways is kept; the committed corpus is survived, and so are some seconds of mutation.
"""

from __future__ import annotations

import ctypes
import json
import pathlib
import random
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import fuzzing  # noqa: E402
from fuzzing import Crash, Pool, Target, fuzz_slice, minimise, run_alone  # noqa: E402
from mutation import INPUT_BYTES_MAX, mutate  # noqa: E402

SECONDS = 10.0
SEED = 7


def target(run: Callable[[bytes], None]) -> Target:
    return Target("planted", run, pathlib.Path(__file__).parent)


def _raises(data: bytes) -> None:
    if b"!" in data:
        raise IndexError


def _crashes(data: bytes) -> None:
    if b"!" in data:
        ctypes.string_at(0)


def _loops(data: bytes) -> None:
    while b"!" in data:
        pass


def _hears_no_alarm(data: bytes) -> None:
    if b"!" in data:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        _loops(data)


def _eats(data: bytes) -> None:
    if b"!" in data:
        bytearray(fuzzing.MEMORY_BYTES)


@pytest.mark.parametrize(
    ("run", "error"),
    [(_raises, "IndexError in test_fuzz_images.py"), (_crashes, "signal SIGSEGV"), (_loops, "_Overdue"), (_eats, "MemoryError"), (_hears_no_alarm, "signal SIGKILL")],
)
def test_planted_fault_is_found_and_made_small_when_an_input_reaches_it(run: Callable[[bytes], None], error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "INPUT_S", 0.3)
    pool = Pool([b"nothing wrong here " * 20, b"0123456789"])
    found = fuzz_slice(target(run), pool, seed=SEED, seconds=60)
    assert found.crash is not None, f"{found.inputs} inputs"
    assert b"!" in found.crash.data
    assert error in found.crash.error
    small = minimise(target(run), Crash("planted", found.crash.error, b"much " * 3 + found.crash.data[-40:] + b"!" + b" more"), 20)
    assert b"!" in small.data
    assert len(small.data) < 30
    assert run_alone(target(run), b"nothing") is None


def test_input_is_kept_when_it_goes_a_new_way() -> None:
    def run(data: bytes) -> None:
        if data.startswith(b"A"):
            len(data)
            if data[1:].startswith(b"B"):
                len(data)
                if data[2:].startswith(b"C"):
                    raise KeyError

    pool = Pool([b"xyz"])
    found = None
    for round_ in range(20):
        done = fuzz_slice(target(run), pool, seed=SEED + round_, seconds=2)
        pool.inputs += done.kept
        pool.edges |= done.edges
        if done.crash:
            found = done.crash
            break
    assert found is not None
    assert found.data.startswith(b"ABC")
    assert any(data.startswith(b"AB") for data in pool.inputs), "a step on the way was kept"


def test_inputs_are_the_same_when_the_seed_is() -> None:
    pool = [b".version 8.0\n.target sm_90\n", bytes(range(256)), b"", b"x"]
    several = [[mutate(random.Random(seed), pool) for seed in range(300)] for _ in range(2)]
    assert several[0] == several[1]
    assert len(set(several[0])) > 100
    assert all(len(data) <= INPUT_BYTES_MAX for data in several[0])


def test_corpus_and_some_seconds_of_mutation_are_survived_when_the_parsers_are_fuzzed(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz_images.py"), "--seconds", str(SECONDS), "--crashes", str(tmp_path / "crashes"), "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())["runs"]
    assert found["crashes"] == []
    assert set(found["inputs"]) == {"fatbin", "cubin", "ptx", "cache", "request", "library", "rewrite"}
    assert all(count > 20 for count in found["inputs"].values()), found["inputs"]
    assert all(count > 10 for count in found["edges"].values()), found["edges"]
    assert f"seed {found['seed']}" in done.stdout


def test_corpus_stays_small_when_it_is_committed() -> None:
    corpus = ROOT / "tests" / "corpus" / "fuzz"
    assert sum(path.stat().st_size for path in corpus.rglob("*") if path.is_file()) < 200_000
