"""Handler code on the GPU: whether it may run, and who owns it, floor 2.

Owns: the lint of a compiled handler and loaded modules. Promises: nothing is loaded that could not
be called from the executor (more registers or stack than it was launched with, recursion, constants
or shared memory of another kernel, a barrier it has not got, a way out that does not return, an
unresolved symbol, another ABI), and a loaded module stays until `close`, whatever Python forgets.
Called by cuda.py. Does not compile, and does not know when the executor is out: its caller does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from concordia import abi
from concordia.device.cubin import Facts, initial_word, read_facts
from concordia.device.cuda_call import checked, released
from concordia.device.cuda_context import CudaContext, CudaMemory
from concordia.errors import DeviceError, HandlerRefused

POINTER_SYMBOL: Final = "concordia_handler_pointer"
ABI_SYMBOL: Final = "concordia_handler_abi"

# A pointer call takes what the launch gave: the executor is linked with a ballast function that
# needs all of this. With the ballast's own spills it stays below 1024 bytes, which every context
# has per thread from its start: more would be grown at a launch, waiting for the GPU.
FRAME_BYTES_MAX: Final = 512
BARRIER_COUNT_MAX: Final = 1  # barrier 0, the one behind __syncthreads

_SHARED: Final = re.compile(rb"^\s*(?:\.\w+\s+)*\.shared\b", re.MULTILINE)
_CONSTANT: Final = re.compile(rb"^\s*(?:\.\w+\s+)*\.const\b", re.MULTILINE)
_BARRIER: Final = re.compile(rb"\bbar(?:rier)?(?:\.cta)?\.(?:sync|arrive|red)[.\w]*\s+([^,;]+)")
# What ends or changes a thread without returning: the other lanes would wait for it for ever.
_LEAVING: Final = re.compile(
    rb"(?:^|[;{}])\s*(?:@!?%\w+\s+)?(trap|exit|brkpt|setmaxnreg)\b", re.MULTILINE
)
_DEFINED: Final = re.compile(rb"\.func\b[^;{]*?([\w$]+)\s*\([^;{]*\)[^;{]*\{")
_CALLED: Final = re.compile(rb"\bcall(?:\.uni)?\s+(?:\([^)]*\)\s*,\s*)?([\w$]+)\s*[,;]")


@dataclass(frozen=True, slots=True)
class CudaImage:
    """A linked handler that passed the lint."""

    name: str
    cubin: bytes
    digest: int


def lint(name: str, *, ptx: bytes, cubin: bytes, registers_max: int) -> None:
    """Raise HandlerRefused with every reason why the executor must not call this code."""
    reasons = [*_lint_ptx(ptx), *_lint_facts(read_facts(cubin), registers_max)]
    version = initial_word(cubin, ABI_SYMBOL)
    if version is None:
        reasons.append(f"no {ABI_SYMBOL}: not a handler")
    elif version != abi.ABI_VERSION:
        reasons.append(f"built for ABI {version}, this is ABI {abi.ABI_VERSION}")
    if initial_word(cubin, POINTER_SYMBOL) is None:
        reasons.append(f"no {POINTER_SYMBOL}: its address could not be found")
    if reasons:
        raise HandlerRefused(f"handler {name}: {'; '.join(reasons)}")


def _lint_ptx(ptx: bytes) -> list[str]:
    reasons = []
    if _SHARED.search(ptx):
        reasons.append("static shared memory: it would lie over the executor's")
    if _CONSTANT.search(ptx):
        reasons.append("__constant__ memory: it would read the executor's bank")
    barriers = {match.group(1).strip() for match in _BARRIER.finditer(ptx)}
    if not barriers <= {b"0"}:
        named = ", ".join(sorted(b.decode() for b in barriers - {b"0"}))
        reasons.append(f"barriers other than 0: {named}")
    if leaving := sorted({word.decode() for word in _LEAVING.findall(ptx)}):
        reasons.append(f"instructions that do not return: {', '.join(leaving)}")
    if recursive := _recursive(ptx):
        reasons.append(f"recursion, whose stack nobody knows: {', '.join(sorted(recursive))}")
    return reasons


def _recursive(ptx: bytes) -> set[str]:
    """Functions that may come to call themselves, and those that call such ones."""
    heads = list(_DEFINED.finditer(ptx))
    calls: dict[bytes, set[bytes]] = {}
    for index, head in enumerate(heads):
        end = heads[index + 1].start() if index + 1 < len(heads) else len(ptx)
        calls[head[1]] = set(_CALLED.findall(ptx, head.end(), end))
    while ended := {name for name, called in calls.items() if not called & calls.keys()}:
        calls = {name: called for name, called in calls.items() if name not in ended}
    return {name.decode() for name in calls}


def _lint_facts(facts: Facts, registers_max: int) -> list[str]:
    reasons = []
    if facts.registers_max > registers_max:
        reasons.append(f"{facts.registers_max} registers, at most {registers_max}")
    if facts.frame_bytes_total > FRAME_BYTES_MAX:
        reasons.append(f"{facts.frame_bytes_total} bytes of stack, at most {FRAME_BYTES_MAX}")
    if facts.barriers_max > BARRIER_COUNT_MAX:
        reasons.append(f"{facts.barriers_max} barriers, at most {BARRIER_COUNT_MAX}")
    if banks := sorted(facts.constant_banks - {0}):  # 0 holds the parameters of keep.cu's kernel
        reasons.append(f"constant banks {banks}")
    if facts.dangling_calls:
        reasons.append(f"{facts.dangling_calls} calls to code that the linker dropped")
    if facts.shared_bytes:
        reasons.append(f"{facts.shared_bytes} bytes of shared memory")
    if facts.undefined:
        reasons.append(f"unresolved {', '.join(sorted(facts.undefined))}")
    if not facts.registers:
        reasons.append("no function in it")
    return reasons


class CudaCode:
    """One loaded module; the driver keeps its own copy of the cubin."""

    def __init__(self, image: CudaImage, *, context: CudaContext, memory: CudaMemory) -> None:
        self.name = image.name
        self._context = context
        with context.current() as driver:
            self._module = checked(driver.cuModuleLoadData(image.cubin), f"load {image.name}")
            try:
                self.address = self._find_entry(driver, memory)
            except DeviceError:
                self.close()
                raise

    def _find_entry(self, driver: Any, memory: CudaMemory) -> int:
        symbol = POINTER_SYMBOL.encode()
        at, size = checked(
            driver.cuModuleGetGlobal(self._module, symbol), f"find the entry of {self.name}"
        )
        address = int.from_bytes(memory.read(int(at), 8), "little") if size == 8 else 0
        if address == 0:
            raise HandlerRefused(f"handler {self.name}: {POINTER_SYMBOL} holds no address")
        return address

    def close(self) -> None:
        """Unload; the caller has published a table without this code; nobody is inside."""
        module, self._module = self._module, None
        if module is not None:
            with self._context.current() as driver:
                released(driver.cuModuleUnload(module), f"unload {self.name}")
