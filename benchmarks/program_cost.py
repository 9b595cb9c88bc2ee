"""What hooks under the framework cost a program that knows nothing of them.

Runs the same program with and without `concordia run`, in turn, or both at once on two GPUs that
change places each time; each pair gives one ratio:

  start    program_start_ratio: seconds of a program that uses many kernels of PyTorch and Triton
           once, from exec to exit, hooked / plain; the cache is warm, as in a second start;
           program_start_own_s: of these, what the shim took in loads before the driver was called
  decode   program_decode_ratio: tokens/s of two vLLM engines, hooked / plain, that live beside each
           other and decode in turn; program_engine_start_ratio, program_engine_own_s: of their
           start, both at once; both must give the same tokens

Needs a GPU; `decode` needs vLLM for GPUs. Figures add up in the result file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Final

from decode_engine import PROGRAM_S, ROOT, DecodeEngine, command
from figures import Figures, joined, read_figures, save, with_interval

from concordia.errors import ConcordiaError, UsageError
from concordia.integrations.program.coverage import read_run
from concordia.integrations.program.run_folder import find_run
from concordia.testing.command import Parser, count, file_in_folder, run_command
from concordia.testing.model import SHAPES, make_skeleton

HERE: Final = pathlib.Path(__file__).resolve().parent
RESULTS: Final = HERE / "results" / "under_framework_h200.json"


class Program:
    """One run of a program from start to end."""

    def __init__(
        self, words: list[str], *, hooks: str | None, gpu: int, cache: pathlib.Path
    ) -> None:
        line, environment = command(words, hooks=hooks, gpu=gpu, cache=cache)
        self.started = time.perf_counter()
        self._child = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            cwd=ROOT,
        )  # fmt: skip

    def end(self) -> tuple[float, dict[str, Any]]:
        """Seconds from start to exit, and the answer: its last line."""
        try:
            said, complaints = self._child.communicate(timeout=PROGRAM_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            raise ConcordiaError(f"no end after {PROGRAM_S} s: {self._child.args!r}") from None
        seconds = time.perf_counter() - self.started
        if self._child.returncode != 0:
            tail = " | ".join(complaints.strip().splitlines()[-5:])
            raise ConcordiaError(f"ended with {self._child.returncode}: {tail}")
        return seconds, json.loads(said.strip().splitlines()[-1])


def gpus_of(options: argparse.Namespace, turn: int) -> tuple[int, int]:
    """For the hooked program and the plain one."""
    return (turn % 2, 1 - turn % 2) if options.gpus == 2 else (0, 0)


def pair(
    words: list[str], options: argparse.Namespace, turn: int, cache: pathlib.Path
) -> list[tuple[float, dict[str, Any]]]:
    """The hooked run and the plain one."""
    gpus = gpus_of(options, turn)
    arms: list[tuple[str | None, int]] = [(options.hooks, gpus[0]), (None, gpus[1])]
    if options.gpus == 2:
        runs = [Program(words, hooks=hooks, gpu=gpu, cache=cache) for hooks, gpu in arms]
        return [run.end() for run in runs]
    order = [0, 1] if turn % 2 == 0 else [1, 0]
    found = {i: Program(words, hooks=arms[i][0], gpu=arms[i][1], cache=cache).end() for i in order}
    return [found[0], found[1]]


def measure_start(options: argparse.Namespace, cache: pathlib.Path) -> Figures:
    """program_start_ratio, program_start_own_s."""
    words = [
        str(ROOT / "tests" / "gpu" / "real_kernels.py"),
        "torch",
        "training",
        "graphs",
        "triton",
    ]
    Program(words, hooks=options.hooks, gpu=0, cache=cache).end()  # fills the cache
    ratios, own = [], []
    for turn in range(options.pairs):
        (hooked_s, hooked), (plain_s, plain) = pair(words, options, turn, cache)
        if hooked["digests"] != plain["digests"]:
            raise ConcordiaError("hooks changed a result")
        ratios.append(hooked_s / plain_s)
        own.append(own_s())
        print(
            f"start {turn}: {hooked_s:.2f} s hooked, of which {own[-1]:.3f} s in the shim, "
            f"{plain_s:.2f} s plain",
            file=sys.stderr,
        )
    return {
        "program_start_ratio": with_interval(ratios, "ratio"),
        "program_start_own_s": with_interval(own, "s"),
    }


def own_s() -> float:
    """Seconds that the shim took in loads of the latest run."""
    return sum(image.own_us for image in read_run(find_run()).images) / 1e6


def measure_decode(options: argparse.Namespace, cache: pathlib.Path) -> Figures:
    """program_decode_ratio, program_engine_start_ratio."""
    speeds: list[float] = []
    starts: list[float] = []
    own: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        make_skeleton(pathlib.Path(folder), shape=options.shape)
        words = [str(HERE / "decode_program.py"), folder, str(options.tokens)]
        for turn in range(options.engines):
            is_warm = any(cache.iterdir())
            with contextlib.ExitStack() as stack:
                engines = [
                    stack.enter_context(
                        contextlib.closing(DecodeEngine(words, hooks=hooks, gpu=gpu, cache=cache))
                    )
                    for hooks, gpu in zip(
                        (options.hooks, None), gpus_of(options, turn), strict=True
                    )
                ]
                begun = [engine.answer()["start_s"] for engine in engines]
                if is_warm:  # else it filled the cache
                    starts.append(begun[0] / begun[1])
                    own.append(own_s())
                ratios = in_turn(engines, options.windows)
            speeds += ratios
            print(
                f"decode {turn}: {statistics.median(ratios):.4f}, start {begun[0]:.1f} s hooked, "
                f"of which {own[-1] if own else 0:.3f} s in the shim, {begun[1]:.1f} s plain",
                file=sys.stderr,
            )
    found = {"program_decode_ratio": with_interval(speeds, "ratio")}
    if starts:
        found["program_engine_start_ratio"] = with_interval(starts, "ratio")
        found["program_engine_own_s"] = with_interval(own, "s")
    return found


def in_turn(engines: list[DecodeEngine], windows: int) -> list[float]:
    """The speed of the hooked engine, the first, over the plain one's, window by window."""
    ratios = []
    for window in range(windows):
        order = (0, 1) if window % 2 == 0 else (1, 0)
        found = {i: engines[i].window() for i in order}
        if found[0]["digest"] != found[1]["digest"]:
            raise ConcordiaError("hooks changed a token")
        ratios.append(found[0]["tokens_per_s"] / found[1]["tokens_per_s"])
    return ratios


PARTS: Final = {"start": measure_start, "decode": measure_decode}


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--hooks", default="entry", help="what `concordia run --hooks` is given")
    parser.add_argument("--pairs", type=count, default=6, help="start: of programs")
    parser.add_argument(
        "--engines", type=count, default=2, help="decode: pairs of them; the first fills the cache"
    )
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--windows", type=count, default=20, help="decode: of each engine")
    parser.add_argument("--tokens", type=count, default=128)
    parser.add_argument("--cache", type=pathlib.Path, help="where rewritten images lie; else new")
    parser.add_argument("--output", type=file_in_folder, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.cache is not None and not options.cache.is_dir():
        raise UsageError(f"{options.cache} is no folder")
    with tempfile.TemporaryDirectory() as fresh:
        cache = options.cache or pathlib.Path(fresh)
        for part in options.only:
            found = PARTS[part](options, cache)
            save(options.output, joined(found, read_figures(options.output)))
    return 0


if __name__ == "__main__":
    run_command(main)
