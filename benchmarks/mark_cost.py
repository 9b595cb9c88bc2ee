"""What store marks in PTX cost a kernel that waits for memory.

Owns: Triton kernels that read and write 1 GiB arrays, as Triton compiles them and with hooks, each
loaded by the driver and launched in turn in one process: texts that the driver compiles, and what
Triton's own assembler makes of them, which is what `concordia run` gives a Triton program.
Promises: a ratio is of two launches one after the other, in an order that changes, of images made
in the same way; before each launch no page is marked; a variant that leaves other bytes, or marks
other pages than its output's, ends the run. Writes benchmarks/results/mark_cost_h200.json. Needs an
NVIDIA GPU with 4 GiB, torch and triton.
"""

from __future__ import annotations

import ctypes
import pathlib
import random
import re
from dataclasses import dataclass
from typing import Any, Final

import torch
from figures import Figures, with_interval
from mark_kernels import Compiled, assembled, compile_kernel, vector_add, vector_copy, vector_fill

from concordia import abi, config
from concordia.device.cuda_call import checked
from concordia.device.cuda_context import CudaContext
from concordia.errors import DeviceError
from concordia.instrument.options import Options
from concordia.instrument.ptx import rewrite_ptx
from concordia.instrument.ptx_marks import MAP_COPIES, MAP_STRIDE, WINDOW_BASE
from concordia.instrument.report import Hook, fill
from concordia.instrument.rewrite import rewrite
from concordia.testing.command import Parser, count, file_in_folder, run_command
from concordia.testing.machine import add_figures

RESULTS: Final = pathlib.Path(__file__).parent / "results" / "mark_cost_h200.json"
ARRAY_BYTES: Final = 1 << 30
STRIDE: Final = ARRAY_BYTES >> config.MARK_PAGE_SHIFT  # of the copies of the map
BLOCKS: Final = (1024, 4096)
WARM_UP: Final = 3
SEED: Final = 4
GOAL: Final = 1.05


@dataclass(frozen=True, slots=True)
class Variant:
    """Which hooks, how they came into the code, and whether the output is tracked."""

    entry: bool
    marks: bool
    copies: int = 1  # of the map
    is_tracked: bool = True
    is_assembled: bool = False
    is_filled: bool = True  # with the control block's address


VARIANTS: Final = {
    "entry": Variant(entry=True, marks=False),
    "untracked": Variant(entry=False, marks=True, is_tracked=False),
    "marks": Variant(entry=False, marks=True),
    "spread": Variant(entry=False, marks=True, copies=MAP_COPIES),
    "all": Variant(entry=True, marks=True),
    "assembled_marks": Variant(entry=False, marks=True, is_assembled=True),
    "assembled_empty": Variant(entry=True, marks=True, is_assembled=True, is_filled=False),
    "assembled_all": Variant(entry=True, marks=True, is_assembled=True),
}
GOALS_OF: Final = ("marks", "assembled_marks")


