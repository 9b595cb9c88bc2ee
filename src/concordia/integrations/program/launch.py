"""`concordia run`: a program with the shim under it, floor 7.

Owns: what is prepared before a program starts, and what is said when it has ended. Promises: what
can be wrong is found before anything is started, one line and exit code 2; the program's own exit
code or signal is ours; LD_LIBRARY_PATH and CONCORDIA_RUN are all that changes for it, and what
protection.py and assembler.py say where they have a part; the run folder stays for `concordia
modules`. Called by the command line. What the shim does with an image is native/'s; the rewriter is
instrument/'s. What only some runs need is imported by those: each program's start waits for this.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import concordia
from concordia import config
from concordia.errors import UsageError
from concordia.instrument.cache_folder import CacheFolder, is_key
from concordia.instrument.options import Options
from concordia.integrations.program.architecture import architecture
from concordia.integrations.program.driver import find_driver
from concordia.integrations.program.find_program import find_program
from concordia.integrations.program.gate_page import make_page
from concordia.integrations.program.run_folder import (
    VARIABLE,
    ProgramRun,
    check_length,
    make_run,
    remove_old,
)
from concordia.integrations.program.shim_build import place_shim
from concordia.integrations.program.supervisor import (
    IGNORED_HERE,
    Supervisor,
    before_threads,
    end_as,
)
from concordia.paths import Paths

if TYPE_CHECKING:
    from concordia.integrations.program.assembler import StandIn
    from concordia.integrations.program.policy import Policy
    from concordia.integrations.program.protection import Protection

DISABLE: Final = "CONCORDIA_DISABLE"
HOOKS: Final = ("entry", "exit", "marks", "sass-marks")


class Launch(NamedTuple):
    """What a user asked for. Without hooks and policy images are looked at and left as they are."""

    command: tuple[str, ...]
    hooks: frozenset[str] = frozenset()
    policy: Policy | None = None
    run_dir: Path | None = None
    is_verbose: bool = False

    def options(self) -> Options:
        """What the rewriter is asked for."""
        found = Options(
            arch=architecture() or Options().arch,
            entry="entry" in self.hooks,
            exit="exit" in self.hooks,
            marks="marks" in self.hooks,
            sass_marks="sass-marks" in self.hooks,
        )
        if self.policy is None:
            return found
        hooks = self.hooks or {name for name, is_on in self.policy.hooks.items() if is_on}
        return found.replaced(
            entry="entry" in hooks,
            exit="exit" in hooks,
            marks="marks" in hooks,
            sass_marks="sass-marks" in hooks,
            deny=self.policy.deny,
            opaque=found.opaque if self.policy.opaque is None else self.policy.opaque,
        )


def launch(asked: Launch) -> int:
    """Run the program; its exit code. Does not return when a signal ended it."""
    environment = dict(os.environ)
    if not asked.command:
        raise UsageError("name a program behind --, such as: concordia run -- python app.py")
    program = find_program(asked.command[0])
    if program is None:
        raise UsageError(f"there is no program {asked.command[0]}: give its path")
    if environment.get(DISABLE, "0") not in ("", "0"):
        for number in IGNORED_HERE:
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(program, list(asked.command), environment)
    driver = find_driver(environment)
    options = asked.options()
    images = Paths.default().image_cache
    check_length(images / options.key(), "set CONCORDIA_CACHE to a shorter one")
    cache = CacheFolder(images, options.key())
    run = make_run(asked.run_dir)
    protection: Protection | None = None
    try:
        place_shim(run.path, driver)
        make_page(run.path)
        is_looking = not (options.entry or options.exit or options.marks or options.sass_marks)
        settings = _settings(options, cache, is_looking=is_looking)
        stand_in = _stand_in(run, options, environment) if options.marks else None
        run.settle(settings | dict(stand_in.settings) if stand_in else settings)
        if stand_in is not None:  # it is tried, and reads the settings
            environment |= stand_in.environment(environment)
        if asked.policy is not None:
            (run.path / "policy").write_text(asked.policy.lines(), "utf-8")
            if asked.policy.protects:
                protection = _protection(asked.policy)
                environment |= protection.environment()
                protection.keep_addresses()
        why_not = stand_in.why_not if stand_in else "no marks were asked for"
        prepared = {"driver": str(driver), "assembler": why_not}
        run.tell(command=list(asked.command), started=time.time(), **prepared)
        supervisor = Supervisor(
            _rewriter(run, options), _rewriter_environment(os.environ), run.socket
        )
        status = supervisor.run(
            asked.command,
            _environment(environment, run.path),
            when_started=lambda: _tidy(run),
            when_ended=lambda: _await_looks(run, cache) if is_looking else None,
        )
        facts = {}
        if protection is not None:
            facts["protection"] = protection.end(os.waitstatus_to_exitcode(status))
        _note_end(run, supervisor, status=status, **facts)
        if asked.is_verbose:
            from concordia.integrations.program.coverage import read_run

            _say(read_run(run).summary())
    finally:
        if protection is not None:
            protection.close()
        run.close()
    return end_as(status)


def _tidy(run: ProgramRun) -> None:
    """What can wait until the program runs. It goes on whatever becomes of it."""
    gc.enable()  # cli_run has switched it off
    with contextlib.suppress(OSError):  # what is not removed now is old for the next start, too
        remove_old(run.path.parent)


def _note_end(run: ProgramRun, supervisor: Supervisor, **facts: object) -> None:
    facts |= {"rewriter_deaths": supervisor.rewriter_deaths}
    facts |= {"rewriter_error": supervisor.rewriter_error}
    with contextlib.suppress(OSError):  # a program may have removed its run's folder
        run.tell(ended=time.time(), **facts)
    if supervisor.rewriter_error:
        _say(f"no rewriter, so new images stayed as they were: {supervisor.rewriter_error}")


def _say(text: str) -> None:
    """One line, behind the program's end: its exit code is not lost with whoever would read it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"concordia: {text}\n")


