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
from mark_variants import PAGES, VARIANTS, Variant

from concordia import abi, config
from concordia.device.cuda_call import checked
from concordia.device.cuda_context import CudaContext
from concordia.errors import DeviceError
from concordia.instrument.options import Options
from concordia.instrument.ptx import rewrite_ptx
from concordia.instrument.ptx_marks import WINDOW_BASE
from concordia.instrument.report import Hook, fill
from concordia.instrument.rewrite import rewrite
from concordia.testing.command import Parser, count, file_in_folder, run_command
from concordia.testing.machine import add_figures

RESULTS: Final = pathlib.Path(__file__).parent / "results" / "mark_cost_h200.json"
ARRAY_BYTES: Final = PAGES << config.MARK_PAGE_SHIFT
BLOCKS: Final = (1024, 4096)
WARM_UP: Final = 3
SEED: Final = 4
GOAL: Final = 1.05
GOALS_OF: Final = ("marks", "assembled_marks")
KERNELS: Final = (vector_add, vector_copy, vector_fill)
JUDGED: Final = (vector_add, vector_copy)  # they read and write; the other only stores


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
        size = abi.CONTROL_MAP_COPIES * abi.CONTROL_MAP_STRIDE
        self._map = torch.zeros(size, dtype=torch.uint8, device="cuda")
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
            is_for_assembler=variant.is_assembled,
        )
        if any(kernel.reason for kernel in done.kernels):
            raise DeviceError(f"{compiled.name} was not rewritten: {done.kernels}")
        control = self._control.data_ptr()
        if not variant.is_assembled:
            text = fill(done.text.encode(), done.slots, control).decode()
            for pattern, instead in variant.edits:
                text, found = re.subn(pattern, instead, text)
                if not found:
                    raise DeviceError(f"{compiled.name} has no {pattern}")
            return text.encode() + b"\0"
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

    def clear(self) -> None:
        """No byte of the map is set, whosever it is."""
        self._map.zero_()

    def marked(self, variant: Variant) -> tuple[int, int]:
        """Pages of the output that are marked in some copy of the map; marks that are elsewhere."""
        copies = self._copies(variant)
        elsewhere = torch.count_nonzero(self._map) - torch.count_nonzero(copies)
        return int(copies.amax(dim=0).sum().item()), int(elsewhere.item())

    def _copies(self, variant: Variant) -> torch.Tensor:
        """A row for each copy of the map."""
        return self._map.as_strided((variant.copies, PAGES), (variant.stride, 1))

    def entered(self) -> int:
        """CTAs that came in at an entry hook since the last launch began."""
        begin = abi.CONTROL_ENTRY_OFFSET
        words = self._control[begin : abi.CONTROL_EXIT_OFFSET].view(torch.int64)
        return int(words[:: abi.CONTROL_PROGRESS_STRIDE // 8].sum().item())

    def _track(self, variant: Variant) -> None:
        self._copies(variant).zero_()
        self._control.zero_()
        size = ARRAY_BYTES if variant.is_tracked else 0
        places = (variant.copies - 1) << 32 | variant.stride
        words = (self.out.data_ptr(), size, self._map.data_ptr(), config.MARK_PAGE_SHIFT, places)
        for index, word in enumerate(words):
            self._words[index] = word
        end = WINDOW_BASE + 8 * len(words)
        assert end == abi.CONTROL.offsets()["map_last"] + 4
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
    bench.clear()
    bench.launch(loaded, compiled)
    variant = loaded.variant
    wanted = PAGES if variant.marks and variant.is_tracked and variant.is_filled else 0
    ctas = bench.out.numel() // compiled.block if variant.entry and variant.is_filled else 0
    if not torch.equal(expected, bench.out):
        raise DeviceError(f"{compiled.name}, {name}: other bytes than without hooks")
    pages, elsewhere = bench.marked(variant)
    if (pages, elsewhere, bench.entered()) != (wanted, 0, ctas):
        raise DeviceError(
            f"{compiled.name}, {name}: {pages} pages, {elsewhere} marks elsewhere, "
            f"{bench.entered()} CTAs"
        )


def worst(figures: Figures, kernels: tuple[Any, ...], variant: str) -> tuple[float, str]:
    """The highest ratio of a variant, and whose it is."""
    keys = [f"{kernel.__name__}.{block}" for kernel in kernels for block in BLOCKS]
    return max((float(figures[f"{key}.{variant}"]["median"]), key) for key in keys)


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
        ratio, whose = worst(figures, JUDGED, name)
        alone, other = worst(figures, (vector_fill,), name)
        verdict = "met" if ratio < GOAL else "MISSED"
        print(
            f"goal: {name} {ratio:.4f} of {GOAL} {verdict}, by {whose}, of those that read and "
            f"write; {other}, which only stores: {alone:.4f}"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
