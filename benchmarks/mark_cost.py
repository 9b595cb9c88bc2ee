"""What store marks in PTX cost a kernel that waits for memory.

Owns: Triton kernels that read and write 1 GiB arrays, as Triton compiles them and with hooks, each
loaded by the driver and launched in turn in one process. Promises: a ratio is of two launches one
after the other, in an order that changes; before each launch no page is marked; a variant that
leaves other bytes, or marks other pages than its output's, ends the run. Writes
benchmarks/results/mark_cost_h200.json. Needs an NVIDIA GPU with 4 GiB, torch and triton.
"""

from __future__ import annotations

import ctypes
import pathlib
import random
import re
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from figures import Figures, with_interval
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from concordia import abi, config
from concordia.device.cuda_call import checked
from concordia.device.cuda_context import CudaContext
from concordia.errors import DeviceError
from concordia.instrument.ptx import rewrite_ptx
from concordia.instrument.ptx_marks import MAP_COPIES, MAP_STRIDE, WINDOW_BASE
from concordia.instrument.report import fill
from concordia.testing.command import Parser, count, file_in_folder, run_command
from concordia.testing.machine import add_figures

RESULTS: Final = pathlib.Path(__file__).parent / "results" / "mark_cost_h200.json"
ARRAY_BYTES: Final = 1 << 30
STRIDE: Final = ARRAY_BYTES >> config.MARK_PAGE_SHIFT  # of the copies of the map
PTX_VERSION: Final = 86  # which every driver of CUDA 12.8 and later takes
BLOCKS: Final = (1024, 4096)
WARM_UP: Final = 3
SEED: Final = 4
GOAL: Final = 1.05
# Name -> entry hook, marks, copies of the map, whether the output is tracked.
VARIANTS: Final = {
    "entry": (True, False, 1, True),
    "untracked": (False, True, 1, False),
    "marks": (False, True, 1, True),
    "spread": (False, True, MAP_COPIES, True),
    "all": (True, True, 1, True),
}


@triton.jit
def vector_add(x_ptr, y_ptr, o_ptr, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(o_ptr + at, x + tl.load(y_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def vector_copy(x_ptr, y_ptr, o_ptr, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def vector_fill(x_ptr, y_ptr, o_ptr, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o_ptr + at, at.to(tl.float32), mask=at < n)


KERNELS: Final = (vector_add, vector_copy, vector_fill)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A kernel as the driver has it."""

    function: Any
    registers: int
    copies: int
    is_tracked: bool


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

    def compile(self, kernel: Any, block: int) -> str:
        """PTX for this GPU."""
        names = [name for name in kernel.arg_names if name != "BLOCK"]
        kinds = ["*fp32" if name.endswith("_ptr") else "i32" for name in names]
        source = ASTSource(
            fn=kernel,
            signature=dict(zip(names, kinds, strict=True)) | {"BLOCK": "constexpr"},
            constexprs={"BLOCK": block},
            attrs={(index,): [["tt.divisibility", 16]] for index in range(len(names))},
        )
        target = GPUTarget("cuda", self.architecture, 32)
        compiled = triton.compile(source, target=target, options={"ptx_version": PTX_VERSION})
        return str(compiled.asm["ptx"])

    def load(self, text: str, name: str, variant: str | None) -> Loaded:
        """The kernel, or a variant of it with hooks."""
        image, copies, is_tracked = text.encode(), 1, True
        if variant is not None:
            entry, marks, copies, is_tracked = VARIANTS[variant]
            done = rewrite_ptx(text, entry=entry, exit=False, marks=marks, is_spread=copies > 1)
            if any(kernel.reason for kernel in done.kernels):
                raise DeviceError(f"{name} was not rewritten: {done.kernels}")
            image = fill(done.text.encode(), done.slots, self._control.data_ptr())
        driver = self._driver
        loaded = checked(driver.cuModuleLoadData(image + b"\0"), f"load {name}")
        function = checked(driver.cuModuleGetFunction(loaded, name.encode()), f"find {name}")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS
        registers = checked(driver.cuFuncGetAttribute(attribute, function), "ask for registers")
        return Loaded(function, int(registers), copies, is_tracked)

    def launch(self, loaded: Loaded, text: str, block: int) -> float:
        """Milliseconds of one launch; no page is marked before it."""
        self._track(loaded)
        pointers = [ctypes.c_uint64(array.data_ptr()) for array in (self._x, self._y, self.out)]
        # What Triton adds are pointers to scratch memory, of which these kernels have none.
        extra = len(re.findall(r"\.param", text[: text.index("{")])) - len(pointers) - 1
        values = [*pointers, ctypes.c_uint32(self.out.numel()), *([ctypes.c_uint64(0)] * extra)]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        threads = int(re.findall(r"\.reqntid (\d+)", text)[0])
        grid = -(-self.out.numel() // block)
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

    def _track(self, loaded: Loaded) -> None:
        self._map.zero_()
        self._control.zero_()
        stride = STRIDE if loaded.copies > 1 else 0
        size = ARRAY_BYTES if loaded.is_tracked else 0
        words = (self.out.data_ptr(), size, self._map.data_ptr(), config.MARK_PAGE_SHIFT, stride)
        for index, word in enumerate(words):
            self._words[index] = word
        end = WINDOW_BASE + 8 * len(words)
        assert end == MAP_STRIDE + 8
        self._control[WINDOW_BASE:end].copy_(self._words.view(torch.uint8))
        torch.cuda.synchronize()


def measure(bench: Bench, kernel: Any, block: int, rounds: int) -> Figures:
    """Each variant beside the original, in turn."""
    text, name = bench.compile(kernel, block), kernel.__name__
    original = bench.load(text, name, None)
    bench.launch(original, text, block)
    expected = bench.out.clone()
    variants = {variant: bench.load(text, name, variant) for variant in VARIANTS}
    for variant, loaded in variants.items():
        bench.out.zero_()
        bench.launch(loaded, text, block)
        entry, marks, _, is_tracked = VARIANTS[variant]
        wanted = STRIDE if marks and is_tracked else 0
        ctas = bench.out.numel() // block if entry else 0
        if not torch.equal(expected, bench.out):
            raise DeviceError(f"{name}, {variant}: other bytes than without hooks")
        if bench.marked() != wanted or bench.entered() != ctas:
            raise DeviceError(f"{name}, {variant}: {bench.marked()} pages, {bench.entered()} CTAs")
    rng = random.Random(SEED)
    times: list[float] = []
    ratios: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(WARM_UP + rounds):
        for variant in rng.sample(sorted(variants), len(variants)):
            pair = [(original, "original"), (variants[variant], variant)]
            rng.shuffle(pair)
            took = {which: bench.launch(loaded, text, block) for loaded, which in pair}
            if turn >= WARM_UP:
                times.append(took["original"] * 1e3)
                ratios[variant].append(took[variant] / took["original"])
    key = f"{name}.{block}"
    found = {f"{key}.original": with_interval(times, "us") | {"registers": original.registers}}
    for variant, values in ratios.items():
        registers = {"registers": variants[variant].registers}
        found[f"{key}.{variant}"] = with_interval(values, "ratio") | registers
    return found


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
    marks = figures[f"{vector_add.__name__}.{BLOCKS[0]}.marks"]["median"]
    print(f"goal: {marks:.4f} of {GOAL} {'met' if marks < GOAL else 'MISSED'}")
    return 0


if __name__ == "__main__":
    run_command(main)
