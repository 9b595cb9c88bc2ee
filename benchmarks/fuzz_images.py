"""Every parser that reads what a stranger made: fatbins, cubins, PTX, cache files, requests.

Mutated inputs, from a corpus that grows by what goes new ways; each in a bounded child. What is
not survived is made small and kept in --crashes, and its error, the seed and the counts are in the
result file. Exit 0 without a crash, 1 with one, 2 for wrong arguments. `--input FILE --target NAME`
runs one input again. No GPU.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import google_crc32c
from fuzzing import Crash, Pool, Target, fuzz_slice, minimise, read_corpus, run_alone

import concordia
from concordia.errors import ImageRefused
from concordia.instrument import rewrite as rewrite_room
from concordia.instrument.cache import HEADER_BYTES, decode, encode
from concordia.instrument.image import Image, ImageKind, read_image
from concordia.instrument.library_file import images_in
from concordia.instrument.options import Options
from concordia.instrument.proof import first_difference
from concordia.instrument.ptx import read_text, rewrite_ptx
from concordia.instrument.report import Rewritten, fill
from concordia.instrument.request import Request
from concordia.instrument.splice import splice_cubin
from concordia.testing.command import Parser, result_file, run_command
from concordia.testing.machine import machine

ROOT: Final = pathlib.Path(__file__).resolve().parent.parent
CORPUS: Final = ROOT / "tests" / "corpus" / "fuzz"
INSTRUMENT: Final = pathlib.Path(concordia.__file__).parent / "instrument"
SLICE_S: Final = 10.0  # of one target, before the next one's turn
CRASHES_MAX: Final = 50  # a parser with so many is read, not fuzzed
_CONTROL: Final = 0x7F00_1234_5600
_KEY: Final = "0123456789abcdef" * 2  # of an image that is not looked for
_CACHE_KEY: Final = struct.Struct("<48x2Q")  # in the header of a file


class Broken(Exception):
    """A parser took an input, and what came of it breaks a promise."""


def main(arguments: Sequence[str]) -> int:
    """Fuzz for --seconds, or run one input."""
    asked = _parser().parse_args(arguments)
    # The assembler is not ours, and takes longer than everything that is.
    rewrite_room.is_assembled = lambda *_: True
    targets = [TARGETS[name] for name in asked.target or TARGETS]
    if asked.input is not None:
        return _run_inputs(targets, asked.input)
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    found = fuzz(targets, seed=seed, seconds=asked.seconds, folder=asked.crashes)
    if asked.output is not None:
        _add_run(asked.output, found)
    print(json.dumps({name: found[name] for name in ("inputs", "kept", "edges", "crashes")}))
    return 1 if found["crashes"] else 0


def fuzz(
    targets: Sequence[Target], *, seed: int, seconds: float, folder: pathlib.Path | None
) -> dict[str, object]:
    """Rounds over the targets, until the time is over: what the result file says."""
    rng = random.Random(seed)
    pools = {target.name: Pool(list(read_corpus(CORPUS / target.name))) for target in targets}
    inputs: Counter[str] = Counter()
    crashes: dict[tuple[str, str], str | None] = {}
    tree = machine()  # of the code that runs; the files may change meanwhile
    begun = time.monotonic()
    for target in targets:  # first the corpus as it is
        for data in pools[target.name].inputs:
            error = run_alone(target, data)
            if error is not None:
                crashes[target.name, error] = _keep(Crash(target.name, error, data), folder)
    while (left := begun + seconds - time.monotonic()) > 0 and len(crashes) < CRASHES_MAX:
        for target in targets:
            pool = pools[target.name]
            share = min(SLICE_S, left / len(targets))
            done = fuzz_slice(target, pool, seed=rng.randrange(1 << 63), seconds=share)
            inputs[target.name] += done.inputs
            pool.inputs += done.kept
            pool.edges |= done.edges
            crash = done.crash
            if crash is not None and (crash.target, crash.error) not in crashes:
                crashes[crash.target, crash.error] = _keep(minimise(target, crash), folder)
    return {
        "machine": tree,
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
        "inputs": dict(inputs),
        "kept": {name: len(pool.inputs) for name, pool in pools.items()},
        "edges": {name: len(pool.edges) for name, pool in pools.items()},
        "crashes": [
            {"target": name, "error": error, "file": file}
            for (name, error), file in crashes.items()
        ],
    }


def _add_run(path: pathlib.Path, run: dict[str, object]) -> None:
    """Put a run behind those that a result file has."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    found["runs"].append(run)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _keep(crash: Crash, folder: pathlib.Path | None) -> str | None:
    print(f"{crash.target}: {crash.error}: {len(crash.data)} bytes", flush=True)
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{crash.target}-{hashlib.sha256(crash.data).hexdigest()[:12]}"
    (folder / name).write_bytes(crash.data)
    return name


def _run_inputs(targets: Sequence[Target], path: pathlib.Path) -> int:
    errors = {target.name: run_alone(target, path.read_bytes()) for target in targets}
    for name, error in errors.items():
        print(f"{name}: {error or 'survived'}")
    return 1 if any(errors.values()) else 0


