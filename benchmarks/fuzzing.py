"""Find inputs that a parser does not survive.

Owns: the loop of one target: mutate, run, keep what went new ways; the child that it runs in;
making a found input small. Promises: whatever an input does (a wrong exception, a crash, an endless
loop, all memory) is found, with the input; every input is bounded in time and memory. Called by
fuzz_images.py. It knows no format.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import pickle
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from mutation import INPUT_BYTES_MAX, mutate

INPUT_S: Final = 20.0  # of one input; the slowest take a fraction of a second
MEMORY_BYTES: Final = 4 << 30  # address space of the child
POOL_MAX: Final = 4000  # inputs kept for one target
TRACED: Final = 0.2  # of the inputs: tracing costs several times the run
MINIMISE_S: Final = 60.0
_LENGTH_BYTES: Final = 8
Edge = tuple[str, int, int]  # file, a line, and the one that ran after it
_LOOK_S: Final = 0.5  # how often a silent child is looked at


@dataclass(frozen=True, slots=True)
class Target:
    """A parser. `run` raises nothing for any input; `mend` makes a mutated input pass the first
    checks, as often as not.
    """

    name: str
    run: Callable[[bytes], None]
    traced: Path  # files below are those whose lines count
    mend: Callable[[bytes], bytes] | None = None


@dataclass(frozen=True, slots=True)
class Crash:
    """An input that a target did not survive."""

    target: str
    error: str
    data: bytes = field(repr=False)


@dataclass(slots=True)
class Pool:
    """The inputs of one target, and what of the code they reached."""

    inputs: list[bytes]
    edges: set[Edge] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Slice:
    """What came of some seconds with one target."""

    inputs: int
    kept: list[bytes]
    edges: set[Edge]
    crash: Crash | None


def fuzz_slice(target: Target, pool: Pool, *, seed: int, seconds: float) -> Slice:
    """Run mutated inputs in a child for so long, or until one is not survived."""
    with mmap.mmap(-1, _LENGTH_BYTES + INPUT_BYTES_MAX) as current:
        found, error = _in_child(
            lambda: _run_many(target, pool, current, seed=seed, seconds=seconds),
            current,
        )
        if found is not None:
            return found
        inputs, length = divmod(int.from_bytes(current[:_LENGTH_BYTES], "little"), 1 << 32)
        data = current[_LENGTH_BYTES : _LENGTH_BYTES + length]
    return Slice(inputs, [], set(), Crash(target.name, error, data))


def run_alone(target: Target, data: bytes) -> str | None:
    """What happens to this input: None when it is survived."""
    with mmap.mmap(-1, _LENGTH_BYTES) as current:
        found, error = _in_child(lambda: _error_of(target, data) or "", current)
    return error if found is None else found or None


def minimise(target: Target, crash: Crash, seconds: float = MINIMISE_S) -> Crash:
    """A smaller input with the same error, as far as some seconds go."""
    deadline, data = time.monotonic() + seconds, crash.data
    size = max(len(data) // 2, 1)
    while size and time.monotonic() < deadline:
        at = 0
        while at < len(data) and time.monotonic() < deadline:
            shorter = data[:at] + data[at + size :]
            if run_alone(target, shorter) == crash.error:
                data = shorter
            else:
                at += size
        size //= 2
    return Crash(crash.target, crash.error, data)


def _run_many(
    target: Target, pool: Pool, current: mmap.mmap, *, seed: int, seconds: float
) -> Slice:
    rng = random.Random(seed)
    inputs, kept, edges = list(pool.inputs), [], set(pool.edges)
    count, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        data = mutate(rng, inputs)
        if target.mend is not None and rng.random() < 0.5:
            data = target.mend(data)[:INPUT_BYTES_MAX]
        current[_LENGTH_BYTES : _LENGTH_BYTES + len(data)] = data
        current[:_LENGTH_BYTES] = ((count << 32) | len(data)).to_bytes(_LENGTH_BYTES, "little")
        is_traced = rng.random() < TRACED
        reached: set[Edge] = set()
        error = _error_of(target, data, reached if is_traced else None)
        count += 1
        if error is not None:
            return Slice(count, kept, edges, Crash(target.name, error, data))
        if not reached <= edges and len(inputs) < POOL_MAX:
            edges |= reached
            kept.append(data)
            inputs.append(data)
    return Slice(count, kept, edges, None)


def _error_of(target: Target, data: bytes, reached: set[Edge] | None = None) -> str | None:
    """The exception that came out and where, None when none did."""
    if reached is not None:
        sys.settrace(_tracer(str(target.traced), reached))
    signal.setitimer(signal.ITIMER_REAL, INPUT_S)
    try:
        target.run(data)
    except BaseException as error:  # whatever it is, it is the find
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.settrace(None)
    return None


def _tracer(folder: str, reached: set[Edge]) -> Callable[..., Any]:
    def calls(frame: FrameType, _: str, __: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(folder):
            return None
        before = 0

        def lines(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
            nonlocal before
            if event == "line":
                reached.add((frame.f_code.co_filename, before, frame.f_lineno))
                before = frame.f_lineno
            return lines

        return lines

    return calls


class _Overdue(BaseException):
    """An input took too long; no parser catches it."""


def _overdue(*_: object) -> None:
    raise _Overdue


def _in_child(work: Callable[[], Any], current: mmap.mmap) -> tuple[Any, str]:
    """What the work gives, run in a process of its own; None and the reason when that ends."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            faulthandler.disable()  # a find says it all
            signal.signal(signal.SIGALRM, _overdue)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(work(), pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    raw = _read_all(reader, pid, current)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return pickle.loads(raw), ""
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
    return None, ended


def _read_all(reader: int, pid: int, current: mmap.mmap) -> bytes:
    """What the child writes, until it ends; killed when one input goes on although the alarm
    rang: then it hangs in code that no alarm interrupts.
    """
    os.set_blocking(reader, False)
    parts: list[bytes] = []
    seen, since = b"", time.monotonic()
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while True:
            part = pipe.read(1 << 20)
            if part == b"":
                return b"".join(parts)
            if part is not None:
                parts.append(part)
                continue
            if current[:_LENGTH_BYTES] != seen:
                seen, since = current[:_LENGTH_BYTES], time.monotonic()
            elif time.monotonic() - since > 2 * INPUT_S:
                os.kill(pid, signal.SIGKILL)
                since = time.monotonic()
            select.select([reader], [], [], _LOOK_S)


def read_corpus(folder: Path) -> Sequence[bytes]:
    """The inputs of one target, in the order of their names."""
    return [path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()]
