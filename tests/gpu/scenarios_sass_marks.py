"""Scenarios of store marks in machine code: random kernels, forms of stores, and kernels whose control flow is not simple."""

from __future__ import annotations

import ctypes
import itertools
import pathlib
import random
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import splice_kernels
from hook_stage import HookStage, Shape
from scenarios_ptx import Stage
from stage import first_difference

from concordia import abi
from concordia.device.nvrtc import link_cubin
from concordia.instrument.proof import first_difference as unproven
from concordia.instrument.report import Hook, fill
from concordia.instrument.splice import Spliced, splice_cubin
from ptx_forms import FILE, FORMS, GENERIC, GENERIC_RANGE, KERNEL, MARK, RANGE
from ptx_generator import BLOCKS, BUFFER_BYTES, THREADS, Program, module

AT_ONCE = 30  # kernels in a module
WRONG_MAX = 20
ARCHITECTURE = "sm_90a"
SHIFTS = (16, 12)
FILLED = 0xEE  # no kernel of CASES stores it
CTAS, LANES = 40, 128
BYTES = 4 << 20
FAR_BYTES = 6 << 30
GENERATIONS = {"V1": splice_kernels.old_cubin, "V2": splice_kernels.new_cubin}

# Each stores bytes that are not FILLED below BYTES, the same whatever the order of threads; `i` is the thread, `n` the number of threads.
HEAD = """#undef KERNEL
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(128) name(unsigned char* base, unsigned n)
extern "C" int printf(const char*, ...);
typedef unsigned int u32; typedef unsigned long long u64;
#define PLACE unsigned i = blockIdx.x * blockDim.x + threadIdx.x; unsigned* words = (unsigned*)base;
"""
CASES = {
    "early_exits": "if (i % 3 == 0) return; if (i > n - 50) return; base[i * 701u] = 1; if (i % 5 == 2) return; base[i * 701u + 3] = 2;",
    "predicated": "unsigned x = i * 2654435761u; if (x & 64) base[i * 600u] = 3; if (x & 128) words[(i * 600u + 300) / 4] = 5; if (!(x & 3)) base[i * 600u + 599] = 7;",
    "divergent_loop": "for (unsigned k = 0; k < 50; ++k) { unsigned x = (i * 31 + k * 17) * 2654435761u; if ((x >> 28) == 0) break; if (x & 1 << 20) continue; base[(i * 50 + k) * 16] = x >> 24 & 127; }",
    "nested": "for (unsigned k = 0; k < i % 7; ++k) for (unsigned m = 0; m < (i >> 3) % 5; ++m) { if (k == m) words[i * 64 + k * 8 + m] = k + 1; else if (k + m == 4) base[i * 256 + 224 + m] = 9; }",
    "jump_table": "switch (i % 11) { case 0: words[i * 100] = 1; break; case 1: base[i * 400 + 7] = 1; break; case 2: ((float4*)base)[i * 25] = make_float4(1, 2, 3, 4); break;"
    " case 3: words[i * 100 + 3] = i; words[i * 100 + 9] = 2; case 4: base[i * 400 + 50] = 4; break; case 5: ((u64*)base)[i * 50] = 8; break; case 6: atomicAdd(words + i * 100, 4); break;"
    " case 7: atomicExch(words + i * 100 + 5, 6); break; case 8: ((unsigned short*)base)[i * 200] = 3; break; default: base[i * 400 + 399] = 5; }",
    "generic": "__shared__ unsigned tile[128]; unsigned local[4] = {i, 1, 2, 3}; tile[threadIdx.x] = 0; __syncthreads(); u32* where = i % 3 == 0 ? tile + threadIdx.x : i % 3 == 1 ? words + i * 128 : local + (i & 3);"
    " *where = 11; asm volatile(\"\" ::: \"memory\"); __syncthreads(); words[i * 128 + 64] = tile[threadIdx.x] + local[i & 3];",
    "atomics": "unsigned at = i * 256; unsigned x = atomicAdd(words + at / 4, 5); x = atomicMax(words + at / 4 + 1, ~0u - (x & 0)); atomicCAS(words + at / 4 + 2, 0xEEEEEEEEu, 9); words[at / 4 + 3] = x == 0xEEEEEEEEu;"
    " atomicAdd((float*)(base + at + 64), 0.f * x + 1e30f); u64 y = atomicExch((u64*)(base + at + 128), 77ull); if (y == 0xEEEEEEEEEEEEEEEEull) atomicAnd(words + at / 4 + 48, 15u);",
    "vectors": "((uint4*)base)[i * 32] = make_uint4(i, 1, 2, 3); ((uint2*)base)[i * 64 + 4] = make_uint2(4, i); ((ushort4*)base)[i * 64 + 6] = make_ushort4(1, 2, 3, 4);",
    "negative_offsets": "unsigned char* end = base + (i + 1) * 512; end[-1] = 1; end[-511] = 2; ((unsigned*)end)[-100] = 3; end = base + 4000000; if (i < 100) end[-(long long)i * 4096 - 4096] = 4;",
    "many_registers": "unsigned x[48]; for (int k = 0; k < 48; ++k) x[k] = words[(i * 48 + k) % 5000 + 900000] * (k + i); __syncthreads(); for (int k = 0; k < 48; ++k) words[i * 96 + k * 2] = (x[k] ^ x[47 - k] ^ x[(k * 7) % 48]) & 0xFFFF;",
    "shuffles": "unsigned x = i; for (int k = 16; k; k /= 2) { x += __shfl_xor_sync(~0u, x, k); if (threadIdx.x % 32 < k) words[i * 50 + k] = x; } if (__ballot_sync(~0u, x & 1)) words[i * 50 + 33] = __popc(__activemask());",
    "pipelined": "__shared__ unsigned tile[2][128]; unsigned t = threadIdx.x; for (int k = 0; k < 6; ++k) { unsigned at = (unsigned)__cvta_generic_to_shared(&tile[k & 1][t]);"
    " asm volatile(\"cp.async.ca.shared.global [%0], [%1], 4; cp.async.commit_group;\" :: \"r\"(at), \"l\"(words + 1000000 + (i * 6 + k) % 3000) : \"memory\");"
    " if (k) { asm volatile(\"cp.async.wait_group 1;\" ::: \"memory\"); words[i * 64 + k] = tile[(k + 1) & 1][t] + 1; } } asm volatile(\"cp.async.wait_group 0;\" ::: \"memory\");",
    "calls_the_driver": 'words[i * 90] = 1; if (i == n + 1) printf("%u", words[i]); words[i * 90 + 1] = i & 63;',
    "recursive": "unsigned stack[12]; int depth = 0; stack[depth++] = i % 64 + 64; while (depth) { unsigned node = stack[--depth]; words[i * 128 + node % 100] = node & 0x7F; if (node > 40 && depth < 10) { stack[depth++] = node / 2; stack[depth++] = node / 3; } }",
}
FAR = 'extern "C" __global__ void far(unsigned char* base, unsigned n) { unsigned i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) { base[(unsigned long long)i * 6400000ull + 5] = 1; base[(long long)(n - i) * 6400000ll - 77777] = 2; } }'


