"""The command `concordia run` itself: its flags read the short way, and its start.

Owns: what is asked for before a program is started, and its checks. Promises: flags are read here
only as click would read them (cli_program), and whatever is not plain is left to it; a mistake is
a UsageError and nothing is started; it imports little, because each program's start waits for this.
Called by cli and cli_program. The work is launch's.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from concordia.errors import UsageError

RUN_DIR: Final = "CONCORDIA_RUN_DIR"
_FORCE_TEXT: Final = "CUDA_FORCE_PTX_JIT"
_WITH_VALUE: Final = ("--policy", "--hooks", "--run-dir")
_VERBOSE: Final = "--verbose"


class Asked(NamedTuple):
    """What a command line says."""

    command: tuple[str, ...]
    hooks: str = ""
    policy: Path | None = None
    run_dir: Path | None = None
    is_verbose: bool = False


def plain(words: Sequence[str], environment: Mapping[str, str]) -> Asked | None:
    """What these words ask for: `run`, its flags in full, a program; else None."""
    if not words or words[0] != "run":
        return None
    values, is_verbose, at = {"--run-dir": environment.get(RUN_DIR, "")}, False, 1
    while at < len(words) and words[at].startswith("-"):
        name, has_value, value = words[at].partition("=")
        at += 1
        if name == "--" and not has_value:
            break
        if name == _VERBOSE and not has_value:
            is_verbose = True
            continue
        if name in _WITH_VALUE and not has_value and at < len(words):
            value = words[at]
            at += 1
        if name not in _WITH_VALUE or not value or value.startswith("-"):
            return None
        values[name] = value
    if at >= len(words):
        return None

    def path(name: str) -> Path | None:
        return Path(values[name]) if values.get(name) else None

    return Asked(
        tuple(words[at:]),
        values.get("--hooks", ""),
        path("--policy"),
        path("--run-dir"),
        is_verbose,
    )


def start(asked: Asked) -> int:
    """Run the program to its end; its exit code."""
    gc.disable()  # until the program runs: what a start makes stays, and is looked through in vain
    try:
        return _start(asked)
    finally:
        gc.enable()


def _start(asked: Asked) -> int:
    from concordia.integrations.program.supervisor import before_threads

    with before_threads():
        from concordia.integrations.program.launch import HOOKS, Launch, launch

    wanted = frozenset(part.strip() for part in asked.hooks.split(",") if part.strip())
    if not wanted <= set(HOOKS):
        raise UsageError(f"--hooks {asked.hooks}: give some of {', '.join(HOOKS)}, with commas")
    read = None
    if asked.policy is not None:
        with before_threads():
            from concordia.integrations.program.policy import read_policy
        read = read_policy(asked.policy)
    is_hooking = bool(wanted) or (read is not None and any(read.hooks.values()))
    forced = os.environ.get(_FORCE_TEXT, "0")
    if is_hooking and forced not in ("", "0"):
        # the driver would take an image's PTX, where hooks are in its machine code
        raise UsageError(f"{_FORCE_TEXT}={forced} runs code that has no hooks: unset it, or hooks")
    return launch(
        Launch(
            command=asked.command,
            hooks=wanted,
            policy=read,
            run_dir=asked.run_dir,
            is_verbose=asked.is_verbose,
        )
    )
