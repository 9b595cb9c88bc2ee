"""What compute-sanitizer said, as findings: each distinct one once, with how often it was reported.

Owns: the tool's wording. Promises: nothing that was printed as an error or a warning of a kernel is
left out; two findings are one only when severity, kind and every place are the same, so one that
is new cannot hide among old ones. A place is what the tool calls it: function and offset, with file
and line where the code has line information. Called by sanitize.py. Runs nothing, judges nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

# "========= ERROR SUMMARY: 3 errors", "===== RACECHECK SUMMARY: 7 hazards displayed (4 errors, 3
# warnings)"
_ERRORS: Final = re.compile(r"=+ ERROR SUMMARY: (\d+) error")
_HAZARDS: Final = re.compile(
    r"=+ RACECHECK SUMMARY: (\d+) hazards?[^(]*\((\d+) errors?, (\d+) warn"
)
# "===== Warning: Race reported between Write access at f()+0x10 in a.h:5", then one line or more
# "=====     and Read access at f()+0x30 in a.h:7 [8 hazards]"; short ones stand in one line
_RACE: Final = re.compile(
    r"=+ (?P<severity>\w+): Race reported between (?P<kind>\w+) access at (?P<place>.*)"
)
_PARTNER: Final = re.compile(r"\band (\w+) access at (.*?)\s*\[(\d+) hazards?\]")
# "===== Invalid __global__ read of size 8 bytes" or "===== Barrier error detected. Invalid
# arguments.", then "=====     at f()+0x10 in a.cu:5"
_FAULT: Final = re.compile(
    r"=+ (?P<what>Invalid __\w+__ .*|Misaligned .*|Barrier error detected.*|.*Address Space.*)"
)
_AT: Final = re.compile(r"=+\s+at (?P<place>.*)")
_INDENTED: Final = re.compile(r"=+\s{2,}")


@dataclass(slots=True)
class Finding:
    """One fault or one pair of accesses; `hazards` counts a race's bytes and threads."""

    severity: str
    what: str
    places: list[str]
    reports: int = 0
    hazards: int = 0


def read_summary(text: str) -> tuple[int | None, int]:
    """Errors and warnings of a tool's last summary; None when there is none."""
    hazards = _HAZARDS.findall(text)
    if hazards:
        return int(hazards[-1][1]), int(hazards[-1][2])
    errors = _ERRORS.findall(text)
    return (int(errors[-1]), 0) if errors else (None, 0)


def read_findings(text: str) -> list[Finding]:
    """All distinct findings, those with the most reports first."""
    found: dict[tuple[str, ...], Finding] = {}
    lines = text.splitlines()
    for index, line in enumerate(lines):
        block = [line, *_indented(lines[index + 1 :])]
        if race := _RACE.match(line):
            _add_race(found, race, block)
        elif fault := _FAULT.match(line):
            places = [at["place"].strip() for part in block[1:] if (at := _AT.match(part))]
            _add(found, Finding("Error", fault["what"].strip(), places[:1]))
    return sorted(found.values(), key=lambda one: (-one.reports, one.severity, one.places))


def _add_race(found: dict[tuple[str, ...], Finding], race: re.Match[str], block: list[str]) -> None:
    whole = " ".join(re.sub(r"^=+\s*", "", part) for part in block)
    first = re.split(r"\s+and \w+ access at |\s+Device Frame:", race["place"])[0].strip()
    for kind, place, hazards in _PARTNER.findall(whole):
        other = place.split(" Device Frame:")[0].strip()
        what = f"{race['kind']} and {kind} of shared memory"
        _add(found, Finding(race["severity"], what, [first, other], hazards=int(hazards)))


def _add(found: dict[tuple[str, ...], Finding], one: Finding) -> None:
    known = found.setdefault((one.severity, one.what, *one.places), one)
    known.reports += 1
    if known is not one:
        known.hazards += one.hazards


def _indented(lines: list[str]) -> list[str]:
    """The lines that go on with what the line before them began."""
    for count, line in enumerate(lines):
        if not _INDENTED.match(line):
            return lines[:count]
    return lines
