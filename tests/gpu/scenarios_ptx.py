"""Scenarios of rewritten PTX: random kernels against their reference, and every form of store that one GPU can run."""

from __future__ import annotations

import ctypes
import itertools
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from hook_stage import wait_for
from stage import first_difference

from concordia import abi
from concordia.device.cuda_call import checked
from concordia.device.cuda_context import CudaContext
from concordia.instrument.ptx import rewrite_ptx
from concordia.instrument.report import fill
from ptx_forms import FILE, FORMS, GENERIC, GENERIC_RANGE, KERNEL, MARK, RANGE
from ptx_generator import BLOCKS, BUFFER_BYTES, PAGE_SHIFT, THREADS, Program, module, windows

CONTROL_BYTES = 1 << 16
COPIES = abi.CONTROL_MAP_COPIES
STRIDE = 4096 + 128  # of the copies of the map
AT_ONCE = 20  # kernels in a module: less to load
WRONG_MAX = 20


class Stage:
    """A buffer, a control block and a map in device memory, and launches over them."""

    def __init__(self) -> None:
        self.context = CudaContext(0)
        self.driver = self.context.driver
        checked(self.driver.cuCtxSetCurrent(self.context.handle), "make the context current")
        self.buffer, self.control, self.map = (self._allocate(size) for size in (BUFFER_BYTES, CONTROL_BYTES, COPIES * STRIDE))
        self.major = int(checked(self.driver.cuDeviceGetAttribute(self.driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self.context.device), "ask for the architecture"))

    def _allocate(self, size: int) -> int:
        return int(checked(self.driver.cuMemAlloc(size), "allocate"))

    def load(self, text: bytes) -> Any:
        return checked(self.driver.cuModuleLoadData(text + b"\0"), "load PTX")

    def unload(self, loaded: Any) -> None:
        checked(self.driver.cuModuleUnload(loaded), "unload PTX")

    def launch(self, loaded: Any, name: str, *, pointer: int, blocks: int, threads: int) -> bytes:
        """The buffer after one launch over zeroes."""
        checked(self.driver.cuMemsetD8(self.buffer, 0, BUFFER_BYTES), "clear")
        function = checked(self.driver.cuModuleGetFunction(loaded, name.encode()), f"find {name}")
        value = ctypes.c_uint64(pointer)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(value))
        checked(self.driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, 0, ctypes.addressof(arguments), 0), f"launch {name}")
        wait_for(self.driver, 0, name)
        return self._read(self.buffer, BUFFER_BYTES)

    def track(self, window: tuple[int, int], *, stride: int) -> None:
        """Begin with an empty map and no counts. Without a stride all marks go into the first copy."""
        checked(self.driver.cuMemsetD8(self.control, 0, CONTROL_BYTES), "clear")
        checked(self.driver.cuMemsetD8(self.map, 0, COPIES * STRIDE), "clear")
        words = (0, self.buffer + window[0], window[1], self.map, 0, COPIES - 1 << 32 | stride)
        raw = b"".join(word.to_bytes(8, "little") for word in words)
        source = ctypes.create_string_buffer(raw, len(raw))
        checked(self.driver.cuMemcpyHtoD(self.control, ctypes.addressof(source), len(raw)), "write the window")

    def marked(self, *, stride: int) -> set[int]:
        found = self._read(self.map, COPIES * STRIDE)
        pages = {at for at, byte in enumerate(found) if byte}
        assert set(found) <= {0, 1}
        return {page % stride for page in pages} if stride else pages

    def counts(self) -> tuple[int, int]:
        """Blocks that came in and went out."""
        words = self._read(self.control, CONTROL_BYTES)
        entries, exits = (sum(int.from_bytes(words[at : at + 8], "little") for at in range(begin, begin + 256 * 64, 64)) for begin in (0x100, 0x4100))
        return entries, exits

    def _read(self, address: int, size: int) -> bytes:
        found = ctypes.create_string_buffer(size)
        checked(self.driver.cuMemcpyDtoH(ctypes.addressof(found), address, size), "read")
        return found.raw


