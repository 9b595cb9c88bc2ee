"""The pinned assembler of PTX, where there is one.

Owns: finding `ptxas` in the wheel that the extra "dev" pins. Promises: never the one that a machine happens to have. Called by test_instrument_ptx*.py.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import subprocess

import pytest

PACKAGE = "nvidia-cuda-nvcc"
ASSEMBLE_S = 120.0  # a text of 500 KB takes a second


def assembler() -> pathlib.Path:
    """Its file; a test without it is skipped."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed")
    found = [pathlib.Path(str(file.locate())) for file in files if file.name == "ptxas"]
    if not found:
        pytest.skip(f"{PACKAGE} holds no ptxas")
    return found[0]


def assemble(
    text: str, target: str, folder: pathlib.Path, *, relocatable: bool = False, debug: bool = False
) -> str:
    """What it says of a text: empty when it takes it."""
    source = folder / "text.ptx"
    source.write_text(text)
    options = ["-c", "-O1"] * relocatable + ["-g"] * debug  # ours are large, and only read
    command = [str(assembler()), *options, "-arch", target, str(source), "-o", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ASSEMBLE_S, check=False)
    said = done.stderr + done.stdout
    return "" if done.returncode == 0 else said or f"exit code {done.returncode}"
