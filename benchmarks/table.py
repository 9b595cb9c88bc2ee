"""The table of docs/benchmarks.md, made of the committed results.

Owns: the lines between the page's two marks. Promises: every key of goals.py has a line; what was
not measured says so; numbers are those of the result file. A test holds the page to it. Run it
after a result file has changed; which goals are not reached, and why, is written by hand below it.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any, Final

from figures import RESULTS, Figures, read_figures
from goals import BY_KEY, KEYS, SLOPE_KEY, SLOPE_MEANING, Goal

from concordia.testing.command import Parser, run_command

PAGE: Final = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN: Final = "<!-- made by benchmarks/table.py -->\n"
END: Final = "<!-- end -->\n"
HEAD: Final = """| key | what | measured | goal | | limit | peers |
|---|---|---|---|---|---|---|
"""


def table(figures: Figures) -> str:
    """All lines."""
    return HEAD + "".join(_line(key, figures.get(key)) for key in KEYS)


def is_met(key: str, found: dict[str, Any]) -> bool:
    """Whether a figure reaches its goal."""
    return bool(found["is_flat"]) if key == SLOPE_KEY else BY_KEY[key].is_met(found["median"])


def _line(key: str, found: dict[str, Any] | None) -> str:
    goal = BY_KEY.get(key)
    meaning = goal.meaning if goal else SLOPE_MEANING
    measured, mark, peers = "not yet", "", {}
    if found is not None:
        measured = f"**{number(found['median'])}** {_unit(found['unit'])}".rstrip()
        if "interval_95" in found:
            measured += " [{}, {}]".format(*map(number, found["interval_95"]))
        if "ctas" in found:
            measured += f", {found['ctas']} CTA{'s' * (found['ctas'] > 1)}"
        mark = "reached" if is_met(key, found) else "not reached"
        peers = dict(found["peer"])
    if goal and goal.paper is not None:
        peers["paper"] = goal.paper
    said = "; ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in peers.items())
    wanted = _wanted(goal) if goal else "flat"
    limit = number(goal.limit) if goal and goal.limit is not None else ""
    return f"| `{key}` | {meaning} | {measured} | {wanted} | {mark} | {limit} | {said} |\n"


def _wanted(goal: Goal) -> str:
    return f"{'<' if goal.is_most else '>'} {number(goal.must)} {_unit(goal.unit)}".rstrip()


def _unit(unit: str) -> str:
    return "" if unit == "ratio" else unit


def number(value: float) -> str:
    """Four digits, or whole thousands."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def with_table(page: str, figures: Figures) -> str:
    """The page with its table made anew; ValueError when it has no place for one."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no lines {BEGIN.strip()} and {END.strip()}")
    return before + begin + table(figures) + end + after


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    options = parser.parse_args(arguments)
    figures = read_figures(RESULTS)
    try:
        page = with_table(options.page.read_text(encoding="utf-8"), figures)
        options.page.write_text(page, encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(f"--page {options.page}: {error}")
    for key in KEYS:
        if key not in figures:
            print(f"table: {key} is not measured", file=sys.stderr)
        elif not is_met(key, figures[key]):
            print(f"table: {key} is not reached: say why in {options.page.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
