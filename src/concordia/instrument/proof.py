"""The proof that a spliced cubin is the original with hooks and nothing else, floor 3.

Owns: a comparison that trusts nothing of the splicing: it reads both files and takes the hooks from
their own file. Promises: what it passes has every instruction of the original in its place, except
a first one that is now a branch to an entry hook (which ends with that instruction and a branch
back) and EXITs that are now branches for the same lanes to an exit hook; every other byte of the
original's sections and headers, except places and sizes; registers that are the hooks' where those
need more, and exit offsets that are the exit hook's. Called by rewrite before anything is handed
out, and by tests. It repairs nothing.
"""

from __future__ import annotations

import bisect
import itertools
import struct
from collections.abc import Mapping
from typing import Final

import numpy as np

from concordia.errors import ImageRefused
from concordia.instrument import sass
from concordia.instrument.elf import (
    SECTION_NULL,
    SECTION_SYMBOLS,
    TEXT,
    Cubin,
    Section,
    Segment,
    read_cubin,
)
from concordia.instrument.hook import HookCode, entry_hook, exit_hook
from concordia.instrument.proof_statements import (
    Hooked,
    expected_statements,
    moved_exits,
    raised_info,
    stated_registers,
)
from concordia.instrument.sass_proof import compare_marks

_STEP: Final = sass.INSTRUCTION_BYTES
_SYMBOL_BYTES: Final = 24
_SYMBOL_SIZE_WORD: Final = 2  # of the three words of a symbol
# Bytes of a section's header without offset, size and info, of a segment's without offset and sizes
_SECTION_FIXED: Final = ((0, 24), (40, 44), (48, 64))
_SEGMENT_FIXED: Final = ((0, 8), (16, 32), (48, 56))
_REGISTERS_MOST: Final = 255  # of a kernel that does not say


def proves_original(original: bytes, spliced: bytes, marks: int | None = None) -> bool:
    """Whether every instruction that is not ours is kept."""
    return first_difference(original, spliced, marks) is None


def first_difference(original: bytes, spliced: bytes, marks: int | None = None) -> str | None:
    """What is not as it must be; None when all is. There may be marks only where their pages have
    2 ** `marks` bytes.
    """
    try:
        before, after = read_cubin(original), read_cubin(spliced)
        return _compare(before, after, marks)
    except ImageRefused as refusal:
        return str(refusal)


def _compare(before: Cubin, after: Cubin, marks: int | None) -> str | None:
    if len(before.sections) != len(after.sections) or len(before.segments) != len(after.segments):
        return "sections or segments were added or dropped"
    same = (before.kind, before.generation, before.architecture, before.data[:32])
    if same != (after.kind, after.generation, after.architecture, after.data[:32]):
        return "the file's header differs"
    if before.data[48:64] != after.data[48:64]:
        return "the file's header differs"
    kernels = {symbol.section for symbol in before.symbols if symbol.is_kernel}
    stated = stated_registers(before)
    hooked: dict[int, Hooked] = {}
    for old, new in zip(before.sections, after.sections, strict=True):
        if not _is_same_header(before, old, after, new, _SECTION_FIXED):
            return f"section {old.name}: its header differs"
        is_code = old.name.startswith(TEXT) and old.index in kernels
        if not is_code and old.size != new.size:
            return f"section {old.name}: {new.size} bytes, {old.size} before"
        if is_code and before.bytes_of(old) != after.bytes_of(new):
            code, ours = bytes(before.bytes_of(old)), bytes(after.bytes_of(new))
            registers = stated.get(old.index, _REGISTERS_MOST)
            found = _compare_code(code, ours, marks, registers)
            if isinstance(found, str):
                return f"section {old.name}: {found}"
            if old.index not in stated:
                return f"section {old.name}: it states no registers"
            hooked[old.index] = found
        if new.info != raised_info(old.info, hooked.get(old.index)):
            return f"section {old.name}: its header differs"
    return (
        _compare_symbols(before, after, hooked)
        or _compare_rest(before, after, hooked)
        or _compare_segments(before, after)
    )


