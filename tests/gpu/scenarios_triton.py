"""Scenarios of kernels whose hooks an assembler compiled: random kernels against their reference, with their word filled in and left 0."""

from __future__ import annotations

import itertools
import pathlib
import subprocess
import tempfile
import time
from typing import Any

from scenarios_ptx import AT_ONCE, STRIDE, WRONG_MAX, Stage
from stage import first_difference

from concordia.instrument.options import Options
from concordia.instrument.report import Hook, fill
from concordia.instrument.rewrite import rewrite
from ptx_generator import BLOCKS, PAGE_SHIFT, THREADS, Program, module, windows

ASSEMBLE_S = 60.0


def assembled(text: bytes) -> bytes:
    """By the assembler that Triton has for this GPU."""
    import torch
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = torch.cuda.get_device_capability(0)
    number = 10 * major + minor
    with tempfile.TemporaryDirectory() as folder:
        source, made = pathlib.Path(folder, "text.ptx"), pathlib.Path(folder, "cubin")
        source.write_bytes(text)
        words = [get_ptxas(number).path, f"--gpu-name=sm_{number}{'a' if number >= 90 else ''}", str(source), "-o", str(made)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=ASSEMBLE_S, check=False)
        assert done.returncode == 0, done.stderr
        return made.read_bytes()


def random_kernels(seed: int, count: int) -> dict[str, Any]:
    """Bytes, pages and counts of `count` programs."""
    started = time.monotonic()
    stage = Stage()
    options = Options(arch=90, entry=True, exit=True, marks=True, page_shift=PAGE_SHIFT)
    assembler = Options(arch=90, entry=True, exit=True, marks=True, page_shift=PAGE_SHIFT, assembler=True)
    wrong: list[str] = []
    done = pages = 0
    for turn, first in enumerate(range(seed, seed + count, AT_ONCE)):
        programs = [Program.random(f"kernel_{number}", number, has_bulk=turn % 2 == 1) for number in range(first, min(first + AT_ONCE, seed + count))]
        text = module(programs, "sm_90").encode()
        cubin = assembled(rewrite(text, assembler).image)
        taken = rewrite(cubin, options)
        assert all(kernel.hooks & Hook.MARKS and not kernel.reason for kernel in taken.kernels), taken.kernels
        original, empty = stage.load(text), stage.load(cubin)
        hooked = stage.load(fill(taken.image, taken.slots, stage.control))
        for program, number in zip(programs, itertools.count(first)):
            shape = {"pointer": stage.buffer, "blocks": BLOCKS, "threads": THREADS}
            before = stage.launch(original, program.name, **shape)
            for window in itertools.islice(windows(number), 3):
                expected = program.written().pages(*window)
                for loaded, wanted, blocks in ((hooked, expected, BLOCKS), (empty, set(), 0)):
                    stage.track(window, stride=STRIDE)
                    after = stage.launch(loaded, program.name, **shape)
                    where = f"seed {number}, window {window}, {'empty' if loaded is empty else 'hooked'}"
                    if difference := first_difference(before, after):
                        wrong.append(f"{where}: {difference}")
                    if (found := stage.marked(stride=STRIDE)) != wanted or stage.counts() != (blocks, blocks):
                        wrong.append(f"{where}: pages {sorted(found ^ wanted)}, counts {stage.counts()}")
                pages += len(expected)
            done += 1
        for loaded in (original, empty, hooked):
            stage.unload(loaded)
        if len(wrong) > WRONG_MAX:
            break
    return {"programs": done, "pages": pages, "wrong": wrong[:WRONG_MAX], "seconds": time.monotonic() - started}
