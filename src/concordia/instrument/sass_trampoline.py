"""The trampoline of a store in machine code, floor 3.

Owns: what a store becomes. It is a branch to its trampoline: the sum of its address, the store
itself, the mark, a branch back. Promises: the store is the same instruction under the same guard;
nothing else is written but registers from a base on, which the kernel does not have: so nothing
needs to be known of what is live. Called by splice and sass_proof. Which kernels have marks is
sass_marks's.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from concordia import config
from concordia.instrument import sass
from concordia.instrument.sass_mark_code import (
    mark_code,
    read_scoreboard,
    settled,
    shifted,
)
from concordia.instrument.sass_registers import LOADS, STORES, opcode_of, renamed
from concordia.instrument.sass_stores import NO_REGISTER, StoreSite

# A mark comes after its store, like those in PTX. The address is taken before, because an atomic
# may overwrite its register. The mark's loads and its store have the store's guard: where no lane
# stores, the descriptor of the store may never have been loaded. An atomic that writes a predicate
# may write its guard: its mark goes without both. Lanes that do not store have the address of the
# offset alone there, below 16 MiB or above 2^63, where no window is. No test of the address space
# is needed: local and shared memory lie in windows of their own in the generic space, where no
# allocation is.
_STEP: Final = sass.INSTRUCTION_BYTES
_MEMORY: Final = frozenset((*LOADS, *STORES))


@dataclass(frozen=True, slots=True)
class Trampolines:
    """Code for the end of a function, and what changes in it. Offsets are bytes from its begin."""

    code: bytes
    low_at: tuple[int, ...]
    high_at: tuple[int, ...]
    patches: tuple[tuple[int, bytes], ...]


def trampolines(
    sites: Sequence[StoreSite],
    code: bytes | memoryview,
    *,
    at: int,
    base: int,
    page_shift: int,
) -> Trampolines:
    """What goes to byte `at` of a function of this code, in registers from `base` on."""
    out: list[bytes] = []
    low_at: list[int] = []
    high_at: list[int] = []
    patches: dict[int, bytes] = {}
    places = {site.at for site in sites}
    for site in sites:
        patches[site.at] = leading(site, at)
        before = site.at - _STEP
        # An operand that is kept for the store must not be taken for one of the trampoline.
        if before >= 0 and before not in places:
            kept = bytes(code[before : site.at])
            if kept != _forgetting(kept):
                patches[before] = _forgetting(kept)
        body, control = trampoline(site, base, page_shift)
        out += (body, sass.branch(at + len(body), site.at + _STEP))
        low_at.append(at + control)
        high_at.append(at + control + _STEP)
        at += len(body) + _STEP
    return Trampolines(b"".join(out), tuple(low_at), tuple(high_at), tuple(patches.items()))


def leading(site: StoreSite, target: int) -> bytes:
    """The branch instead of a store: for all lanes, once the store could be issued and the mark
    before has read its registers.
    """
    low, high = struct.unpack("<QQ", sass.branch(site.at, target))
    told = 1 << read_scoreboard(mark_code().mark(None)) | 1 << read_scoreboard(mark_code().mark(0))
    waits = site.high & sass.WAIT_ALL | told << sass.WAIT_SHIFT
    return struct.pack("<QQ", low, high & ~sass.WAIT_ALL | waits)


def trampoline(site: StoreSite, base: int, page_shift: int) -> tuple[bytes, int]:
    """Its code up to the branch back, and where in it the control block's address goes: the low
    half, and the high one behind it.
    """
    head = _head(site.low & (sass.GUARD_MASK | 0xFF << 24), base)
    offset = site.offset & (1 << 64) - 1
    moves = _moves(base)
    low = moves[0][:4] + (offset & 0xFFFFFFFF).to_bytes(4, "little") + moves[0][8:]
    high = moves[1][:4] + (offset >> 32).to_bytes(4, "little") + moves[1][8:]
    store = _forgetting(struct.pack("<QQ", site.low, site.high))
    begin = b"".join((low, high, moves[2], head, store))
    control = len(begin)
    guard, descriptor = site.guard, site.descriptor
    if site.writes_predicate:
        guard, descriptor = sass.ALWAYS << 12, None
    return b"".join((begin, *moves[3:], _mark(base, page_shift, descriptor, guard))), control


@functools.cache
def trampoline_bytes() -> int:
    """Of the largest."""
    codes = mark_code()
    mark = max(len(codes.described.code), len(codes.bare.code))
    return mark + len(codes.sum.code) + 7 * _STEP


@functools.cache
def mark_registers() -> int:
    """That a mark names, from its base on."""
    codes = mark_code()
    return max(codes.described.registers, codes.bare.registers)


def stated_for_marks(base: int) -> int:
    """That a kernel must state whose marks are in registers from `base` on."""
    return base + mark_registers() + sass.REGISTERS_KEPT


def _forgetting(instruction: bytes) -> bytes:
    """The same, with no operand kept for the next one."""
    low, high = struct.unpack("<QQ", instruction)
    return struct.pack("<QQ", low, high & ~sass.KEPT_MASK)


@functools.lru_cache(maxsize=config.MARK_PIECES_MAX)
def _moves(base: int) -> tuple[bytes, ...]:
    """Offset low and high, one, control block low and high."""
    codes = mark_code()
    mark = codes.described
    assert (mark.address, mark.other, mark.one) == (
        codes.bare.address,
        codes.bare.other,
        codes.bare.one,
    )
    targets = (mark.address, mark.address + 1, mark.one, mark.other, mark.other + 1)
    moves = [renamed(codes.move, {0: base + target}) for target in targets]
    moves[2] = moves[2][:4] + (1).to_bytes(4, "little") + moves[2][8:]
    return tuple(moves)


@functools.lru_cache(maxsize=config.MARK_PIECES_MAX)
def _head(guard_and_register: int, base: int) -> bytes:
    """The sum of the address, for the lanes that store."""
    codes = mark_code()
    register = guard_and_register >> 24
    pair = (register, register + 1) if register != NO_REGISTER else (NO_REGISTER, NO_REGISTER)
    target = base + codes.described.address
    code = renamed(
        codes.sum.code,
        {
            codes.sum.address: pair[0],
            codes.sum.address + 1: pair[1],
            codes.sum.other: target,
            codes.sum.other + 1: target + 1,
            codes.sum.one: base + codes.described.one,
        },
    )
    out = bytearray()
    for at in range(0, len(code), _STEP):
        low, high = struct.unpack_from("<QQ", code, at)
        low = low & ~sass.GUARD_MASK | guard_and_register & sass.GUARD_MASK
        out += struct.pack("<QQ", low, high)
    return bytes(out[:-_STEP]) + settled(bytes(out[-_STEP:]))


@functools.lru_cache(maxsize=config.MARK_PIECES_MAX)
def _mark(base: int, page_shift: int, descriptor: int | None, guard: int) -> bytes:
    piece = mark_code().mark(descriptor)
    moved = {number: base + number for number in range(piece.registers)}
    code = bytearray(shifted(renamed(piece.code, moved, descriptor or 0), page_shift))
    for at in range(0, len(code), _STEP):
        low, high = struct.unpack_from("<QQ", code, at)
        if opcode_of(low, high) in _MEMORY:
            struct.pack_into("<Q", code, at, low & ~sass.GUARD_MASK | guard)
    return bytes(code)