class MarkStage(HookStage):
    """With a window over a buffer, and a map."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.buffer = size, self.allocate(size)
        assert self.buffer % (1 << max(SHIFTS)) == 0
        self.map_bytes = (size >> min(SHIFTS)) + 1
        self.map = self.allocate(self.map_bytes)

    def track(self, begin: int, size: int) -> None:
        """Begin with an empty map and no counts."""
        self.clear()
        self.write(self.map, np.zeros(self.map_bytes, dtype=np.uint8))
        offsets = abi.CONTROL.offsets()
        self.write(self.control + offsets["window_base"], np.array([self.buffer + begin, size, self.map], dtype=np.uint64))

    def pages(self) -> set[int]:
        found = np.frombuffer(self.read(self.map, self.map_bytes), dtype=np.uint8)
        assert set(np.unique(found).tolist()) <= {0, 1}
        return set(np.flatnonzero(found).tolist())

    def hits(self) -> tuple[int, int]:
        """CTAs in and out."""
        block = np.frombuffer(self.read(self.control, abi.CONTROL_ALLOCATED_BYTES), dtype="<u8")
        step, end = abi.CONTROL_PROGRESS_STRIDE // 8, abi.CONTROL_PROGRESS_WORDS * abi.CONTROL_PROGRESS_STRIDE // 8
        entry, leaving = abi.CONTROL_ENTRY_OFFSET // 8, abi.CONTROL_EXIT_OFFSET // 8
        return int(block[entry : entry + end : step].sum()), int(block[leaving : leaving + end : step].sum())


def random_kernels(seed: int, count: int) -> dict[str, Any]:
    """Bytes and pages of random programs against their reference."""
    started, stage = time.monotonic(), Stage()
    wrong: list[str] = []
    marked = pages = 0
    for first in range(seed, seed + count, AT_ONCE):
        programs = [Program.random(f"kernel_{number}", number) for number in range(first, min(first + AT_ONCE, seed + count))]
        cubin = link_cubin([module(programs, "sm_90").encode()], name="random", architecture="sm_90")
        shift = SHIFTS[first // AT_ONCE % 2]
        spliced = _spliced(cubin, shift)
        has_marks = {kernel.name: Hook.MARKS in kernel.hooks for kernel in spliced.kernels}
        original, hooked = stage.load(cubin), stage.load(fill(spliced.cubin, spliced.slots, stage.control))
        for program, number in zip(programs, itertools.count(first)):
            if not has_marks[program.name]:
                continue
            expected, shape = program.written(), {"pointer": stage.buffer, "blocks": BLOCKS, "threads": THREADS}
            before = stage.launch(original, program.name, **shape)
            for window in _windows(number, shift):
                stage.track(window, stride=0)
                after = stage.launch(hooked, program.name, **shape)
                if difference := first_difference(before, after) or first_difference(bytes(expected.data), after):
                    wrong.append(f"seed {number}, window {window}: {difference}")
                if (found := stage.marked(stride=0)) != expected.pages(*window, shift):
                    wrong.append(f"seed {number}, window {window}, pages: {sorted(found ^ expected.pages(*window, shift))[:20]}")
                if stage.counts()[0] != BLOCKS:
                    wrong.append(f"seed {number}: counts {stage.counts()}")
                pages += len(found)
            marked += 1
        stage.unload(original)
        stage.unload(hooked)
        if len(wrong) > WRONG_MAX:
            break
    return {"marked": marked, "pages": pages, "wrong": wrong[:WRONG_MAX], "seconds": time.monotonic() - started}


def forms() -> dict[str, Any]:
    """One thread (a matrix needs a warp) runs each form on the first bytes of a page."""
    stage, page, ran = Stage(), 5, 0
    wrong: list[str] = []
    # The variable is outside of the window.
    marking = {MARK, GENERIC, RANGE, GENERIC_RANGE}
    chosen = [form[0] for form in FORMS if ARCHITECTURE in form[1] and form[2] in marking and "table" not in form[0]]
    kernels = [KERNEL.format(name=f"form_{number}", instruction=instruction) for number, instruction in enumerate(chosen)]
    cubin = link_cubin([(FILE.format(target=ARCHITECTURE) + "".join(kernels)).encode()], name="forms", architecture=ARCHITECTURE)
    spliced = _spliced(cubin, 16)
    has_marks = {kernel.name: Hook.MARKS in kernel.hooks for kernel in spliced.kernels}
    original, hooked = stage.load(cubin), stage.load(fill(spliced.cubin, spliced.slots, stage.control))
    for number, instruction in enumerate(chosen):
        name = f"form_{number}"
        if not has_marks[name]:
            continue
        shape = {"pointer": stage.buffer + (page << 16), "blocks": 1, "threads": 32 if "wmma" in instruction else 1}
        stage.track((0, BUFFER_BYTES), stride=0)
        before, after = stage.launch(original, name, **shape), stage.launch(hooked, name, **shape)
        if difference := first_difference(before, after):
            wrong.append(f"{instruction}: {difference}")
        pages = set() if instruction.startswith("@%p1") else {page - 1} if "+ -4" in instruction else {page}
        if (found := stage.marked(stride=0)) != pages:
            wrong.append(f"{instruction}: pages {sorted(found)}")
        ran += 1
    return {"forms": ran, "wrong": wrong}


def cases() -> dict[str, Any]:
    """Kernels of CASES: the same bytes with and without marks, and exactly the pages whose bytes changed."""
    stage = MarkStage(BYTES)
    text = HEAD + "".join(f"KERNEL({name}) {{ PLACE {body} }}\n" for name, body in CASES.items())
    cubin = link_cubin([splice_kernels.compiled(text)], name="cases", architecture="sm_90")
    shape, wrong, marked = Shape((CTAS, 1, 1), (LANES, 1, 1)), [], 0
    arguments = [ctypes.c_uint64(stage.buffer), ctypes.c_uint32(CTAS * LANES)]
    filled = np.full(BYTES, FILLED, dtype=np.uint8)

    def launched(function: Any) -> bytes:
        stage.write(stage.buffer, filled)
        stage.launch(function, shape, arguments)
        stage.wait()
        return stage.read(stage.buffer, BYTES)

    for shift in SHIFTS:
        spliced = _spliced(cubin, shift)
        image = fill(spliced.cubin, spliced.slots, stage.control)
        for kernel in spliced.kernels:
            if Hook.MARKS not in kernel.hooks:
                wrong.append(f"{kernel.name}: {kernel.reason}")
                continue
            marked += 1
            before, function = launched(stage.function(cubin, kernel.name)), stage.function(image, kernel.name)
            changed = np.frombuffer(before, dtype=np.uint8) != FILLED
            for begin, size in ((0, BYTES), (1 << 20, 1 << 20), (0, 0)):
                stage.track(begin, size)
                after = launched(function)
                if difference := first_difference(before, after):
                    wrong.append(f"{kernel.name}, {shift}: {difference}")
                inside = changed[begin : begin + size].reshape(-1, 1 << shift).any(axis=1)
                wanted = set(np.flatnonzero(inside).tolist())
                if (found := stage.pages()) != wanted:
                    wrong.append(f"{kernel.name}, {shift}, window {begin}+{size}: not {sorted(wanted - found)[:9]}, beyond {sorted(found - wanted)[:9]}")
                if stage.hits()[0] != CTAS:
                    wrong.append(f"{kernel.name}: counts {stage.hits()}")
    return {"marked": marked, "wrong": wrong}


def far_offsets() -> dict[str, Any]:
    """Stores up to 6 GiB behind the begin of a window."""
    stage, count, shift = MarkStage(FAR_BYTES), 1000, 16
    cubin = link_cubin([splice_kernels.compiled(FAR)], name="far", architecture="sm_90")
    spliced = _spliced(cubin, shift)
    function = stage.function(fill(spliced.cubin, spliced.slots, stage.control), "far")
    offsets = [i * 6400000 + 5 for i in range(count)] + [(count - i) * 6400000 - 77777 for i in range(count)]
    answer = []
    for begin, size in ((0, FAR_BYTES), (1 << 32, 1 << 30), (6300000000 >> 16 << 16, 1 << 27)):
        stage.track(begin, size)
        stage.launch(function, Shape((8, 1, 1), (128, 1, 1)), [ctypes.c_uint64(stage.buffer), ctypes.c_uint32(count)])
        stage.wait()
        wanted = {at - begin >> shift for at in offsets if begin <= at < begin + size}
        found = stage.pages()
        answer.append({"wanted": len(wanted), "wrong": sorted(found ^ wanted)[:9]})
    bytes_wrong = [at for at in offsets[:: count // 20] if stage.read(stage.buffer + at, 1)[0] not in (1, 2)]
    return {"windows": answer, "bytes_wrong": bytes_wrong}


def kernels_of_hooks() -> dict[str, Any]:
    """The kernels that hooks are tested with, of both generations: the same bytes, launched and in a graph; no page is missed."""
    stage, wrong, marked, left = MarkStage(2 * BYTES), [], 0, {}
    for generation, maker in GENERATIONS.items():
        for case in splice_kernels.KERNELS:
            name = f"{case.name} {generation}"
            # What hangs in a driver call is the last line that is read of this process.
            print(name, flush=True)
            cubin = maker(case.name)
            spliced = _spliced(cubin, 12)
            (kernel,) = (kernel for kernel in spliced.kernels if kernel.name == case.name)
            if Hook.MARKS not in kernel.hooks:
                left[name] = kernel.reason
                continue
            marked += 1
            wrong += _compare(stage, name, case, cubin, spliced)
    return {"marked": marked, "left": left, "wrong": wrong}


def _compare(stage: MarkStage, name: str, case: splice_kernels.Kernel, cubin: bytes, spliced: Spliced) -> list[str]:
    words = case.words
    assert 8 * words <= stage.size
    inputs = np.random.default_rng(words).integers(0, 1 << 32, words, dtype=np.uint32)
    begin = case.begin(inputs)
    target, source = stage.buffer, stage.buffer + stage.size // 2
    shape = Shape(case.grid, case.block, launch=case.launch)
    arguments = [ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_uint32(case.count)]
    outputs: dict[str, bytes] = {}
    pages: dict[str, set[int]] = {}
    image = fill(spliced.cubin, spliced.slots, stage.control)
    stage.write(source, inputs)
    for form, code in (("original", cubin), ("marked", image)):
        function = stage.function(code, case.name)
        for how in ("launched", "in a graph"):
            run = f"{name}, {form}, {how}"
            stage.write(target, begin)
            stage.track(0, stage.size)
            if how == "launched":
                stage.launch(function, shape, arguments)
            else:
                stage.replay(stage.graph(lambda function=function: stage.launch(function, shape, arguments)))
            stage.wait(run)
            outputs[run] = stage.read(target, 4 * words)
            pages[run] = stage.pages()
    first = next(iter(outputs.values()))
    wrong = [f"{run}: {difference}" for run, output in outputs.items() if (difference := first_difference(first, output))]
    changed = np.flatnonzero(np.frombuffer(first, dtype="<u4") != begin) * 4 >> 12
    for run, found in pages.items():
        wanted = set(changed.tolist()) if "marked" in run else set()
        if missed := wanted - found:
            wrong.append(f"{run}: pages {sorted(missed)[:9]} are not marked")
    return wrong


def _spliced(cubin: bytes, shift: int) -> Spliced:
    """With entry and exit hooks and marks."""
    spliced = splice_cubin(cubin, entry=True, exit=True, marks=shift)
    wrong = unproven(cubin, spliced.cubin, shift)
    assert wrong is None, wrong
    return spliced


def _windows(seed: int, shift: int) -> list[tuple[int, int]]:
    """All of the buffer, a part of whole pages, none."""
    rng, pages = random.Random(seed), BUFFER_BYTES >> shift
    begin = rng.randrange(pages)
    return [(0, BUFFER_BYTES), (begin << shift, rng.randrange(1, pages - begin + 1) << shift), (begin << shift, 0)]
