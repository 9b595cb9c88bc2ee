"""The proof that a spliced cubin is the original with hooks and nothing else, floor 3.

Owns: a comparison that trusts nothing of the splicing: it reads both files and takes the hooks from
their own file. Promises: what it passes has every instruction of the original in its place, except
a first one that is now a branch to an entry hook (which ends with that instruction and a branch
back) and EXITs that are now branches for the same lanes to an exit hook; and every other byte of
the original, except sizes, registers and exit offsets. Called by rewrite before anything is handed
out, and by tests. It repairs nothing.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from concordia.errors import ImageRefused
from concordia.instrument import sass
from concordia.instrument.elf import (
    ATTRIBUTE_EXIT_OFFSETS,
    ATTRIBUTE_REGISTERS,
    INFO,
    SECTION_NULL,
    SECTION_SYMBOLS,
    TEXT,
    Cubin,
    Section,
    read_attributes,
    read_cubin,
)
from concordia.instrument.hook import REGISTERS_MAX, HookCode, entry_hook, exit_hook
from concordia.instrument.sass_proof import compare_marks, registers_with_marks

_STEP: Final = sass.INSTRUCTION_BYTES
_SYMBOL_BYTES: Final = 24
_SYMBOL_SIZE_WORD: Final = 2  # of the three words of a symbol
_SECTION_FIELDS: Final = ("name", "kind", "flags", "address", "link", "alignment")
_REGISTERS_SHIFT: Final = 24


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
    changed: set[int] = set()
    for old, new in zip(before.sections, after.sections, strict=True):
        if any(getattr(old, field) != getattr(new, field) for field in _SECTION_FIELDS):
            return f"section {old.name}: its header differs"
        is_code = old.name.startswith(TEXT) and old.index in kernels
        if old.info != new.info and not (is_code and _is_raised(old.info, new.info, marks)):
            return f"section {old.name}: its header differs"
        if not is_code and old.size != new.size:
            return f"section {old.name}: {new.size} bytes, {old.size} before"
        if is_code and before.bytes_of(old) != after.bytes_of(new):
            if wrong := _compare_code(before, old, after, new, marks):
                return f"section {old.name}: {wrong}"
            changed.add(old.index)
    return (
        _compare_symbols(before, after, changed)
        or _compare_rest(before, after, marks)
        or _compare_segments(before, after)
    )


def _compare_code(
    before: Cubin, old: Section, after: Cubin, new: Section, marks: int | None
) -> str | None:
    ours = bytes(after.bytes_of(new))
    was, now = sass.words(before.bytes_of(old)), sass.words(ours[: old.size])
    differing = np.flatnonzero((was != now).any(axis=1)).tolist()
    marked = None if marks is None else compare_marks(before, old, after, new, marks)
    if isinstance(marked, str):
        return marked
    explained = marked.places if marked else frozenset()
    has_entry = bool(differing) and differing[0] == 0
    exits = [place for place in differing if place and place not in explained]
    first = bytes(before.bytes_of(old)[:_STEP])
    at, low, high = old.size, entry_hook(), exit_hook()
    at += -at % sass.BOUNDARY_BYTES
    if ours[old.size : at] != sass.NO_OPERATION * ((at - old.size) // _STEP):
        return "something else lies behind its code"
    if has_entry:
        if ours[:_STEP] != sass.branch(0, at):
            return "its first instruction does not lead to the hook"
        wanted = low.code + sass.waiting(first) + sass.branch(at + len(low.code) + _STEP, _STEP)
        if _blank(ours[at : at + len(wanted)], low) != wanted:
            return "the entry hook differs"
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
        at += len(wanted)
    if marked:
        if marked.begin != at:
            return "the marks lie elsewhere"
        at = marked.end
    end = sass.branch(at, at)
    end += sass.NO_OPERATION * (-(at + len(end)) % sass.BOUNDARY_BYTES // _STEP)
    return None if ours[at:] == end else "something else lies behind the hooks"


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


def _compare_symbols(before: Cubin, after: Cubin, changed: set[int]) -> str | None:
    for old, new in zip(before.sections, after.sections, strict=True):
        if old.kind != SECTION_SYMBOLS:
            continue
        was = np.frombuffer(before.bytes_of(old), "<u8").reshape(-1, _SYMBOL_BYTES // 8).copy()
        now = np.frombuffer(after.bytes_of(new), "<u8").reshape(-1, _SYMBOL_BYTES // 8)
        for symbol in before.symbols:
            if symbol.is_kernel and symbol.section in changed:
                size = after.sections[symbol.section].size
                was[symbol.index, _SYMBOL_SIZE_WORD] = size
        if not np.array_equal(was, now):
            return "a symbol differs"
    return None


def _compare_rest(before: Cubin, after: Cubin, marks: int | None) -> str | None:
    """Sections that hold no kernel and no symbol."""
    kernels = {symbol.section for symbol in before.symbols if symbol.is_kernel}
    for old, new in zip(before.sections, after.sections, strict=True):
        if old.kind in (SECTION_NULL, SECTION_SYMBOLS) or old.index in kernels:
            continue
        was, now = before.bytes_of(old), after.bytes_of(new)
        if was != now and not (
            old.name.startswith(INFO) and _is_same_info(before, old, after, new, marks)
        ):
            return f"section {old.name} differs"
    return None


def _is_same_info(
    before: Cubin, old: Section, after: Cubin, new: Section, marks: int | None
) -> bool:
    """Whether only registers were raised and exit offsets were moved."""
    expected = bytearray(before.bytes_of(old))
    for attribute in read_attributes(before, old):
        at = attribute.offset - old.offset
        value = bytes(after.bytes_of(new)[at : at + attribute.size])
        if attribute.code == ATTRIBUTE_REGISTERS and attribute.size == 8:
            was, now = struct.unpack_from("<I", expected, at + 4)[0], value[4:]
            if was <= int.from_bytes(now, "little") <= _registers_most(was, marks):
                expected[at + 4 : at + 8] = now
        elif attribute.code == ATTRIBUTE_EXIT_OFFSETS:
            expected[at : at + attribute.size] = value
    return bytes(after.bytes_of(new)) == expected


def _compare_segments(before: Cubin, after: Cubin) -> str | None:
    """Each segment covers the same sections, and no byte more than it did beside them."""
    for old, new in zip(before.segments, after.segments, strict=True):
        added = 0
        for was, now in zip(before.sections, after.sections, strict=True):
            inside = was.end > was.offset and old.offset <= was.offset
            inside = inside and was.end <= old.offset + old.file_bytes
            if inside and not new.offset <= now.offset <= now.end <= new.offset + new.file_bytes:
                return f"section {was.name} left its segment"
            added += (now.end - was.end - (now.offset - was.offset)) if inside else 0
        rounded = added + -added % sass.BOUNDARY_BYTES
        if new.memory_bytes - new.file_bytes != old.memory_bytes - old.file_bytes or not (
            0 <= new.file_bytes - old.file_bytes <= rounded
        ):
            return f"a segment has {new.file_bytes} bytes, {old.file_bytes} before"
    return None


def _registers_most(was: int, marks: int | None) -> int:
    """That a kernel may state."""
    return max(was, REGISTERS_MAX, 0 if marks is None else registers_with_marks(was))


def _is_raised(was: int, now: int, marks: int | None) -> bool:
    """Registers in the high byte of a function's sh_info."""
    low = (1 << _REGISTERS_SHIFT) - 1
    most = REGISTERS_MAX
    if marks is not None:
        most = _registers_most(was >> _REGISTERS_SHIFT, marks)
    raised = was >> _REGISTERS_SHIFT <= now >> _REGISTERS_SHIFT <= most
    return was & low == now & low and bool(was >> _REGISTERS_SHIFT) and raised