def _compare_code(code: bytes, ours: bytes, marks: int | None, registers: int) -> Hooked | str:
    """The hooks of a kernel that stated so many registers, or what is wrong with them."""
    size = len(code)
    was, now = sass.words(code), sass.words(ours[:size])
    differing = np.flatnonzero((was != now).any(axis=1)).tolist()
    marked = (
        None if marks is None else compare_marks(code, ours, page_shift=marks, registers=registers)
    )
    if isinstance(marked, str):
        return marked
    needed, exit_at = marked.registers if marked else 0, None
    explained = marked.places if marked else frozenset()
    has_entry = bool(differing) and differing[0] == 0
    exits = [place for place in differing if place and place not in explained]
    first = code[:_STEP]
    at, low, high = size, entry_hook(), exit_hook()
    at += -at % sass.BOUNDARY_BYTES
    if ours[size:at] != sass.NO_OPERATION * ((at - size) // _STEP):
        return "something else lies behind its code"
    if has_entry:
        if ours[:_STEP] != sass.branch(0, at):
            return "its first instruction does not lead to the hook"
        wanted = low.code + sass.waiting(first) + sass.branch(at + len(low.code) + _STEP, _STEP)
        if _blank(ours[at : at + len(wanted)], low) != wanted:
            return "the entry hook differs"
        needed = max(needed, low.registers)
        at += len(wanted)
    if exits:
        wanted = sass.waiting(high.code[:_STEP]) + high.code[_STEP:]
        if _blank(ours[at : at + len(wanted)], high) != wanted:
            return "the exit hook differs"
        for place in exits:
            if wrong := _compare_exit(was[place].tolist(), now[place].tolist(), place, at):
                return wrong
        if len(exits) != int((sass.opcodes(was) == sass.EXIT).sum()):
            return "an EXIT is left that does not lead to the hook"
        needed, exit_at = max(needed, high.registers), at + high.exits[0]
        at += len(wanted)
    if marked:
        if marked.begin != at:
            return "the marks lie elsewhere"
        at = marked.end
    end = sass.branch(at, at)
    end += sass.NO_OPERATION * (-(at + len(end)) % sass.BOUNDARY_BYTES // _STEP)
    if ours[at:] != end:
        return "something else lies behind the hooks"
    return Hooked(needed, exit_at)


def _compare_exit(was: list[int], now: list[int], place: int, target: int) -> str | None:
    low, high = was
    if not sass.is_plain_exit(low, high):
        return f"instruction {place} was no EXIT and was changed"
    wanted = sass.branch_instead(low, high, place * _STEP, target)
    return None if struct.pack("<QQ", *now) == wanted else f"EXIT {place} leads elsewhere"


def _blank(code: bytes, hook: HookCode) -> bytes:
    """The code without the address of the control block."""
    blank = bytearray(code)
    for place in (*hook.low_at, *hook.high_at):
        blank[place + 4 : place + 8] = bytes(4)
    return bytes(blank)


def _compare_symbols(before: Cubin, after: Cubin, hooked: Mapping[int, Hooked]) -> str | None:
    for old, new in zip(before.sections, after.sections, strict=True):
        if old.kind != SECTION_SYMBOLS:
            continue
        was = np.frombuffer(before.bytes_of(old), "<u8").reshape(-1, _SYMBOL_BYTES // 8).copy()
        now = np.frombuffer(after.bytes_of(new), "<u8").reshape(-1, _SYMBOL_BYTES // 8)
        for symbol in before.symbols:
            if symbol.is_kernel and symbol.section in hooked:
                size = after.sections[symbol.section].size
                was[symbol.index, _SYMBOL_SIZE_WORD] = size
        if not np.array_equal(was, now):
            return "a symbol differs"
    return None


def _compare_rest(before: Cubin, after: Cubin, hooked: Mapping[int, Hooked]) -> str | None:
    """Sections that hold no kernel and no symbol."""
    kernels = {symbol.section for symbol in before.symbols if symbol.is_kernel}
    exits = moved_exits(before, hooked)
    for old, new in zip(before.sections, after.sections, strict=True):
        if old.kind in (SECTION_NULL, SECTION_SYMBOLS) or old.index in kernels:
            continue
        if expected_statements(before, old, hooked, exits) != after.bytes_of(new):
            return f"section {old.name} differs"
    return None


def _compare_segments(before: Cubin, after: Cubin) -> str | None:
    """Each segment covers the same sections, and no byte more than it did beside them."""
    order = sorted(
        (section for section in before.sections if section.end > section.offset),
        key=lambda section: section.offset,
    )
    moved = [after.sections[section.index] for section in order]
    if any(low.offset > high.offset for low, high in itertools.pairwise(moved)):
        return "sections have another order"
    begins, ends = [found.offset for found in order], [found.end for found in order]
    grown = [_rounded(new.size - old.size) for old, new in zip(order, moved, strict=True)]
    sums = [0, *itertools.accumulate(grown)]
    for old, new in zip(before.segments, after.segments, strict=True):
        if not _is_same_header(before, old, after, new, _SEGMENT_FIXED):
            return "a segment's header differs"
        # No two sections overlap, so those within a segment are neighbours.
        first = bisect.bisect_left(begins, old.offset)
        last = bisect.bisect_right(ends, old.offset + old.file_bytes)
        added = sums[last] - sums[first] if first < last else 0
        if first < last and not (
            new.offset <= moved[first].offset and moved[last - 1].end <= new.offset + new.file_bytes
        ):
            return f"section {order[first].name} or one behind it left its segment"
        if new.memory_bytes - new.file_bytes != old.memory_bytes - old.file_bytes or not (
            0 <= new.file_bytes - old.file_bytes <= added
        ):
            return f"a segment has {new.file_bytes} bytes, {old.file_bytes} before"
    return None


def _is_same_header(
    before: Cubin,
    old: Section | Segment,
    after: Cubin,
    new: Section | Segment,
    parts: tuple[tuple[int, int], ...],
) -> bool:
    was, now = old.header_offset, new.header_offset
    return all(
        before.data[was + begin : was + end] == after.data[now + begin : now + end]
        for begin, end in parts
    )


def _rounded(size: int) -> int:
    return size + -size % sass.BOUNDARY_BYTES
