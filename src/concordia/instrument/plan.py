"""Which kernels of a cubin can have hooks, floor 3.

Owns: `Plan`, and every reason why a kernel is left alone. Promises: a plan is made only of the
known form: sm_90, a known ABI, the known first instruction that nothing branches to and no
relocation touches, one symbol over all of its section, one statement of its registers. Called by
splice. It changes nothing; whether an exit hook is safe is leaving.py's.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Set
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from concordia.errors import ImageRefused
from concordia.instrument import sass
from concordia.instrument.elf import (
    ATTRIBUTE_EXIT_OFFSETS,
    ATTRIBUTE_REGISTERS,
    EXECUTABLE,
    INFO,
    SECTION_CODE,
    TEXT,
    Attribute,
    Cubin,
    Section,
    Symbol,
    read_attributes,
    read_relocated,
)
from concordia.instrument.growth import ALIGNMENT
from concordia.instrument.hook import HookCode, entry_hook, exit_hook
from concordia.instrument.leaving import refuse_exit
from concordia.instrument.report import Hook
from concordia.instrument.sass_marks import MarkPlan, MarkPlanner

ARCHITECTURE: Final = 90
REGISTERS_SHIFT: Final = 24  # of a function's sh_info, in files that state registers there
_STEP: Final = sass.INSTRUCTION_BYTES
_MERCURY: Final = (".nv.capmerc", ".nv.merc")
_ATTRIBUTE_INDIRECT_TARGETS: Final = 0x34
_ATTRIBUTE_PARAMETERS: Final = 0x0A  # symbol, offset and size of the parameters in bank 0
# The hook reads the memory descriptor right in front of them, where the driver puts it since
# CUDA 11.8.
_PARAMETERS_AT: Final = 0x210


@dataclass(frozen=True, slots=True)
class Register:
    """A kernel's statement of its registers: how many, and where it stands."""

    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One kernel that gets hooks. `exits` are the EXITs that become branches; none without an exit
    hook. Offsets of code are bytes from the function's begin.
    """

    symbol: Symbol
    section: Section
    register: Register
    exits: tuple[int, ...]
    entry: HookCode | None
    leaving: HookCode | None
    exit_attributes: tuple[Attribute, ...]
    marks: MarkPlan | None
    why_not: str  # no exit hook, or no marks, although they were asked for

    @property
    def hooks(self) -> Hook:
        found = (Hook.ENTRY if self.entry else Hook(0)) | (Hook.EXIT if self.leaving else Hook(0))
        if self.marks:
            found |= Hook.MARKS
            found |= Hook.WHOLE_REGION if self.marks.has_tensor_maps else Hook(0)
        return found

    @property
    def registers(self) -> int:
        """That a thread needs with the hooks."""
        used = [hook.registers for hook in (self.entry, self.leaving) if hook]
        return max(self.register.count, self.marks.registers if self.marks else 0, *used)


class Planner:
    """What is looked up once for all kernels of a file."""

    def __init__(self, elf: Cubin, page_shift: int | None = None) -> None:
        """`page_shift`: mark stores in pages of this size."""
        self._elf = elf
        self._marker = None if page_shift is None else MarkPlanner(elf, page_shift)
        self._relocated = read_relocated(elf)
        self._info = {s.name: s for s in elf.sections if s.name.startswith(INFO + ".")}
        self._stated = _registers(elf)
        self._homes: dict[int, int] = {}
        for symbol in elf.symbols:
            if symbol.is_kernel:
                self._homes[symbol.section] = self._homes.get(symbol.section, 0) + 1
        self._elsewhere = self._refuse_functions()

    def registers(self, symbol: Symbol) -> int:
        """That the kernel states; 0 when it does not."""
        register = self._stated.get(symbol.index)
        return register.count if register else 0

    def plan(self, symbol: Symbol, *, entry: bool, exit: bool) -> Plan | str:
        """How this kernel is hooked, or why it is not."""
        elf = self._elf
        if not 0 < symbol.section < len(elf.sections):
            return "its code is not in this file"
        section = elf.sections[symbol.section]
        register = self._stated.get(symbol.index)
        if refused := self._refuse_place(symbol, section, register):
            return refused
        assert register is not None
        code = sass.words(elf.bytes_of(section))
        opcodes = sass.opcodes(code)
        relocated: Set[int] = self._relocated.get(section.index, frozenset())
        first = code[0].tolist()
        control = sass.CONTROL_MASK | sass.KEPT_MASK
        if (first[0], first[1] & ~control) != sass.LOAD_STACK_POINTER:
            return f"its first instruction is {first[1]:016x} {first[0]:016x}"
        if any(place < _STEP for place in relocated):
            return "a relocation changes its first instruction"
        if _leads_to_begin(code, opcodes):
            return "it branches to its first instruction"
        info = self._info.get(INFO + "." + section.name.removeprefix(TEXT))
        try:
            attributes = read_attributes(elf, info) if info else []
        except ImageRefused as refusal:
            return str(refusal)
        for attribute in attributes:
            if attribute.code == _ATTRIBUTE_INDIRECT_TARGETS and _names_begin(elf, attribute):
                return "it may branch to its first instruction"
            if attribute.code == _ATTRIBUTE_PARAMETERS and not _is_usual_bank(elf, attribute):
                return f"its parameters do not begin at {_PARAMETERS_AT:#x}"
        why_not = self._refuse_exit(code, opcodes, relocated) if exit else ""
        has_exit = exit and not why_not
        marks: MarkPlan | str = "not asked for"
        if self._marker:
            marks = self._marker.plan(
                section, registers=register.count, attributes=attributes, relocated=relocated
            )
        reasons = [f"exit: {why_not}"] if why_not else []
        reasons += [f"marks: {marks}"] if self._marker and isinstance(marks, str) else []
        if not entry and not has_exit and isinstance(marks, str):
            return "; ".join(reasons)
        at = np.flatnonzero(opcodes == sass.EXIT) * _STEP if has_exit else np.empty(0, np.intp)
        return Plan(
            symbol=symbol,
            section=section,
            register=register,
            exits=tuple(at.tolist()),
            entry=entry_hook() if entry else None,
            leaving=exit_hook() if has_exit else None,
            exit_attributes=tuple(a for a in attributes if a.code == ATTRIBUTE_EXIT_OFFSETS),
            marks=None if isinstance(marks, str) else marks,
            why_not="; ".join(reasons),
        )

    def _refuse_place(
        self, symbol: Symbol, section: Section, register: Register | None
    ) -> str | None:
        if not section.name.startswith(TEXT) or section.size % _STEP or not section.size:
            return f"its section {section.name[:40]} has {section.size} bytes"
        if section.kind != SECTION_CODE:
            return f"its section is of kind {section.kind}"
        if symbol.value or symbol.size != section.size or section.address:
            return f"{symbol.size} bytes at {symbol.value} of a section of {section.size}"
        if self._homes[section.index] != 1:
            return "another kernel has the same code"
        if section.alignment > ALIGNMENT or section.offset % _STEP:
            return f"alignment {section.alignment} at {section.offset}"
        if register is None:
            return "it does not state its registers"
        stated = section.info >> REGISTERS_SHIFT
        if stated and stated != register.count:
            return f"it states {register.count} registers and {stated}"
        return None

    def _refuse_exit(
        self, code: sass.Words, opcodes: NDArray[np.uint16], relocated: Set[int]
    ) -> str:
        if self._elsewhere:
            return self._elsewhere
        if refused := refuse_exit(code, opcodes):
            return refused
        exits = set((np.flatnonzero(opcodes == sass.EXIT) * _STEP).tolist())
        if any(place // _STEP * _STEP in exits for place in relocated):
            return "a relocation changes an EXIT"
        return ""

    def _refuse_functions(self) -> str:
        """Functions of their own that kernels call must not end a thread: no hook is in them."""
        for section in self._elf.sections:
            if not section.name.startswith(TEXT) or section.index in self._homes:
                continue
            if section.size % _STEP:
                return f"function {section.name[:40]} has {section.size} bytes"
            opcodes = sass.opcodes(sass.words(self._elf.bytes_of(section)))
            if (opcodes & sass.BASE_MASK == sass.EXIT & sass.BASE_MASK).any():
                return "a function that is called may end the thread"
        return ""


def refuse_file(elf: Cubin) -> str | None:
    """Why no kernel of this file can be changed; None when some may."""
    if elf.kind != EXECUTABLE:
        return "a relocatable object: it is linked before it is loaded"
    if elf.generation is None:
        return f"an unknown ABI: {elf.data[7]:#x}, {elf.data[8]}"
    if elf.architecture != ARCHITECTURE:
        return f"code for sm_{elf.architecture}: only sm_90 is known"
    for section in elf.sections:
        if section.name.startswith(_MERCURY):
            return "the driver finishes this code itself (Mercury)"
        if section.end > section.offset and section.alignment > ALIGNMENT:
            return f"section {section.name[:40]} has an alignment of {section.alignment}"
    # Growing keeps a segment's ends where they are in its sections, so none may lie within code.
    edges = sorted(
        {at for found in elf.segments for at in (found.offset, found.offset + found.file_bytes)}
    )
    for section in elf.sections:
        behind = bisect.bisect_right(edges, section.offset)
        is_cut = behind < len(edges) and edges[behind] < section.end
        if is_cut and section.name.startswith(TEXT):
            return f"a segment begins or ends within {section.name[:40]}"
    return None


def _registers(elf: Cubin) -> dict[int, Register]:
    """By symbol. A file that states it twice, or in a form that is not known, states nothing."""
    found: dict[int, Register] = {}
    twice: set[int] = set()
    for section in elf.sections:
        if section.name != INFO:
            continue
        try:
            attributes = read_attributes(elf, section)
        except ImageRefused:
            return {}
        for attribute in attributes:
            if attribute.code == ATTRIBUTE_REGISTERS and attribute.size == 8:
                symbol, count = struct.unpack_from("<II", elf.data, attribute.offset)
                if symbol in found:
                    twice.add(symbol)
                found[symbol] = Register(count, attribute.offset + 4)
    return {symbol: register for symbol, register in found.items() if symbol not in twice}


def _leads_to_begin(code: sass.Words, opcodes: NDArray[np.uint16]) -> bool:
    """Whether a direct branch would run the hook again."""
    far = np.flatnonzero(np.isin(opcodes, sass.BRANCHES))
    near = np.flatnonzero((opcodes == sass.CALL_RELATIVE) | (opcodes == sass.BARRIER_SET))
    return bool(
        (sass.branch_targets(code, far) == 0).any() or (sass.near_targets(code, near) == 0).any()
    )


def _names_begin(elf: Cubin, attribute: Attribute) -> bool:
    """Whether the targets of an indirect branch may be the kernel's begin. A value is: the branch,
    a word, a count, and so many targets; again for the next branch.
    """
    if attribute.size % 4:
        return True
    words = struct.unpack_from(f"<{attribute.size // 4}I", elf.data, attribute.offset)
    at = 0
    while at < len(words):
        if len(words) - at < 3 or words[at + 2] > len(words) - at - 3:
            return True
        targets = words[at + 3 : at + 3 + words[at + 2]]
        if 0 in targets:
            return True
        at += 3 + len(targets)
    return False


def _is_usual_bank(elf: Cubin, attribute: Attribute) -> bool:
    if attribute.size != 8:
        return False
    (at,) = struct.unpack_from("<H", elf.data, attribute.offset + 4)
    return bool(at == _PARAMETERS_AT)