def _check(rewritten: Rewritten, original: bytes) -> None:
    """Raises Broken unless the result can be stored, read and filled in."""
    try:
        stored = decode(encode(rewritten, _KEY), _KEY)
    except ImageRefused as error:
        raise Broken(f"cannot be stored: {error}") from error
    if not rewritten.is_changed and rewritten.image != original:
        raise Broken("differs, and says that it was not changed")
    if stored.slots != rewritten.slots:
        raise Broken("the slots differ")
    fill(rewritten.image, rewritten.slots, _CONTROL)


def _fatbin(data: bytes) -> None:
    try:
        image = read_image(data)
    except ImageRefused:
        return
    payloads = {}
    for entry in image.entries:
        try:
            payload = image.payload(entry.index)
        except ImageRefused:
            continue
        if payload:  # nothing is never put in place of something
            payloads[entry.index] = payload
    rebuilt = image.rebuild(payloads)
    if image.kind is ImageKind.FATBIN:
        _check_rebuilt(read_image(rebuilt.data), payloads)
    for index, at in rebuilt.offsets.items():
        if rebuilt.data[at : at + len(payloads[index])] != payloads[index]:
            raise Broken(f"entry {index} is not where it is said to be")


def _check_rebuilt(again: Image, payloads: dict[int, bytes]) -> None:
    for index, payload in payloads.items():
        if not again.payload(index).startswith(payload.rstrip(b"\0")):
            raise Broken(f"entry {index} is another one")


def _cubin(data: bytes) -> None:
    try:
        marks = (None, 16, 21)[len(data) % 3]
        done = splice_cubin(data, entry=True, exit=True, marks=marks)
    except ImageRefused:
        return
    is_changed = any(kernel.hooks.is_hooked for kernel in done.kernels)
    wrong = first_difference(data, done.cubin, marks)
    if wrong is not None:
        raise Broken(f"not the original: {wrong}")
    _check(Rewritten(done.cubin, done.slots, done.kernels, is_changed), data)


def _ptx(data: bytes) -> None:
    try:
        text = read_text(data)
        done = rewrite_ptx(text, entry=True, exit=True, marks=True)
    except ImageRefused:
        return
    is_changed = done.text != text
    _check(Rewritten(done.text.encode(), done.slots, done.kernels, is_changed), text.encode())


def _cache(data: bytes) -> None:
    try:
        key = "".join(f"{half:016x}" for half in _CACHE_KEY.unpack_from(data.ljust(HEADER_BYTES)))
        found = decode(data, key)
    except ImageRefused:
        return
    if found.is_changed:
        fill(found.image, found.slots, _CONTROL)
    if len(encode(found, key)) != len(data):
        raise Broken("a file that encode would not write")


def _request(data: bytes) -> None:
    try:
        found = Request.parse(data)
    except ImageRefused:
        return
    if found.pack() != data:
        raise Broken("another request when it is packed again")


def _library(data: bytes) -> None:
    try:
        found = images_in(data)
    except ImageRefused:
        return
    for one in found:
        if data[one.offset : one.offset + len(one.image.data)] != one.image.data:
            raise Broken(f"no image at {one.offset}")


def _rewrite(data: bytes) -> None:
    arch = (80, 90, 90, 90, 100)[len(data) % 5]
    asked = Options(arch=arch, exit=bool(len(data) % 2), sass_marks=len(data) % 3 == 0)
    done = rewrite_room.rewrite(data, asked)
    _check(done, data)
    if done.is_changed:
        try:
            read_image(done.image)
        except ImageRefused as error:
            raise Broken(f"cannot be read again: {error}") from error


def _mend_cache(data: bytes) -> bytes:
    """With the checksum and the length of the image that it should have."""
    if len(data) < HEADER_BYTES:
        return data
    body, fields = data[HEADER_BYTES:], list(struct.unpack_from("<8sIIQIIQI20s", data))
    rest = len(body) - fields[4] * 16 - fields[6]
    fields[3] = rest if rest >= 0 else fields[3]
    fields[7] = google_crc32c.value(body)
    return struct.pack("<8sIIQIIQI20s", *fields) + body


def _mend_fatbin(data: bytes) -> bytes:
    """With the length that the container should say."""
    return data[:8] + struct.pack("<Q", len(data) - 16) + data[16:] if len(data) >= 16 else data


def _target(
    name: str, run: Callable[[bytes], None], mend: Callable[[bytes], bytes] | None = None
) -> Target:
    return Target(name, run, INSTRUMENT, mend)


TARGETS: Final = {
    target.name: target
    for target in (
        _target("fatbin", _fatbin, _mend_fatbin),
        _target("cubin", _cubin),
        _target("ptx", _ptx),
        _target("cache", _cache, _mend_cache),
        _target("request", _request),
        _target("library", _library),
        _target("rewrite", _rewrite, _mend_fatbin),
    )
}


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--seed", type=int, help="of a run before; by default a new one")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be given again")
    parser.add_argument("--input", type=pathlib.Path, help="run this one alone")
    parser.add_argument(
        "--crashes", type=pathlib.Path, default=pathlib.Path("fuzz-crashes"), metavar="FOLDER"
    )
    parser.add_argument(
        "--output", type=result_file("runs"), metavar="FILE", help="result file to add this run to"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
