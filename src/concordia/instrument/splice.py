"""Hooks in the machine code of a cubin, floor 3.

Owns: putting hooks into kernels. A kernel's first instruction becomes a branch to the hook, which
lies behind its code; the hook ends with that instruction and a branch back. Promises: no other
instruction changes or moves, but an EXIT that becomes a branch to the exit hook; a kernel that is
not of the known form stays as it is, with the reason, whatever the others of its file are; no
kernel comes to need registers that cost occupancy. Called by rewrite, which lets proof.py check the
result. It knows no container.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from concordia.instrument import sass
from concordia.instrument.elf import Attribute, Cubin, read_cubin
from concordia.instrument.growth import Grown
from concordia.instrument.hook import HookCode
from concordia.instrument.plan import REGISTERS_SHIFT, Plan, Planner, refuse_file
from concordia.instrument.report import Hook, KernelReport, Slot, SlotKind
from concordia.instrument.sass_marks import MarkPlan
from concordia.instrument.sass_trampoline import trampolines

_STEP: Final = sass.INSTRUCTION_BYTES
_SYMBOL_SIZE_AT: Final = 16
_SECTION_INFO_AT: Final = 44


@dataclass(frozen=True, slots=True)
class Spliced:
    """A cubin with hooks; the same bytes where nothing was changed."""

    cubin: bytes
    slots: tuple[Slot, ...]
    kernels: tuple[KernelReport, ...]


@dataclass(frozen=True, slots=True)
class Tail:
    """What is added behind a kernel's code. Offsets are bytes from the function's begin."""

    code: bytes
    entry_at: int
    exit_at: int
    exits: tuple[int, ...]
    low_at: tuple[int, ...]
    high_at: tuple[int, ...]
    patches: tuple[tuple[int, bytes], ...]


def splice_cubin(
    cubin: bytes,
    *,
    entry: bool,
    exit: bool,
    marks: int | None = None,
    skip: Mapping[str, str] | None = None,
) -> Spliced:
    """Hooks at entry, at exit, or both, in every kernel that can have them, and marks of all stores
    with pages of 2 ** `marks` bytes; `skip` are kernels that stay as they are, with the reason.
    Raises ImageRefused for a malformed file; a kernel that stays as it is has a report that says
    why.
    """
    elf = read_cubin(cubin)
    kernels = [symbol for symbol in elf.symbols if symbol.is_kernel]
    plans: list[Plan] = []
    reports: dict[int, KernelReport] = {}
    is_asked = entry or exit or marks is not None
    reason = refuse_file(elf) if is_asked else "no hook was asked for"
    planner = Planner(elf, marks) if reason is None else None
    skipped = skip or {}
    for symbol in kernels:
        found: Plan | str = skipped.get(symbol.name) or str(reason)
        if planner and symbol.name not in skipped:
            found = planner.plan(symbol, entry=entry, exit=exit)
        registers = planner.registers(symbol) if planner else 0
        if isinstance(found, Plan):
            plans.append(found)
            hooks, registers, found = found.hooks, found.registers, found.why_not
        else:
            hooks = Hook.LEFT_ALONE
        reports[symbol.index] = KernelReport(symbol.name, hooks, registers, found)
    listed = tuple(reports[symbol.index] for symbol in kernels)
    if not plans:
        return Spliced(cubin, (), listed)
    image, slots = _apply(elf, plans)
    return Spliced(image, slots, listed)


def tail_of(
    code: bytes | memoryview,
    *,
    entry: HookCode | None,
    leaving: HookCode | None,
    marks: MarkPlan | None,
) -> Tail:
    """What goes behind a kernel of this code."""
    first, size = bytes(code[:_STEP]), len(code)
    parts = [sass.NO_OPERATION * (-size % sass.BOUNDARY_BYTES // _STEP)]
    at = size + len(parts[0])
    entry_at, exit_at = at, at
    low: list[int] = []
    high: list[int] = []
    exits: tuple[int, ...] = ()
    patches: tuple[tuple[int, bytes], ...] = ()
    if entry:
        low += (at + place for place in entry.low_at)
        high += (at + place for place in entry.high_at)
        # The kernel's own instructions must find nothing under way that the hook began.
        parts += (entry.code, sass.waiting(first))
        at += len(entry.code) + _STEP
        parts.append(sass.branch(at, _STEP))
        at += _STEP
    if leaving:
        exit_at = at
        low += (at + place for place in leaving.low_at)
        high += (at + place for place in leaving.high_at)
        exits = tuple(at + place for place in leaving.exits)
        # Registers may be written once nothing of the kernel's own is under way, see leaving.py.
        parts += (sass.waiting(leaving.code[:_STEP]), leaving.code[_STEP:])
        at += len(leaving.code)
    if marks and marks.sites:
        marked = trampolines(marks.sites, code, at=at, base=marks.base, page_shift=marks.page_shift)
        parts.append(marked.code)
        low += marked.low_at
        high += marked.high_at
        patches = marked.patches
        at += len(marked.code)
    # As the compiler ends a function: whatever is fetched ahead leads nowhere.
    parts.append(sass.branch(at, at))
    at += _STEP
    parts.append(sass.NO_OPERATION * (-at % sass.BOUNDARY_BYTES // _STEP))
    return Tail(b"".join(parts), entry_at, exit_at, exits, tuple(low), tuple(high), patches)


def _apply(elf: Cubin, plans: list[Plan]) -> tuple[bytes, tuple[Slot, ...]]:
    tails: dict[int, Tail] = {}
    for plan in plans:
        section = plan.section
        tails[section.index] = tail_of(
            elf.bytes_of(section), entry=plan.entry, leaving=plan.leaving, marks=plan.marks
        )
    grown = Grown(elf, {index: tail.code for index, tail in tails.items()})
    slots: list[Slot] = []
    for plan in plans:
        tail = tails[plan.section.index]
        _patch(grown, plan, tail)
        begin = grown.moved(plan.section.offset)
        slots += (Slot(begin + place, SlotKind.LOW) for place in tail.low_at)
        slots += (Slot(begin + place, SlotKind.HIGH) for place in tail.high_at)
    return bytes(grown.data), tuple(slots)


def _patch(grown: Grown, plan: Plan, tail: Tail) -> None:
    """The kernel's branches, and everything that states its size, registers and exits."""
    data, section = grown.data, plan.section
    begin = grown.moved(section.offset)
    for place, instruction in tail.patches:
        data[begin + place : begin + place + _STEP] = instruction
    if plan.entry:
        data[begin : begin + _STEP] = sass.branch(0, tail.entry_at)
    for place in plan.exits:
        low, high = struct.unpack_from("<QQ", data, begin + place)
        data[begin + place : begin + place + _STEP] = sass.branch_instead(
            low, high, place, tail.exit_at
        )
    size = section.size + len(tail.code)
    struct.pack_into("<Q", data, grown.moved(plan.symbol.offset) + _SYMBOL_SIZE_AT, size)
    struct.pack_into("<I", data, grown.moved(plan.register.offset), plan.registers)
    if section.info >> REGISTERS_SHIFT:
        info = section.info & ((1 << REGISTERS_SHIFT) - 1) | plan.registers << REGISTERS_SHIFT
        struct.pack_into("<I", data, grown.moved(section.header_offset) + _SECTION_INFO_AT, info)
    if plan.leaving:
        for attribute in plan.exit_attributes:
            _point_exits(grown, attribute, tail.exits[0])


def _point_exits(grown: Grown, attribute: Attribute, exit_at: int) -> None:
    """All EXITs that the kernel states are the hook's only one."""
    at = grown.moved(attribute.offset)
    struct.pack_into(f"<{attribute.size // 4}I", grown.data, at, *[exit_at] * (attribute.size // 4))
