"""The law of the house.

Invariants: `import concordia` is light; public names are the ones listed here; every room has a header; the committed abi.h is what abi
generates; prose that states a limit matches config.py. The floors themselves are kept by import-linter (`make check`).
"""

from __future__ import annotations

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import concordia
from concordia import abi, config

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


def test_benchmark_page_quotes_the_committed_medians() -> None:
    root = pathlib.Path(__file__).parents[1]
    figures = json.loads((root / "benchmarks/results/device_runtime_h200.json").read_text())["figures"]
    rows = [line.split("|") for line in (root / "docs/benchmarks.md").read_text().splitlines() if line.startswith("| `")]
    assert rows
    for _, key, _, measured, _, _, peer, _ in rows:
        figure = figures[key.strip(" `")]
        assert float(measured) == figure["median"], key
        if peer.strip():
            assert float(peer.rpartition(":")[2]) in figure["peer"].values(), key
