"""Every kernel under compute-sanitizer: memcheck, racecheck and synccheck, on one GPU.

Runs tests/gpu/sanitized.py, once as it is (which also compiles) and once under each tool, and
before each a handler with a planted fault that the tool must find. Prints a table and writes one
result file. Exit 0 when every tool is clean, 1 when one is not or sees nothing at all, 2 where
compute-sanitizer or a GPU is missing.
"""

from __future__ import annotations

import glob
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from sanitizer_report import Finding, read_findings, read_summary

from concordia.testing.command import Parser, file_in_folder, run_command
from concordia.testing.machine import machine

ROOT: Final = pathlib.Path(__file__).resolve().parent.parent
PROGRAM: Final = ROOT / "tests" / "gpu" / "sanitized.py"
RESULTS: Final = ROOT / "benchmarks" / "results" / "sanitizer_h200.json"
TOOLS: Final = ("memcheck", "racecheck", "synccheck")
# the tool is bin/compute-sanitizer, a link, or compute-sanitizer/compute-sanitizer of these
HOMES: Final = ("/usr/local/cuda", "/opt/cuda", "/usr/local/cuda-*", "/opt/nvidia/cuda*")
PLANTED_S: Final = 30.0
SECONDS: Final = 300.0
ENDING_S: Final = 30.0  # a process that the driver is in the middle of may end late
LINES_MAX: Final = 40  # of what a tool said besides its findings, kept in the result
PRINTED_MAX: Final = 20000  # of a tool's reports: each launch of a kernel has its own


@dataclass(slots=True)
class Verdict:
    """What one run of one tool said; `errors` is None when it came to no summary."""

    tool: str
    errors: int | None
    warnings: int
    exit_code: int
    seconds: float
    programs: int
    planted_errors: int | None = None  # None: not asked for
    findings: list[Finding] = field(default_factory=list)  # every distinct one
    said: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return (
            not self.findings
            and (self.errors, self.warnings, self.exit_code) == (0, 0, 0)
            and self.programs > 0
        )

    @property
    def is_blind(self) -> bool:
        return self.planted_errors == 0


def find_sanitizer() -> str | None:
    """compute-sanitizer, from PATH or where CUDA and its packages put it; the newest version."""
    packages = pathlib.Path(sysconfig.get_path("purelib")) / "nvidia" / "*"
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes = [*named, *(home for place in HOMES for home in sorted(glob.glob(place), reverse=True))]
    homes += [sys.prefix, *sorted(glob.glob(str(packages)))]
    places = [os.environ.get("PATH", "")]
    places += [f"{home}/{folder}" for home in homes for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def run(command: list[str], timeout_s: float) -> tuple[int, str]:
    """Exit status (124 at the bound) and all that was said; ends whatever it started."""
    beside = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = os.pathsep.join([str(ROOT / "src"), str(PROGRAM.parent), *filter(None, beside)])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    ) as child:  # fmt: skip
        try:
            said, _ = child.communicate(timeout=max(1.0, timeout_s))
            return child.returncode, said
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            try:
                said, _ = child.communicate(timeout=ENDING_S)
            except subprocess.TimeoutExpired as error:  # who left the group holds the pipe
                said = (error.stdout or b"").decode(errors="replace")
            return 124, said


def watch(sanitizer: str, tool: str, *words: str, timeout_s: float) -> Verdict:
    """One run of the program under one tool."""
    command = [
        sanitizer, "--tool", tool, "--print-limit", str(PRINTED_MAX),
        "--target-processes", "application-only",
        # what a call returns is judged by who calls; kernels are watched here
        *(["--report-api-errors", "no"] if tool == "memcheck" else []),
        sys.executable, str(PROGRAM), *words,
    ]  # fmt: skip
    started = time.monotonic()
    code, said = run(command, timeout_s)
    errors, warnings = read_summary(said)
    lines = [line for line in said.splitlines() if not line.startswith("RAN ")]
    findings = read_findings(said)
    is_quiet = not findings and (code, errors, warnings) == (0, 0, 0)
    return Verdict(
        tool=tool,
        errors=errors,
        warnings=warnings,
        exit_code=code,
        seconds=round(time.monotonic() - started, 1),
        programs=sum(line.startswith("RAN ") for line in said.splitlines()),
        findings=findings,
        said=[]
        if is_quiet
        else lines[: LINES_MAX // 2] + lines[LINES_MAX // 2 :][-LINES_MAX // 2 :],
    )


def table(verdicts: list[Verdict]) -> str:
    """The verdicts for people."""
    lines = [f"{'tool':12} {'errors':>7} {'warnings':>9} {'planted':>8} {'programs':>9} {'s':>6}"]
    for v in verdicts:
        errors = "none said" if v.errors is None else v.errors
        planted = "" if v.planted_errors is None else v.planted_errors
        state = "clean" if v.is_clean and not v.is_blind else "BLIND" if v.is_clean else "NOT CLEAN"
        lines.append(
            f"{v.tool:12} {errors:>7} {v.warnings:>9} {planted:>8} {v.programs:>9} "
            f"{v.seconds:>6} {state}"
        )
        lines += [
            f"  {one.reports} x {one.severity}: {one.what}: {' / '.join(one.places)}"
            for one in v.findings
        ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--no-planted", action="store_true", help="do not prove that tools see")
    parser.add_argument("--output", type=file_in_folder, default=RESULTS)
    options = parser.parse_args(arguments)
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "compute-sanitizer is not here: install CUDA's toolkit, or set CUDA_HOME",
            file=sys.stderr,
        )
        return 2
    found = machine()
    if not found["gpus"]:
        print("no NVIDIA GPU is here: nothing to watch", file=sys.stderr)
        return 2
    until = time.monotonic() + options.seconds
    code, said = run([sys.executable, str(PROGRAM)], until - time.monotonic())
    if code:
        print(f"the program fails without a sanitizer ({code}):\n{said}", file=sys.stderr)
        return 1
    print(f"without a tool: {until - time.monotonic():.0f} s are left", flush=True)
    verdicts: list[Verdict] = []
    for tool in options.tool:
        left_s = (until - time.monotonic()) / (len(options.tool) - len(verdicts))
        verdicts.append(judge(sanitizer, tool, left_s, is_planted=not options.no_planted))
        print(table(verdicts[-1:]), *verdicts[-1].said, sep="\n", flush=True)
        save(options.output, found, verdicts)  # a later tool may be cut short
    print(table(verdicts))
    return 0 if all(v.is_clean and not v.is_blind for v in verdicts) else 1


def judge(sanitizer: str, tool: str, seconds: float, *, is_planted: bool) -> Verdict:
    """One tool over the planted fault, then over all programs."""
    until = time.monotonic() + seconds
    planted = None
    if is_planted:
        seen = watch(sanitizer, tool, tool, timeout_s=min(PLANTED_S, seconds / 2))
        # one that was cut short came to no summary
        planted = (seen.errors or 0) + seen.warnings or sum(f.reports for f in seen.findings)
    verdict = watch(sanitizer, tool, timeout_s=until - time.monotonic())
    verdict.planted_errors = planted
    if planted == 0:
        verdict.said += seen.said  # why it saw nothing
    return verdict


def save(path: pathlib.Path, found: dict[str, Any], verdicts: list[Verdict]) -> None:
    """The result file, of the tools that were run so far."""
    result = {
        "machine": found,
        "commit": found["commit"],
        "clean": all(v.is_clean and not v.is_blind for v in verdicts),
        "tools": [asdict(v) for v in verdicts],
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
