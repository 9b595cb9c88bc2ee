"""What `concordia run` adds to the start of a program, by part; no GPU is needed.

  launcher_s        seconds that `concordia run --hooks entry -- true` takes longer than `true`
  gpu_question_s    of these, where there is a GPU whose model was not asked for before
  find_gb_per_s     an image in memory: that all of it can be read
  key_gb_per_s      its key: XXH3, 128 bits
  checksum_gb_per_s the CRC32C of a file of the cache
  load_gb_per_s     such a file becomes an image: memory, read, checksum, table and slots

The last four by the shim's own files, on images that the page cache has. Where no driver is
installed the launcher stands before the one of the tests.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Final

from figures import Figures, figure, gb_per_s, save

from concordia.errors import ConcordiaError, EnvironmentRefused
from concordia.instrument.cache import ImageCache, image_key, key_halves
from concordia.instrument.report import Rewritten, Slot, SlotKind
from concordia.integrations.program import architecture
from concordia.integrations.program.driver import SONAME, find_driver
from concordia.integrations.program.native_build import FLAGS, NATIVE, compile_c, find_compiler
from concordia.testing.command import Parser, count, file_in_folder, run_command

HERE: Final = pathlib.Path(__file__).resolve().parent
RESULTS: Final = HERE / "results" / "start_cost_cpu.json"
DRIVER: Final = HERE.parent / "tests" / "native"
PARTS: Final = (
    *("images.c", "key.c", "hash.c", "cache_file.c", "rewriter.c", "process_settings.c"),
)
IMAGE_BYTES: Final = 5 << 20  # a container of PyTorch with its kernels for one architecture
IMAGES: Final = 40
READY: Final = 4  # of enum cache_answer
RUN_S: Final = 60.0
SEED: Final = 3


class CImage(ctypes.Structure):
    """struct image of native/shim.h."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("bytes", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("wrapper", ctypes.c_void_p),
    )


class CReplacement(ctypes.Structure):
    """struct replacement of native/shim.h."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("control", "memory", "memory_bytes", "image", "image_bytes", "wrapper"),
            *("kernels", "kernels_bytes", "kernel_count"),
        )
    )


def compile_parts(folder: pathlib.Path) -> ctypes.CDLL:
    """The shim's files that look at images, as a library of their own."""
    path = folder / "parts.so"
    files = [str(NATIVE / name) for name in PARTS]
    line = [find_compiler(), *FLAGS, "-fPIC", "-shared", f"-I{NATIVE}", *files, "-o", str(path)]
    compile_c("parts of the shim", line)
    return ctypes.CDLL(str(path))


def measure_images(folder: pathlib.Path) -> Figures:
    """The figures in GB/s, each over all images once."""
    parts, source = compile_parts(folder), random.Random(SEED)
    cache = ImageCache(folder / "images", "options")
    times: dict[str, list[float]] = defaultdict(list)
    keys = []

    def timed(name: str, call: Callable[[], int], expected: int | None = None) -> None:
        begun = time.perf_counter()
        found = call()
        times[name].append(time.perf_counter() - begun)
        if expected is not None and found != expected:
            raise ConcordiaError(f"{name}: {found}, not {expected}")

    for index in range(IMAGES):
        body = source.randbytes(IMAGE_BYTES - 16)
        image = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
        path = folder / f"image{index}"
        path.write_bytes(image)
        name = image_key(image)
        slots = (Slot(640, SlotKind.RAW),)
        cache.store(name, Rewritten(image, slots, (), is_changed=True))
        key, found, size = (ctypes.c_uint64 * 2)(), CImage(), ctypes.c_uint64(len(image))
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as memory:
            at = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
            out = ctypes.byref(found)
            timed("find", lambda at=at, out=out: parts.image_find(at, out), 1)
            timed("key", lambda at=at, size=size, key=key: parts.hash_image(at, size, key))
            timed("checksum", lambda at=at, size=size: parts.hash_crc32c(at, size))
        if tuple(key) != key_halves(name):
            raise ConcordiaError(f"the key is {name}, not {key[0]:016x}{key[1]:016x}")
        keys.append(key)
    where, control = os.fsencode(cache.folder), ctypes.c_uint64(1 << 40)
    found = CReplacement()
    for key in keys:  # not released: a program keeps its images, too
        out = ctypes.byref(found)
        timed("load", lambda key=key, out=out: parts.cache_load(where, key, control, out), READY)
    return {f"{name}_gb_per_s": gb_per_s(IMAGE_BYTES, found) for name, found in times.items()}


def stand_in_driver(folder: pathlib.Path) -> str:
    """LD_LIBRARY_PATH with a driver in it."""
    search = os.environ.get("LD_LIBRARY_PATH", "")
    try:
        find_driver()
    except EnvironmentRefused:
        sources = [str(DRIVER / f"fake_{name}.c") for name in ("driver", "modules", "streams")]
        kind = ("-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,-soname,{SONAME},-Bsymbolic")
        path = folder / SONAME
        line = [find_compiler(), "-std=gnu11", *kind, *sources, "-pthread", "-o", str(path)]
        compile_c("a driver", line)
        return f"{folder}:{search}" if search else str(folder)
    return search


def measure_launcher(folder: pathlib.Path, rounds: int) -> Figures:
    """launcher_s, gpu_question_s."""
    environment = os.environ | {
        "LD_LIBRARY_PATH": stand_in_driver(folder),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]),
        "CONCORDIA_CACHE": str(folder / "cache"),
        "CONCORDIA_RUN_DIR": str(folder / "run"),
    }
    front = [sys.executable, "-m", "concordia.cli", "run", "--hooks", "entry", "--"]

    def seconds(line: list[str]) -> float:
        begun = time.perf_counter()
        # its end is that of its output: a plain wait with a bound looks every 50 ms
        subprocess.run(line, env=environment, check=True, timeout=RUN_S, capture_output=True)
        return time.perf_counter() - begun

    seconds([*front, "true"])  # compiles the shim
    found = [seconds([*front, "true"]) - seconds(["true"]) for _ in range(rounds)]
    figures = {"launcher_s": figure(found, "s", digits=4)}
    begun = time.perf_counter()
    if architecture._asked() is not None:
        figures["gpu_question_s"] = figure([time.perf_counter() - begun], "s", digits=4)
    return figures


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=count, default=15, help="starts of the launcher")
    parser.add_argument("--output", type=file_in_folder, default=RESULTS)
    options: argparse.Namespace = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="cnc-", dir="/tmp") as name:
        folder = pathlib.Path(name)
        save(options.output, measure_launcher(folder, options.rounds) | measure_images(folder))
    return 0


if __name__ == "__main__":
    run_command(main)
