"""A scenario in a process of its own, with a bound.

Owns: starting, ending and answering of children. Promises: a child that does not end in time, or logs what it must not, is killed with
everything it started, and says so with its last lines; the answer is what the scenario returned. Called by the tests beside this file.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ANSWER = "ANSWER "
TIMEOUT_S = 60.0
GRACE_S = 5.0  # for what follows a line that ends a child
LINES_SHOWN, ERRORS_SHOWN = 60, 20
# after these nothing that is looked for can come; what raises ends a child by itself
HOPELESS = re.compile(r"protection is OFF|CUDA error|CUDA_ERROR|EngineDeadError")


@dataclass(frozen=True)
class Ended:
    """How a child ended, what it said, and what it answered."""

    code: int
    answer: Any
    said: str


def gpu_missing() -> str | None:
    """None when a GPU can be used, else what is missing. Asked in a child: CUDA must not start in the tests' process."""
    code = "from cuda.bindings import driver as d; r = d.cuInit(0); print(r[0].name, d.cuDeviceGetCount()[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["cuda-bindings"])[-1]
    name, count = done.stdout.split()
    return None if name == "CUDA_SUCCESS" and int(count) > 0 else f"{name}, {count} devices"


def gpu_count() -> int:
    """GPUs that there are, asked in a child like the rest."""
    code = "from cuda.bindings import driver as d; d.cuInit(0); print(d.cuDeviceGetCount()[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def start(scenario: str, *, bound_s: float = 2 * TIMEOUT_S, **arguments: Any) -> subprocess.Popen[str]:
    """Begin `module:function` with these keywords; it ends by itself at the bound."""
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent.parent / 'src'}:{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        [sys.executable, "-u", str(HERE / "child.py"), scenario, json.dumps(arguments), str(bound_s)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def end(child: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> Ended:
    """Wait for it, or kill its session at the bound."""
    try:
        said, _ = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill(child)
        said, _ = child.communicate(timeout=10)
        raise AssertionError(f"no end after {timeout_s} s:\n{said}") from None
    answers = [line for line in said.splitlines() if line.startswith(ANSWER)]
    return Ended(child.returncode, json.loads(answers[-1][len(ANSWER) :]) if answers else None, said)


def kill(child: subprocess.Popen[str]) -> None:
    """SIGKILL to the child and all it started."""
    os.killpg(child.pid, signal.SIGKILL)


def run(scenario: str, timeout_s: float = TIMEOUT_S, **arguments: Any) -> Any:
    """The answer of a scenario that must end well."""
    ended = end(start(scenario, bound_s=max(2 * TIMEOUT_S, timeout_s + GRACE_S), **arguments), timeout_s)
    assert ended.code == 0, f"{scenario} ended with {ended.code}:\n{tail(ended.said)}"
    return ended.answer


def run_without_errors(scenario: str, timeout_s: float, **arguments: Any) -> Any:
    """The same, of one that must not log that all is lost either: it is ended then, not at its bound."""
    child = start(scenario, bound_s=timeout_s + GRACE_S, **arguments)
    assert child.stdout is not None
    started, said, reason = time.monotonic(), b"", f"did not end within {timeout_s:.0f} s"
    until, poll = started + timeout_s, select.poll()
    poll.register(child.stdout, select.POLLIN)
    while (left_s := until - time.monotonic()) > 0:
        if not poll.poll(1000 * left_s):
            continue
        data = os.read(child.stdout.fileno(), 1 << 16)
        if not data:
            reason = ""
            break
        said += data
        if reason.startswith("did not") and HOPELESS.search(said.decode(errors="replace")):
            reason, until = "logged what it must not", min(until, time.monotonic() + GRACE_S)
    kill(child)
    code, text = child.wait(10), said.decode(errors="replace")
    child.stdout.close()
    answers = [line for line in text.splitlines() if line.startswith(ANSWER)]
    if reason or not answers:
        # printed, too: a run that is cut short keeps what was printed
        print(words := f"{scenario} {reason or f'ended with {code}'} after {time.monotonic() - started:.0f} s:\n{tail(text)}", flush=True)
        raise AssertionError(words)
    return json.loads(answers[-1][len(ANSWER) :])


def tail(said: str) -> str:
    """What a reader needs of it: errors that were logged early, and the last lines."""
    lines = [line[:400] for line in said.splitlines() if not line.startswith(ANSWER)]
    early = [line for line in lines[:-LINES_SHOWN] if re.search(r"error|exception|refus", line, re.IGNORECASE)]
    return "\n".join([*early[:ERRORS_SHOWN], *lines[-LINES_SHOWN:]])


def _main(scenario: str, arguments: str, bound_s: str) -> None:
    # Whatever hangs in the GPU or a driver call is ended from here, too, should the parent be gone.
    watchdog = threading.Timer(float(bound_s), lambda: os._exit(111))
    watchdog.daemon = True
    watchdog.start()
    module, _, function = scenario.partition(":")
    try:
        answer = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    except BaseException:  # threads and contexts that are left would hold up the end
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    print(ANSWER + json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:4])