KERNELS: Final = (vector_add, vector_copy, vector_fill)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A kernel as the driver has it."""

    function: Any
    registers: int
    variant: Variant


class Bench:
    """The arrays, the control block and the map."""

    def __init__(self) -> None:
        self._context = CudaContext(0)
        self._driver = self._context.driver
        checked(self._driver.cuCtxSetCurrent(self._context.handle), "make the context current")
        major, minor = torch.cuda.get_device_capability(0)
        self.architecture = major * 10 + minor
        count_ = ARRAY_BYTES // 4
        self._x = torch.rand(count_, device="cuda")
        self._y = torch.rand(count_, device="cuda")
        self.out = torch.zeros(count_, device="cuda")
        size = abi.CONTROL_ALLOCATED_BYTES
        self._control = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self._map = torch.zeros(MAP_COPIES * STRIDE, dtype=torch.uint8, device="cuda")
        self._words = torch.zeros(5, dtype=torch.int64)  # from the window's base on
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def load(self, compiled: Compiled, variant: Variant) -> Loaded:
        """The kernel with the hooks of a variant."""
        driver, name = self._driver, compiled.name
        loaded = checked(driver.cuModuleLoadData(self._image(compiled, variant)), f"load {name}")
        function = checked(driver.cuModuleGetFunction(loaded, name.encode()), f"find {name}")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS
        registers = checked(driver.cuFuncGetAttribute(attribute, function), "ask for registers")
        return Loaded(function, int(registers), variant)

    def _image(self, compiled: Compiled, variant: Variant) -> bytes:
        if not (variant.entry or variant.marks):
            if variant.is_assembled:
                return assembled(compiled.text, self.architecture)
            return compiled.text.encode() + b"\0"
        done = rewrite_ptx(
            compiled.text,
            entry=variant.entry,
            exit=False,
            marks=variant.marks,
            is_spread=variant.copies > 1,
            is_for_assembler=variant.is_assembled,
        )
        if any(kernel.reason for kernel in done.kernels):
            raise DeviceError(f"{compiled.name} was not rewritten: {done.kernels}")
        control = self._control.data_ptr()
        if not variant.is_assembled:
            return fill(done.text.encode(), done.slots, control) + b"\0"
        made = assembled(done.text, self.architecture)
        if not variant.is_filled:
            return made
        options = Options(arch=self.architecture, entry=variant.entry, marks=True)
        taken = rewrite(made, options)
        if not all(kernel.hooks & Hook.MARKS for kernel in taken.kernels):
            raise DeviceError(f"{compiled.name} has no marks: {taken.kernels}")
        return fill(taken.image, taken.slots, control)

    def launch(self, loaded: Loaded, compiled: Compiled) -> float:
        """Milliseconds of one launch; no page is marked before it."""
        self._track(loaded.variant)
        text = compiled.text
        pointers = [ctypes.c_uint64(array.data_ptr()) for array in (self._x, self._y, self.out)]
        # What Triton adds are pointers to scratch memory, of which these kernels have none.
        extra = len(re.findall(r"\.param", text[: text.index("{")])) - len(pointers) - 1
        values = [*pointers, ctypes.c_uint32(self.out.numel()), *([ctypes.c_uint64(0)] * extra)]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        threads = int(re.findall(r"\.reqntid (\d+)", text)[0])
        grid = -(-self.out.numel() // compiled.block)
        stream = torch.cuda.current_stream().cuda_stream
        self._begin.record()
        status = self._driver.cuLaunchKernel(
            loaded.function, grid, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(places), 0
        )
        self._end.record()
        checked(status, "launch")
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end))

    def marked(self) -> int:
        """Pages of the output that are marked in some copy of the map."""
        return int(self._map.view(MAP_COPIES, STRIDE).amax(dim=0).sum().item())

    def entered(self) -> int:
        """CTAs that came in at an entry hook since the last launch began."""
        begin = abi.CONTROL_ENTRY_OFFSET
        words = self._control[begin : abi.CONTROL_EXIT_OFFSET].view(torch.int64)
        return int(words[:: abi.CONTROL_PROGRESS_STRIDE // 8].sum().item())

    def _track(self, variant: Variant) -> None:
        self._map.zero_()
        self._control.zero_()
        stride = STRIDE if variant.copies > 1 else 0
        size = ARRAY_BYTES if variant.is_tracked else 0
        words = (self.out.data_ptr(), size, self._map.data_ptr(), config.MARK_PAGE_SHIFT, stride)
        for index, word in enumerate(words):
            self._words[index] = word
        end = WINDOW_BASE + 8 * len(words)
        assert end == MAP_STRIDE + 8
        self._control[WINDOW_BASE:end].copy_(self._words.view(torch.uint8))
        torch.cuda.synchronize()


def measure(bench: Bench, kernel: Any, block: int, rounds: int) -> Figures:
    """Each variant beside the original, in turn."""
    compiled = compile_kernel(kernel, block, bench.architecture)
    originals = {
        way: bench.load(compiled, Variant(entry=False, marks=False, is_assembled=way))
        for way in (False, True)
    }
    bench.launch(originals[False], compiled)
    expected = bench.out.clone()
    variants = {name: bench.load(compiled, variant) for name, variant in VARIANTS.items()}
    for name, loaded in variants.items():
        check(bench, compiled, name, loaded, expected)
    rng = random.Random(SEED)
    times: dict[bool, list[float]] = {way: [] for way in originals}
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(WARM_UP + rounds):
        for name in rng.sample(sorted(variants), len(variants)):
            way = variants[name].variant.is_assembled
            pair = [(originals[way], "original"), (variants[name], name)]
            rng.shuffle(pair)
            took = {which: bench.launch(loaded, compiled) for loaded, which in pair}
            if turn >= WARM_UP:
                times[way].append(took["original"] * 1e3)
                ratios[name].append(took[name] / took["original"])
    key = f"{compiled.name}.{block}"
    found: Figures = {}
    for way, original in originals.items():
        registers = {"registers": original.registers}
        name = f"{key}.{'assembled_' if way else ''}original"
        found[name] = with_interval(times[way], "us") | registers
    for name, values in ratios.items():
        registers = {"registers": variants[name].registers}
        found[f"{key}.{name}"] = with_interval(values, "ratio") | registers
    return found


def check(
    bench: Bench, compiled: Compiled, name: str, loaded: Loaded, expected: torch.Tensor
) -> None:
    """Raises DeviceError when a variant does not leave the same bytes, and its marks."""
    bench.out.zero_()
    bench.launch(loaded, compiled)
    variant = loaded.variant
    wanted = STRIDE if variant.marks and variant.is_tracked and variant.is_filled else 0
    ctas = bench.out.numel() // compiled.block if variant.entry and variant.is_filled else 0
    if not torch.equal(expected, bench.out):
        raise DeviceError(f"{compiled.name}, {name}: other bytes than without hooks")
    if bench.marked() != wanted or bench.entered() != ctas:
        raise DeviceError(
            f"{compiled.name}, {name}: {bench.marked()} pages, {bench.entered()} CTAs"
        )


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=count, default=40)
    parser.add_argument("--output", type=file_in_folder, default=RESULTS)
    options = parser.parse_args(arguments)
    bench = Bench()
    figures: Figures = {}
    for kernel in KERNELS:
        for block in BLOCKS:
            found = measure(bench, kernel, block, options.rounds)
            figures |= found
            for name, value in found.items():
                low, high = value["interval_95"]
                print(
                    f"{name:28} {value['median']:10.4f} {value['unit']:6} ({low} to {high}), "
                    f"{value['registers']} registers",
                    flush=True,
                )
    add_figures(options.output, figures)
    for name in GOALS_OF:
        found_ratio = figures[f"{vector_add.__name__}.{BLOCKS[0]}.{name}"]["median"]
        print(
            f"goal: {name} {found_ratio:.4f} of {GOAL} {'met' if found_ratio < GOAL else 'MISSED'}"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
