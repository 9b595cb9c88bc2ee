"""The runner of compute-sanitizer, with a stand-in for the tool.

Invariants: clean means that every tool came to a summary of nothing, ran the programs and found its planted fault; every distinct
finding is kept, however often others were reported; what is missing is said with exit status 2; nothing outlives its bound.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# Says what it is told for each tool, whether a fault was planted or not.
TOOL = """#!{python}
import json, sys, time
tool = sys.argv[sys.argv.index("--tool") + 1]
planted = sys.argv[-1] == tool and not sys.argv[-2].startswith("--")
said = json.loads({said!r})["planted" if planted else tool]
if said == "hang":
    time.sleep(600)
print("RAN something\\n" + said)
"""
CLEAN = "========= ERROR SUMMARY: 0 errors"
CLEAN_RACES = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
RACES = """========= Warning: Race reported between Write access at concordia_executor+0x6d20
=========     and Read access at concordia_executor+0x8a30 [8 hazards]
=========
""" * 300 + """========= Error: Race reported between Write access at take(Call *)+0x10 in call.h:5
=========         Device Frame: concordia_executor+0x40 in executor.h:70
=========     and Read access at take(Call *)+0x30 in call.h:7 [64 hazards]
=========     and Write access at take(Call *)+0x10 in call.h:5 [4 hazards]
=========
""" + """========= Warning: Race reported between Write access at f+0x0 and Read access at g+0x8 [1 hazard]
========= RACECHECK SUMMARY: 302 hazards displayed (1 error, 301 warnings)
"""
BARRIER = """========= Barrier error detected. Invalid arguments.
=========     at concordia_handler+0x90 in planted.cu:3
=========     by thread (48,0,0) in block (0,0,0)
"""
FOUND = "========= Invalid __global__ read of size 8 bytes\n========= ERROR SUMMARY: 3 errors"
ALL_CLEAN = {"memcheck": CLEAN, "racecheck": CLEAN_RACES, "synccheck": CLEAN, "planted": FOUND}


@pytest.fixture
def sanitize(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sanitize

    return sanitize


def run_with(sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, said: dict[str, str], *options: str) -> tuple[int, dict[str, dict[str, object]]]:
    tool, program, output = folder / "compute-sanitizer", folder / "program.py", folder / "result.json"
    tool.write_text(TOOL.format(python=sys.executable, said=json.dumps(said)))
    tool.chmod(0o700)
    program.write_text("print('RAN it')")
    monkeypatch.setattr(sanitize, "PROGRAM", program)
    monkeypatch.setattr(sanitize, "machine", lambda: {"gpus": ["a GPU"], "commit": "abc"})
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    code = sanitize.main(["--output", str(output), *options])
    result = json.loads(output.read_text())
    return code, {verdict["tool"]: verdict for verdict in result["tools"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CLEAN, (0, 0)),
        (FOUND, (3, 0)),
        ("========= ERROR SUMMARY: 1 error", (1, 0)),
        (CLEAN_RACES, (0, 0)),
        ("========= RACECHECK SUMMARY: 7 hazards displayed (4 errors, 3 warnings)", (4, 3)),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", (1, 0)),
        ("========= Error: process didn't terminate successfully", (None, 0)),
        ("", (None, 0)),
    ],
)
def test_summary_is_read_as_the_tools_word_it(sanitize: ModuleType, text: str, expected: tuple[int | None, int]) -> None:
    assert sanitize.read_summary(f"========= COMPUTE-SANITIZER\n{text}\n") == expected


def test_every_distinct_finding_is_kept_when_one_is_reported_often(sanitize: ModuleType) -> None:
    found = [(f.reports, f.severity, f.what, f.places, f.hazards) for f in sanitize.read_findings(RACES + BARRIER * 16)]
    write, take = "Write and Write of shared memory", "take(Call *)+0x10 in call.h:5"
    read = "Write and Read of shared memory"
    assert found == [
        (300, "Warning", read, ["concordia_executor+0x6d20", "concordia_executor+0x8a30"], 2400),
        (16, "Error", "Barrier error detected. Invalid arguments.", ["concordia_handler+0x90 in planted.cu:3"], 0),
        (1, "Error", write, [take, take], 4),
        (1, "Error", read, [take, "take(Call *)+0x30 in call.h:7"], 64),
        (1, "Warning", read, ["f+0x0", "g+0x8"], 1),
    ]


def test_findings_are_in_the_result_and_on_the_screen_when_a_tool_has_some(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, verdicts = run_with(sanitize, monkeypatch, tmp_path, ALL_CLEAN | {"racecheck": RACES})
    assert code == 1
    findings = verdicts["racecheck"]["findings"]
    assert isinstance(findings, list)
    assert len(findings) == 4
    assert "300 x Warning: Write and Read of shared memory: concordia_executor+0x6d20 / concordia_executor+0x8a30" in capsys.readouterr().out


def test_planted_fault_counts_when_its_run_is_cut_short(sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, verdicts = run_with(sanitize, monkeypatch, tmp_path, ALL_CLEAN | {"planted": BARRIER})
    assert code == 0
    assert verdicts["synccheck"]["planted_errors"] == 1


def test_exit_is_0_when_every_tool_is_clean_and_sees(sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, verdicts = run_with(sanitize, monkeypatch, tmp_path, ALL_CLEAN)
    assert code == 0, capsys.readouterr().out
    assert set(verdicts) == {"memcheck", "racecheck", "synccheck"}
    assert all((v["errors"], v["planted_errors"], v["programs"], v["said"]) == (0, 3, 1, []) for v in verdicts.values())


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"memcheck": FOUND}, "NOT CLEAN"),
        ({"racecheck": "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)"}, "NOT CLEAN"),
        ({"synccheck": "========= Internal Sanitizer Error"}, "none said"),
        ({"planted": CLEAN}, "BLIND"),
    ],
)
def test_exit_is_1_when_a_tool_finds_something_or_sees_nothing(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, capsys: pytest.CaptureFixture[str], change: dict[str, str], shown: str
) -> None:
    code, _ = run_with(sanitize, monkeypatch, tmp_path, ALL_CLEAN | change)
    assert code == 1
    assert shown in capsys.readouterr().out


def test_tool_is_ended_and_not_clean_when_it_hangs(sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = time.monotonic()
    code, verdicts = run_with(sanitize, monkeypatch, tmp_path, ALL_CLEAN | {"memcheck": "hang"}, "--tool", "memcheck", "--seconds", "3")
    assert time.monotonic() - started < 20
    assert code == 1
    assert (verdicts["memcheck"]["errors"], verdicts["memcheck"]["exit_code"]) == (None, 124)


def test_tools_before_are_in_the_result_when_one_is_cut_short(sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = ALL_CLEAN | {"racecheck": "hang"}
    code, verdicts = run_with(sanitize, monkeypatch, tmp_path, said, "--tool", "memcheck", "racecheck", "--seconds", "6")
    assert code == 1
    assert verdicts["memcheck"]["errors"] == 0
    assert verdicts["racecheck"]["exit_code"] == 124


@pytest.mark.parametrize("place", ["bin", "compute-sanitizer"])
def test_tool_is_found_where_cuda_puts_it(sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    (tmp_path / "cuda" / place).mkdir(parents=True)
    tool = tmp_path / "cuda" / place / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o700)
    assert sanitize.find_sanitizer() == str(tool)


def test_exit_is_2_when_the_tool_or_the_gpu_is_missing(sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sanitize, "machine", lambda: {"gpus": [], "commit": "abc"})
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main([]) == 2
    assert "compute-sanitizer is not here" in capsys.readouterr().err
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: "/bin/true")
    assert sanitize.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_planted_handlers_pass_the_lint_when_compiled_for_sm90() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings are not installed")
    import sanitized

    from concordia.device.compiler import HandlerSource
    from concordia.device.cuda import CudaCompiler

    compiler = CudaCompiler("sm_90")
    for tool in sanitized.PLANTED:
        compiler.handler(HandlerSource.of("planted.cu", text=sanitized.planted_text(tool)))


def test_watched_code_is_the_code_that_ships_when_it_names_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings are not installed")
    import sanitized

    from concordia.device import nvrtc
    from concordia.device.cuda import CudaCompiler
    from concordia.device.kernel_cache import KernelCache
    from concordia.instrument.elf import read_cubin

    compiler, found = CudaCompiler("sm_90", KernelCache(tmp_path)), []
    for options in ((), sanitized.LINES):
        monkeypatch.setattr(nvrtc, "OPTIONS", options)
        cubin = read_cubin(compiler.executor().cubin)
        found.append({section.name: bytes(cubin.bytes_of(section)) for section in cubin.sections})
    plain, lined = found
    assert any("debug_line" in name for name in lined.keys() - plain.keys())
    texts = [name for name in plain if name.startswith(".text")]
    assert len(texts) > 2
    assert all(plain[name] == lined[name] for name in texts)


def test_planted_wait_names_its_mask_where_synccheck_looks_for_it(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings are not installed")
    import sanitized

    from concordia.device.compiler import HandlerSource
    from concordia.device.cuda import CudaCompiler
    from concordia.device.kernel_cache import KernelCache
    from concordia.instrument.elf import read_attributes, read_cubin

    source = HandlerSource.of("planted.cu", text=sanitized.planted_text("synccheck"))
    cubin = read_cubin(CudaCompiler("sm_90", KernelCache(tmp_path)).handler(source).cubin)
    (info,) = (section for section in cubin.sections if section.name == ".nv.info.concordia_handler")
    at = {attribute.code: attribute for attribute in read_attributes(cubin, info)}
    # Instructions that wait for lanes, and the registers that hold their masks: without one the mask is of all lanes, and never wrong.
    waits, masks = (at[code].size // 4 for code in (0x28, 0x29))
    assert waits == masks > 0
    words = struct.unpack_from(f"<{masks}I", cubin.data, at[0x29].offset)
    assert all(word != 0xFFFFFFFF for word in words)


def test_watched_programs_name_scenarios_that_exist() -> None:
    import inspect

    import sanitized
    import scenarios_kv

    for name, words in sanitized.PROGRAMS:
        inspect.signature(getattr(scenarios_kv, name)).bind(device="host", seed=1, path="", **words)