def random_kernels(seed: int, count: int) -> dict[str, Any]:
    """Bytes and pages of `count` programs, with and without hooks."""
    started = time.monotonic()
    stage = Stage()
    wrong: list[str] = []
    done = pages = 0
    for turn, first in enumerate(range(seed, seed + count, AT_ONCE)):
        has_bulk = stage.major >= 9 and turn % 2 == 1
        stride = STRIDE if turn % 4 >= 2 else 0
        programs = [Program.random(f"kernel_{number}", number, has_bulk=has_bulk) for number in range(first, min(first + AT_ONCE, seed + count))]
        text = module(programs, "sm_90" if has_bulk else "sm_80")
        rewritten = rewrite_ptx(text, entry=True, exit=True, marks=True)
        assert all(kernel.hooks.is_hooked and not kernel.reason for kernel in rewritten.kernels)
        original, hooked = stage.load(text.encode()), stage.load(fill(rewritten.text.encode(), rewritten.slots, stage.control))
        for program, number in zip(programs, itertools.count(first)):
            expected = program.written()
            shape = {"pointer": stage.buffer, "blocks": BLOCKS, "threads": THREADS}
            before = stage.launch(original, program.name, **shape)
            if difference := first_difference(bytes(expected.data), before):
                wrong.append(f"seed {number}, original: {difference}")
            for window in itertools.islice(windows(number), 3):
                stage.track(window, stride=stride)
                after = stage.launch(hooked, program.name, **shape)
                if difference := first_difference(before, after):
                    wrong.append(f"seed {number}, window {window}: {difference}")
                if (found := stage.marked(stride=stride)) != expected.pages(*window):
                    wrong.append(f"seed {number}, window {window}, pages: {sorted(found ^ expected.pages(*window))}")
                if stage.counts() != (BLOCKS, BLOCKS):
                    wrong.append(f"seed {number}: counts {stage.counts()}")
                pages += len(found)
            done += 1
        stage.unload(original)
        stage.unload(hooked)
        if len(wrong) > WRONG_MAX:
            break
    return {"programs": done, "pages": pages, "wrong": wrong[:WRONG_MAX], "seconds": time.monotonic() - started}


def forms() -> dict[str, Any]:
    """One thread (a matrix needs a warp) runs each form on the first bytes of a page."""
    stage = Stage()
    page = 5
    target = {8: "sm_80", 9: "sm_90a", 10: "sm_100"}.get(stage.major, "sm_80")
    wrong: list[str] = []
    ran = 0
    for instruction, targets, expected in FORMS:
        # The variable is outside of the window; what a discarded line holds is anybody's guess; shared memory that is copied was not written.
        if target not in targets or expected not in {MARK, GENERIC, RANGE, GENERIC_RANGE} or "table" in instruction:
            continue
        # A block must not end before what was copied out of its shared memory was read.
        waiting = " cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" if "cp." in instruction else ""
        text = FILE.format(target=target) + KERNEL.format(name="kernel", instruction=instruction + waiting)
        rewritten = rewrite_ptx(text, entry=True, exit=True, marks=True)
        original, hooked = stage.load(text.encode()), stage.load(fill(rewritten.text.encode(), rewritten.slots, stage.control))
        shape = {"pointer": stage.buffer + (page << PAGE_SHIFT), "blocks": 1, "threads": 32 if "wmma" in instruction else 1}
        stage.track((0, BUFFER_BYTES), stride=STRIDE)
        before, after = stage.launch(original, "kernel", **shape), stage.launch(hooked, "kernel", **shape)
        has_same_bytes = not instruction.startswith("discard") and "cp." not in instruction
        if has_same_bytes and (difference := first_difference(before, after)):
            wrong.append(f"{instruction}: {difference}")
        pages = set() if instruction.startswith("@%p1") else {page - 1} if "+ -4" in instruction else {page}
        if (found := stage.marked(stride=STRIDE)) != pages or stage.counts() != (1, 1):
            wrong.append(f"{instruction}: pages {sorted(found)}, counts {stage.counts()}")
        ran += 1
        stage.unload(original)
        stage.unload(hooked)
    return {"forms": ran, "wrong": wrong}
