"""A scenario in a process of its own, with a bound.

Owns: starting, ending and answering of children. Promises: a child that does not end in time is killed with everything it started,
and says so; the answer is what the scenario returned. Called by the tests beside this file.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ANSWER = "ANSWER "
TIMEOUT_S = 60.0


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


def start(scenario: str, **arguments: Any) -> subprocess.Popen[str]:
    """Begin `module:function` with these keywords."""
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent.parent / 'src'}:{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        [sys.executable, "-u", str(HERE / "child.py"), scenario, json.dumps(arguments)],
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
    ended = end(start(scenario, **arguments), timeout_s)
    assert ended.code == 0, f"{scenario} ended with {ended.code}:\n{ended.said}"
    return ended.answer


def _main(scenario: str, arguments: str) -> None:
    # Whatever hangs in the GPU or a driver call is ended from here, too, should the parent be gone.
    watchdog = threading.Timer(2 * TIMEOUT_S, lambda: os._exit(111))
    watchdog.daemon = True
    watchdog.start()
    module, _, function = scenario.partition(":")
    answer = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(ANSWER + json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:3])