def _stand_in(run: ProgramRun, options: Options, environment: Mapping[str, str]) -> StandIn:
    """Before the assemblers of this environment, or why there is none."""
    from concordia.integrations.program.assembler import place_stand_in

    return place_stand_in(run.path, options, environment)


def _protection(policy: Policy) -> Protection:
    with before_threads():
        from concordia.integrations.program.protection import Protection
    return Protection.open(policy)


def _settings(options: Options, cache: CacheFolder, *, is_looking: bool) -> dict[str, object]:
    """What the shim reads; native/process_settings.c."""
    return {
        "mode": "look" if is_looking else "rewrite",
        "cache": cache.path,
        "opaque": options.opaque_list(),
        "arch": options.arch,
        "page_shift": options.page_shift,
        "image_wait_ms": int(1000 * config.RUN_IMAGE_WAIT_S),
        "process_wait_ms": int(1000 * config.RUN_WAIT_S),
        "log_bytes": config.RUN_LOG_BYTES_MAX,
        "gate_hold_ms": int(1000 * config.GATE_HOLD_S),
    }


def _environment(environment: Mapping[str, str], run: Path) -> dict[str, str]:
    """The program's own, with the shim before all other libraries. An empty part of the path would
    be the working folder, so none is made.
    """
    rest = environment.get("LD_LIBRARY_PATH", "")
    path = f"{run}:{rest}" if rest else str(run)
    return {**environment, "LD_LIBRARY_PATH": path, VARIABLE: str(run)}


def _rewriter(run: ProgramRun, options: Options) -> Sequence[str]:
    return (
        *(sys.executable, "-m", "concordia.instrument.rewriter"),
        *("--run", str(run.path)),
        *("--cache", str(Paths.default().image_cache)),
        *("--options", options.to_json()),
        *("--launcher", str(os.getpid())),
    )


def _rewriter_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """It runs this package, wherever it lies, and no shim."""
    paths = [str(Path(concordia.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        DISABLE: "1",
    }


def _await_looks(run: ProgramRun, cache: CacheFolder) -> None:
    """Let the rewriter read the images that it was told of, within a bound."""
    from concordia.integrations.program.coverage import read_run

    deadline = time.monotonic() + config.RUN_LOOK_S
    waiting = {image.key for image in read_run(run).images if is_key(image.key)}
    while waiting and time.monotonic() < deadline:
        waiting = {key for key in waiting if not cache.file(key).exists()}
        time.sleep(config.PROGRAM_POLL_S)
