"""Hooks in every kernel for sm_90 of real libraries, without a GPU.

Owns: finding cubins in wheels, libraries and caches, hooking all of their kernels at entry and
exit, proving each result, and letting the vendor's disassembler read it. Promises: a kernel that is
left alone is counted with its reason; a failed proof or a complaint of the disassembler is an exit
code of 1; libraries whose licence forbids changes are not touched. Run by `make corpus`, with files
and wheels as arguments, else over what is installed.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from typing import Any, Final

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument.fatbin import EntryKind
from concordia.instrument.image import ImageKind, read_image
from concordia.instrument.library_file import images_in
from concordia.instrument.options import Options
from concordia.instrument.plan import ARCHITECTURE
from concordia.instrument.proof import first_difference
from concordia.instrument.report import Hook
from concordia.instrument.splice import splice_cubin
from concordia.testing.machine import machine

RESULT: Final = pathlib.Path(__file__).parent / "results" / "instrument_corpus.json"
DISASSEMBLE_S: Final = 600.0  # of one cubin: a hundred MB take two minutes
INSTALLED: Final = ("torch", "vllm", "nvidia", "flash_attn", "flashinfer", "bitsandbytes")
CACHES: Final = (pathlib.Path.home() / ".triton" / "cache",)
# what the disassembler says of every file of the older generation, changed or not
KNOWN_COMPLAINTS: Final = re.compile(r"Old Elf to Std format|Dataflow analysis disabled")
SUFFIXES: Final = (".cubin", ".fatbin")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="libraries, cubins, wheels")
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    parser.add_argument(
        "--disassemble-mb",
        type=float,
        default=float("inf"),
        help="of each file at most; the smallest cubins first",
    )
    arguments = parser.parse_args()
    disassembler, options = _disassembler(), Options()
    files: list[dict[str, Any]] = []
    for name, data in _binaries(arguments.files or _installed()):
        if options.is_opaque_library(name):
            continue
        found = _rewritten(name, data, disassembler, arguments.disassemble_mb * 1e6)
        if found["cubins"]:
            files.append(found)
            print(_line(found), flush=True)
    if not files:
        print("no kernel for sm_90 in any of these files", file=sys.stderr)
        return 2
    total = _total(files)
    found = machine()
    result = {
        "what": "kernels for sm_90 of real libraries, hooked at entry and exit, proven and read",
        "machine": found,
        "commit": found["commit"],
        "disassembler": disassembler and _version(disassembler),
        "total": total,
        "files": files,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(_line(total))
    return int(bool(total["proofs_failed"] or total["complaints"]))


def _rewritten(
    name: str, data: bytes, disassembler: pathlib.Path | None, disassemble_bytes: float
) -> dict[str, Any]:
    counts: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    seconds = {"splice": 0.0, "proof": 0.0}
    results: list[bytes] = []
    wrong: list[str] = []
    for cubin in _cubins(data):
        started = time.perf_counter()
        done = splice_cubin(cubin, entry=True, exit=True)
        seconds["splice"] += time.perf_counter() - started
        counts["cubins"] += 1
        counts["bytes"] += len(cubin)
        for kernel in done.kernels:
            counts["kernels"] += 1
            counts["entry_hooks"] += Hook.ENTRY in kernel.hooks
            counts["exit_hooks"] += Hook.EXIT in kernel.hooks
            if kernel.reason:
                reasons[re.sub(r"0x[0-9a-f]+|[0-9a-f]{16}", "#", kernel.reason)] += 1
        if done.cubin == cubin:
            continue
        started = time.perf_counter()
        if difference := first_difference(cubin, done.cubin):
            wrong.append(difference)
        seconds["proof"] += time.perf_counter() - started
        counts["bytes_added"] += len(done.cubin) - len(cubin)
        counts["changed"] += 1
        results.append(done.cubin)
    complaints: list[str] = []
    if disassembler:
        for result in sorted(results, key=len):
            if counts["bytes_disassembled"] + len(result) > disassemble_bytes:
                break
            complaints += _disassemble(disassembler, result)
            counts["disassembled"] += 1
            counts["bytes_disassembled"] += len(result)
    return {
        "file": name,
        **{key: counts[key] for key in _COUNTS},
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
        "left_alone": dict(reasons.most_common()),
        "proofs_failed": wrong,
        "complaints": complaints,
    }


_COUNTS: Final = (
    *("cubins", "kernels", "entry_hooks", "exit_hooks", "changed"),
    *("bytes", "bytes_added", "disassembled", "bytes_disassembled"),
)


def _total(files: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = {key: sum(f["seconds"][key] for f in files) for key in ("splice", "proof")}
    reasons: collections.Counter[str] = collections.Counter()
    for file in files:
        reasons.update(file["left_alone"])
    total = {key: sum(f[key] for f in files) for key in _COUNTS}
    return {
        **total,
        "splice_mb_per_s": round(total["bytes"] / 1e6 / max(seconds["splice"], 1e-6), 1),
        "proof_mb_per_s": round(total["bytes"] / 1e6 / max(seconds["proof"], 1e-6), 1),
        "left_alone": dict(reasons.most_common()),
        "proofs_failed": [difference for f in files for difference in f["proofs_failed"]],
        "complaints": [complaint for f in files for complaint in f["complaints"]],
    }


def _cubins(data: bytes) -> Iterator[bytes]:
    """Machine code for sm_90 that a driver can load, out of a cubin, a fatbin or a library."""
    if data[:4] == b"\x7fELF" and data[18:20] == b"\xbe\x00":
        image = read_image(data)
        if image.kind is ImageKind.CUBIN and image.entries[0].architecture == ARCHITECTURE:
            yield data
        return
    for found in images_in(data):
        for entry in found.image.entries:
            if entry.kind is not EntryKind.ELF or entry.architecture != ARCHITECTURE:
                continue
            payload = found.image.payload(entry.index)
            if read_image(payload).kind is ImageKind.CUBIN:
                yield payload


def _binaries(files: list[pathlib.Path]) -> Iterator[tuple[str, bytes]]:
    for path in files:
        if path.suffix != ".whl":
            yield path.name, path.read_bytes()
            continue
        with zipfile.ZipFile(path) as wheel:
            for member in wheel.infolist():
                if _is_binary(member.filename) and member.file_size <= config.LIBRARY_BYTES_MAX:
                    yield f"{path.name.split('-')[0]}: {member.filename}", wheel.read(member)


def _installed() -> list[pathlib.Path]:
    found = [path for cache in CACHES for path in sorted(cache.rglob("*.cubin"))]
    for name in INSTALLED:
        spec = importlib.util.find_spec(name)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found += sorted(p for p in pathlib.Path(folder).rglob("*") if _is_binary(p.name))
    return [path for path in found if path.is_file() and not path.is_symlink()]


def _is_binary(name: str) -> bool:
    return name.endswith(SUFFIXES) or bool(re.search(r"\.so(\.\d+)*$", name))


def _disassembler() -> pathlib.Path | None:
    """The one that Triton's wheel has."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = pathlib.Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.exists() else None


def _version(tool: pathlib.Path) -> str:
    done = subprocess.run(
        [tool, "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def _disassemble(disassembler: pathlib.Path, cubin: bytes) -> list[str]:
    """What it complains of."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [disassembler, "-c", file.name],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DISASSEMBLE_S,
            check=False,
        )
    said = [line for line in done.stderr.splitlines() if line and not KNOWN_COMPLAINTS.search(line)]
    return [f"exit code {done.returncode}", *said] if done.returncode else said


def _line(found: dict[str, Any]) -> str:
    return (
        f"{found.get('file', 'total')[-60:]:60} {found['kernels']:6} kernels, "
        f"{found['entry_hooks']:6} entry, {found['exit_hooks']:6} exit, "
        f"{found['disassembled']:4} of {found['changed']:4} cubins disassembled, "
        f"{len(found['complaints'])} complaints, {len(found['proofs_failed'])} proofs failed"
    )


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ImageRefused as refused:
        print(f"instrument_corpus: {refused}", file=sys.stderr)
        raise SystemExit(refused.exit_code) from None
