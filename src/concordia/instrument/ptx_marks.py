"""The text of a store mark, floor 3.

Owns: how a mark is spelled in PTX: which registers it uses, what it reads of the control block, the
test and the byte store. Promises: a mark changes no register and no byte of the program; its names
begin with a prefix that occurs nowhere in the text; a page is marked after its last store of a run,
once for the run, and only for bytes that were stored. Called by ptx_walk, which knows the places.

A run: `pending` says that this thread stored to page `page` and has not marked it; a store to
another page marks it first; whatever ends the run marks it last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from concordia import abi
from concordia.instrument.ptx_control import Control
from concordia.instrument.ptx_stores import Address, Length

_WORDS: Final = abi.CONTROL.offsets()
WINDOW_BASE: Final = _WORDS["window_base"]
WINDOW_BYTES: Final = _WORDS["window_bytes"]  # the map's address follows: both in one load
MAP_STRIDE: Final = _WORDS["map_stride"]  # the number of the last copy follows: again one load


@dataclass(frozen=True, slots=True)
class MarkText:
    """Marks of one text."""

    prefix: str
    page_shift: int
    control: Control

    def declaration(self) -> str:
        """The registers, for the head of a function."""
        p = self.prefix
        return _lines(
            f".reg .pred {p}pending, {p}inside, {p}other;",
            f".reg .b32 {p}page, {p}now, {p}one;",
            f".reg .b64 {p}base, {p}bytes, {p}map, {p}at, {p}to, {p}last;",
        )

    def words(self) -> str:
        """Read the window and where this multiprocessor's copy of the map is; both halves of a pair
        are of one moment. Without a control block there is no window: no test holds.
        """
        p = self.prefix
        lines, guard = [self.control.load(f"{p}at")], ""
        if self.control.may_be_missing:
            lines += [f"mov.u64 {p}{name}, 0;" for name in ("base", "bytes", "map")]
            lines += [f"mov.u32 {p}{name}, 0;" for name in ("now", "one")]
            lines += [f"setp.ne.u64 {p}other, {p}at, 0;"]
            guard = f"@{p}other "
        return _lines(
            *lines,
            f"{guard}ld.global.u64 {p}base, [{p}at+{WINDOW_BASE}];",
            f"{guard}ld.global.v2.u64 {{{p}bytes, {p}map}}, [{p}at+{WINDOW_BYTES}];",
            f"{guard}ld.global.v2.u32 {{{p}now, {p}one}}, [{p}at+{MAP_STRIDE}];",
            f"mov.u32 {p}page, %smid;",  # nothing is pending here
            f"and.b32 {p}one, {p}one, {p}page;",
            f"mad.wide.u32 {p}map, {p}now, {p}one, {p}map;",
        )

    def kept(self, address: Address) -> str:
        """The address, before an instruction that overwrites its register."""
        return _lines(*self._address(address))

    def store(self, address: Address, guard: str, *, is_first: bool, is_kept: bool) -> str:
        """Behind a store: its page is pending; what was pending of another page is marked."""
        p = self.prefix
        test = f"{p}pending" if is_first else f"{p}inside"
        lines = [] if is_kept else self._address(address)
        lines += [f"sub.s64 {p}to, {p}at, {p}base;", _below(test, f"{p}to", f"{p}bytes", guard)]
        if address.is_generic:
            lines += [f"isspacep.global {p}other, {p}at;", f"and.pred {test}, {test}, {p}other;"]
        lines += [f"shr.u64 {p}to, {p}to, {self.page_shift};"]
        if is_first:
            return _lines(*lines, f"cvt.u32.u64 {p}page, {p}to;")
        return _lines(
            *lines,
            f"cvt.u32.u64 {p}now, {p}to;",
            f"setp.ne.and.u32 {p}other, {p}now, {p}page, {p}pending;",
            f"and.pred {p}other, {p}other, {p}inside;",
            *self._mark(f"{p}other"),
            f"@{p}inside mov.b32 {p}page, {p}now;",
            f"or.pred {p}pending, {p}pending, {p}inside;",
        )

    def flush(self) -> str:
        """The end of a run."""
        return _lines(*self._mark(f"{self.prefix}pending"))

    def range(self, address: Address, length: Length, guard: str, label: str) -> str:
        """Behind a copy: every page from its first byte to its last."""
        p = self.prefix
        loop, end = f"{label}_loop", f"{label}_end"
        lines = [f"@{_negated(guard)} bra {end};"] if guard else []
        lines += self._address(address)
        if address.is_generic:
            lines += [f"isspacep.global {p}inside, {p}at;", f"@!{p}inside bra {end};"]
        lines += self._length(length)
        return _lines(
            *lines,
            f"setp.eq.u64 {p}inside, {p}last, 0;",
            f"@{p}inside bra {end};",
            # Pages count from the window's base; those before it are negative.
            f"sub.s64 {p}at, {p}at, {p}base;",
            f"add.s64 {p}last, {p}last, {p}at;",
            f"sub.s64 {p}last, {p}last, 1;",
            f"shr.s64 {p}last, {p}last, {self.page_shift};",
            f"shr.s64 {p}at, {p}at, {self.page_shift};",
            f"mov.b32 {p}one, 1;",
            f"{loop}:",
            f"shl.b64 {p}to, {p}at, {self.page_shift};",
            f"setp.lt.u64 {p}inside, {p}to, {p}bytes;",
            f"add.s64 {p}to, {p}map, {p}at;",
            f"@{p}inside st.global.u8 [{p}to], {p}one;",
            f"add.s64 {p}at, {p}at, 1;",
            f"setp.le.s64 {p}inside, {p}at, {p}last;",
            f"@{p}inside bra {loop};",
            f"{end}:",
        )

    def _address(self, address: Address) -> list[str]:
        """Lines that leave the address in `at`."""
        at, named = f"{self.prefix}at", address.named
        if named is None:
            return [f"mov.u64 {at}, {address.offset & (1 << 64) - 1:#x};"]
        source = address.base
        lines = []
        if not named.is_register:
            lines.append(f"mov.u64 {at}, {source};")
            source = at
        elif named.bits == 32:
            lines.append(f"cvt.u64.u32 {at}, {source};")
            source = at
        return [*lines, f"add.s64 {at}, {source}, {address.offset};"]

    def _length(self, length: Length) -> list[str]:
        last = f"{self.prefix}last"
        if not length.count:
            return [f"mov.u64 {last}, {length.extra};"]
        return [
            f"mul.wide.u32 {last}, {length.count}, {length.scale};",
            f"add.s64 {last}, {last}, {length.extra};",
        ]

    def _mark(self, predicate: str) -> list[str]:
        p = self.prefix
        return [
            f"cvt.u64.u32 {p}to, {p}page;",
            f"add.s64 {p}to, {p}map, {p}to;",
            f"mov.b32 {p}one, 1;",
            f"@{predicate} st.global.u8 [{p}to], {p}one;",
        ]


def _below(predicate: str, value: str, bound: str, guard: str) -> str:
    if guard:
        return f"setp.lt.and.u64 {predicate}, {value}, {bound}, {guard};"
    return f"setp.lt.u64 {predicate}, {value}, {bound};"


def _negated(guard: str) -> str:
    return guard[1:] if guard.startswith("!") else f"!{guard}"


def _lines(*lines: str) -> str:
    """Begins with a new line, so that no comment before it goes on."""
    return "".join(f"\n\t{line}" for line in lines)
