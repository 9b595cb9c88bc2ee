"""Store marks in the machine code of a kernel, floor 3.

Owns: `MarkPlan`, and every reason why the stores of a kernel are not marked. Promises: a plan is
for all stores that the kernel may make; a kernel whose CTA might no longer fit on a multiprocessor,
or that might wait for CTAs which no longer fit beside it, is left alone. Called by plan. It changes
nothing; what a store becomes is sass_trampoline's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from concordia import config
from concordia.instrument import sass, sass_calls
from concordia.instrument.elf import SYMBOL_FUNCTION, TEXT, Attribute, Cubin, Section
from concordia.instrument.sass_mark_code import ALIGNMENT
from concordia.instrument.sass_stores import StoreSite, find_stores, may_wait_for_others
from concordia.instrument.sass_trampoline import stated_for_marks, trampoline_bytes

REGISTERS_MOST: Final = 255
THREADS_MOST: Final = 1024  # of a CTA, where a kernel does not say
_STEP: Final = sass.INSTRUCTION_BYTES
_GRANULE: Final = 8  # registers of a thread come in so many
_LANES: Final = 32
_PARTITIONS: Final = 4  # of a multiprocessor, with 16384 registers each
_PARTITION_REGISTERS: Final = 16384
_REGISTERS_FREE: Final = 32  # as many warps as there can be, 64, have so many: they cost nothing
# Functions of the driver, which write to what no region is: messages, and the heap's own words
_DRIVER_FUNCTIONS: Final = frozenset({"__assertfail", "vprintf", "malloc", "free"})
_UNIFIED_TABLES: Final = (".nv.uft", ".nv.udt")
_THREADS: Final = (0x05, 0x10)  # attributes: most threads of a CTA, threads of every CTA
_REGISTERS_ALLOWED: Final = 0x1B
# Attributes that name instructions, whatever for: none of them may be a store that moves.
_NAMING: Final = (
    *(0x1D, 0x25, 0x27, 0x28, 0x2D, 0x31, 0x34, 0x39, 0x3A, 0x44, 0x46, 0x47, 0x57, 0x59),
)


@dataclass(frozen=True, slots=True)
class MarkPlan:
    """One kernel whose stores are marked with registers from `base` on. `has_tensor_maps` when it
    stores through them, too, which nothing here marks.
    """

    sites: tuple[StoreSite, ...]
    base: int
    page_shift: int
    has_tensor_maps: bool

    @property
    def registers(self) -> int:
        """That a thread needs with the marks; 0 when there is nothing to mark."""
        return stated_for_marks(self.base) if self.sites else 0


class MarkPlanner:
    """What is looked up once for all kernels of a file."""

    def __init__(self, elf: Cubin, page_shift: int) -> None:
        self._elf = elf
        self._page_shift = page_shift
        self._stores = 0
        self._far_calls = _refuse_far_calls(elf)

    def plan(
        self,
        section: Section,
        *,
        registers: int,
        attributes: Sequence[Attribute],
        relocated: Set[int],
    ) -> MarkPlan | str:
        """How the stores of a kernel are marked, or why they are not."""
        code = sass.words(self._elf.bytes_of(section))
        opcodes = sass.opcodes(code)
        stores = find_stores(code, opcodes)
        if isinstance(stores, str):
            return stores
        if refused := self._refuse_calls(code, opcodes, section.size):
            return refused
        base = registers + -registers % ALIGNMENT
        found = MarkPlan(stores.sites, base, self._page_shift, stores.has_tensor_maps)
        if not stores.sites:
            return found
        named = self._named(attributes)
        for site in stores.sites:
            if site.at in named:
                return "an attribute of the kernel names one of its stores"
        if not {place // _STEP * _STEP for place in relocated}.isdisjoint(
            site.at for site in stores.sites
        ):
            return "a relocation changes one of its stores"
        count = len(stores.sites)
        if count * trampoline_bytes() > config.MARKED_BYTES_MAX:
            return f"{count} stores are too many to mark"
        if self._stores + count > config.MARKED_STORES_MAX:
            return f"{count} stores, after {self._stores} of the file, are too many to mark"
        if refused := self._refuse_registers(found, registers, attributes, code, opcodes):
            return refused
        self._stores += count
        return found

    def _refuse_calls(self, code: sass.Words, opcodes: NDArray[np.uint16], size: int) -> str | None:
        """What a call leads to is part of the kernel's section, or of the driver's own."""
        if not sass_calls.leads_within(code, opcodes, size):
            return "it calls a function outside its code"
        if not sass_calls.has_far_calls(opcodes):
            return None
        if self._far_calls:
            return self._far_calls
        is_unknown = sass_calls.leads_anywhere(code, opcodes)
        return "it calls through a pointer" if is_unknown else None

    def _named(self, attributes: Sequence[Attribute]) -> set[int]:
        named: set[int] = set()
        for attribute in attributes:
            if attribute.code in _NAMING:
                count = attribute.size // 4
                named.update(struct.unpack_from(f"<{count}I", self._elf.data, attribute.offset))
        return named

    def _refuse_registers(
        self,
        plan: MarkPlan,
        registers: int,
        attributes: Sequence[Attribute],
        code: sass.Words,
        opcodes: NDArray[np.uint16],
    ) -> str | None:
        """Whether a CTA still fits, and as many beside it as may be needed."""
        wanted = plan.registers
        more = f"a mark needs {wanted - registers} more"
        if wanted > REGISTERS_MOST:
            return f"{registers} registers: {more}"
        allowed = self._number(attributes, _REGISTERS_ALLOWED)
        if allowed is not None and wanted > allowed:
            return f"{registers} registers of {allowed}: {more}"
        if _granted(wanted) <= max(_granted(registers), _REGISTERS_FREE):
            return None
        threads = self._threads(attributes)
        warps = -(-threads // _LANES)
        used = -(-warps // _PARTITIONS) * _granted(wanted) * _LANES
        if used > _PARTITION_REGISTERS:
            return f"{registers} registers of {threads} threads: {more}"
        if may_wait_for_others(code, opcodes):
            return "it may wait for other CTAs, of which fewer run at a time with more registers"
        return None

    def _threads(self, attributes: Sequence[Attribute]) -> int:
        """At most, of a CTA."""
        found = THREADS_MOST
        for attribute in attributes:
            if attribute.code in _THREADS and attribute.size == 12:
                x, y, z = struct.unpack_from("<3I", self._elf.data, attribute.offset)
                found = min(found, max(x, 1) * max(y, 1) * max(z, 1))
        return found

    def _number(self, attributes: Sequence[Attribute], code: int) -> int | None:
        for attribute in attributes:
            if attribute.code == code and attribute.size == 2:
                (value,) = struct.unpack_from("<H", self._elf.data, attribute.offset)
                return int(value)
        return None


def _refuse_far_calls(elf: Cubin) -> str | None:
    """Why a call out of a kernel's section may lead to stores that are not marked."""
    kernels = {symbol.section for symbol in elf.symbols if symbol.is_kernel}
    for section in elf.sections:
        if section.name.startswith(TEXT) and section.index not in kernels:
            return "it may call functions of their own, whose stores are not marked"
        if section.name.startswith(_UNIFIED_TABLES):
            return "it may call functions through a table of the runtime"
    called = {s.name for s in elf.symbols if s.kind == SYMBOL_FUNCTION and not s.section}
    unknown = sorted(called - _DRIVER_FUNCTIONS)
    if unknown:
        return f"it may call {unknown[0][:60]}, of which is not known what it writes"
    return None if called else "it calls through a pointer"


def _granted(registers: int) -> int:
    return registers + -registers % _GRANULE
