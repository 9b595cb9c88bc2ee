"""The law of the house.

Invariants: `import concordia` is light; public names are the ones listed here; every room has a header; the committed abi.h is what abi
generates; prose that states a limit matches config.py, and a page that quotes a figure its result file. The floors themselves are kept by import-linter (`make check`).
"""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import concordia
from concordia import abi, config

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import drawing  # noqa: E402
import figures  # noqa: E402
import goals  # noqa: E402
import plot  # noqa: E402
import table  # noqa: E402

COMMITTED = figures.read_figures(figures.RESULTS)
SOURCE = pathlib.Path(concordia.__file__).parent
ROOMS = sorted(p for p in SOURCE.rglob("*.py") if p.name != "__init__.py")


def test_import_loads_neither_cuda_torch_nor_vllm_when_concordia_is_imported() -> None:
    code = (
        "import sys, concordia\n"
        "heavy = {'torch', 'vllm', 'cuda', 'transformers', 'numpy'} & {m.split('.')[0] for m in sys.modules}\n"
        "print(sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_command_line_loads_neither_cuda_torch_nor_vllm_when_help_is_asked() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['concordia', '--help']\n"
        "try:\n    runpy.run_module('concordia.cli', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'vllm', 'cuda', 'transformers'} & {m.split('.')[0] for m in sys.modules}\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "HEAVY []" in done.stdout


def test_public_names_stay_as_listed_when_the_library_grows() -> None:
    assert sorted(concordia.__all__) == ["__version__"]
    assert all(hasattr(concordia, name) for name in concordia.__all__)


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: str(p.relative_to(SOURCE)))
def test_room_has_a_header_and_short_functions_when_it_is_read(room: pathlib.Path) -> None:
    tree = ast.parse(room.read_text(encoding="utf-8"))
    header = ast.get_docstring(tree)
    assert header, "a room says what it owns, promises and does not do"
    assert len(header.splitlines()) <= 12
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 70, f"{node.name} has {lines} lines"


def test_structures_have_no_hidden_padding_when_laid_out() -> None:
    for struct in abi.STRUCTS:
        assert struct.offsets()
        assert struct.dtype.itemsize == struct.size


def test_committed_header_is_the_generated_one_when_compared() -> None:
    committed = (SOURCE / "kernels" / "abi.h").read_text(encoding="utf-8")
    assert committed == abi.header(), "run: python -m concordia.abi"


def test_every_parameter_with_a_need_is_documented_when_the_table_changes() -> None:
    from concordia.serving.need import NEEDS

    text = (SOURCE.parents[1] / "docs" / "parameters.md").read_text(encoding="utf-8")
    for need in NEEDS:
        assert f"| `{need.parameter}` | {need.level.label} | {need.why} |" in text


def test_prose_states_the_limits_of_the_audit_when_they_change() -> None:
    text = (SOURCE.parents[1] / "docs" / "journal.md").read_text(encoding="utf-8")
    assert (config.AUDIT_IDLE_S, config.AUDIT_PERIOD_S) == (1.0, 1.0)
    assert "without a step for a second hashes a block a second" in text
    assert f"a sample of {config.AUDIT_BLOCKS_MAX} full blocks" in text


def test_benchmark_page_quotes_the_committed_results_when_they_change() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert page == table.with_table(page, COMMITTED), "run: make bench-page"
    assert all(f"| `{key}` |" in page for key in goals.KEYS)


def test_benchmark_page_says_why_for_each_goal_that_is_not_reached_and_for_no_other() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    said = re.findall(r"^- `(\w+)`: ", page.partition("## Not reached, and why")[2].partition("\n## ")[0], re.MULTILINE)
    missed = [key for key in goals.KEYS if key in COMMITTED and not table.is_met(key, COMMITTED[key])]
    assert said == missed


def test_pictures_on_the_benchmark_page_are_drawn_from_the_committed_results_when_they_change() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    with drawing.styled():
        results = plot.read(plot.RESULTS)
        wanted = {name: plot.digest(results, files) for name, (draw, files) in plot.PICTURES.items() if draw(results)}
    shown = set(re.findall(r"\(images/([\w.]+)\)", page))
    assert shown == set(wanted) == {path.name for path in plot.IMAGES.glob("*.png")}
    for name, digest in wanted.items():
        assert digest.encode() in (plot.IMAGES / name).read_bytes(), f"{name} is older than its results; run: make bench-page"


def test_numbers_of_documents_come_from_result_files_that_are_there() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\(([^)#]*results/[^)#]*)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} names {link}"
