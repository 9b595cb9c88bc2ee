"""The proof that marks of a kernel are marks and nothing else, floor 3.

Owns: a comparison of a kernel's code before and after. Promises: what it passes has a branch for
all lanes instead of every store to global memory and of nothing else; behind each branch is that
store under its guard, with the golden pieces around it on registers that the kernel did not have,
and the way back; what comes before a store differs in operands that are kept, or not at all. Called
by proof, which compares everything else: also whether the kernel states the registers that are told
here. It repairs nothing.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np

from concordia import config
from concordia.instrument import sass
from concordia.instrument.sass_mark_code import ALIGNMENT, mark_code
from concordia.instrument.sass_registers import registers_of
from concordia.instrument.sass_stores import StoreSite, find_stores
from concordia.instrument.sass_trampoline import leading, trampoline

_STEP: Final = sass.INSTRUCTION_BYTES
_MOVES: Final = 3  # of a trampoline, before the sum: the last one says where the registers begin


@dataclass(frozen=True, slots=True)
class Marked:
    """The instructions that marks explain, by index, the bytes where the trampolines lie, and the
    registers that a thread needs for them.
    """

    places: frozenset[int]
    begin: int
    end: int
    registers: int


def compare_marks(
    code: bytes, ours: bytes, *, page_shift: int, registers: int
) -> Marked | str | None:
    """What is explained in a kernel of this code that stated so many registers; None when no store
    of it was changed; what is wrong.
    """
    was, now = sass.words(code), sass.words(ours[: len(code)])
    changed = (was != now).any(axis=1)
    stores = find_stores(was, sass.opcodes(was))
    if isinstance(stores, str) or not any(changed[site.at // _STEP] for site in stores.sites):
        return None
    sites = stores.sites
    begin = _target(ours, sites[0].at)
    at, places, needed = begin, set(), 0
    if not len(code) <= begin < len(ours) or begin % _STEP:
        return f"the store at {sites[0].at} leads to {begin}"
    for site in sites:
        body = _compare_site(site, ours, at, page_shift, registers)
        if isinstance(body, str):
            return f"store at {site.at}: {body}"
        at += body.size
        needed = max(needed, body.registers)
        index = site.at // _STEP
        places.add(index)
        if index and _is_forgetting(was[index - 1].tolist(), now[index - 1].tolist()):
            places.add(index - 1)
    return Marked(frozenset(places), begin, at, needed)


@dataclass(frozen=True, slots=True)
class _Body:
    size: int
    registers: int


def _compare_site(
    site: StoreSite, ours: bytes, at: int, page_shift: int, registers: int
) -> _Body | str:
    if ours[site.at : site.at + _STEP] != leading(site, at):
        return "the branch differs"
    one = at + (_MOVES - 1) * _STEP
    if len(ours) < one + _STEP:
        return "no trampoline"
    base = ours[one + 2] - mark_code().described.one
    if base < registers or base % ALIGNMENT:
        return f"a mark from register {base} on, in a kernel of {registers}"
    wanted, control = trampoline(site, base, page_shift)
    found = bytearray(ours[at : at + len(wanted)])
    for place in (control, control + _STEP):
        found[place + 4 : place + 8] = bytes(4)
    if found != wanted:
        return "the trampoline differs"
    # As a matter of its own, whatever made the trampoline: the store is there.
    inside = at + (_MOVES * _STEP) + len(mark_code().sum.code)
    low, high = struct.unpack_from("<QQ", ours, inside)
    if (low, high) != (site.low, site.high & ~sass.KEPT_MASK):
        return "the store is another one"
    end = at + len(wanted)
    if ours[end : end + _STEP] != sass.branch(end, site.at + _STEP):
        return "no way back"
    return _Body(len(wanted) + _STEP, _stated(wanted[control:]))


@functools.lru_cache(maxsize=config.MARK_PIECES_MAX)
def _stated(mark: bytes) -> int:
    """What a kernel must state for this mark: worked out of its code, whatever planned it."""
    return registers_of(mark) + sass.REGISTERS_KEPT


def _target(code: bytes, at: int) -> int:
    """Where the branch at this byte leads."""
    index = np.array([at // _STEP], dtype=np.intp)
    return int(sass.branch_targets(sass.words(code), index)[0])


def _is_forgetting(was: list[int], now: list[int]) -> bool:
    return was != now and now == [was[0], was[1] & ~sass.KEPT_MASK]
