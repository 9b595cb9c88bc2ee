"""Hooks that an assembler compiled: what a cubin says of them, floor 3.

Owns: two variables of a module, as PTX that declares them and as a cubin has them: the word that
takes the control block's address, and a table of what was done to each kernel. Promises: a table
that is not exactly what was written, or a word that cannot be filled in, is as if there were none:
then the hooks do nothing, because the word stays 0. Called by ptx, which writes, and by rewrite,
which reads. It makes no hook.

The table, little endian: magic | u32 CRC32C of what follows | u32 page shift | u32 kernels, then
for each kernel u32 hooks | u16 bytes of name | u16 bytes of reason | name | reason.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import google_crc32c

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument.elf import (
    SECTIONS_NO_BITS,
    Cubin,
    Section,
    Symbol,
    read_cubin,
    read_relocated,
)
from concordia.instrument.report import Hook, KernelReport

CONTROL: Final = "__concordia_control"
TABLE: Final = "__concordia_hooks"
_MAGIC: Final = b"CNCHOOK1"
_HEAD: Final = struct.Struct("<8sI")
_COUNTS: Final = struct.Struct("<II")
_KERNEL: Final = struct.Struct("<IHH")
_CONTROL_SECTION: Final = ".nv.constant3"  # what the program's own constants lie in
_TABLE_SECTION: Final = ".nv.global.init"
_SYMBOL_OBJECT: Final = 1
_CONTROL_BYTES: Final = 8
_MADE: Final = Hook.ENTRY | Hook.EXIT | Hook.MARKS | Hook.WHOLE_REGION


@dataclass(frozen=True, slots=True)
class Assembled:
    """What was found in a cubin. `control_at` is the offset of the word in the file."""

    control_at: int
    page_shift: int
    kernels: tuple[KernelReport, ...]


def declarations(page_shift: int, kernels: Sequence[KernelReport]) -> str:
    """PTX for the outermost scope of a text. Raises ImageRefused for more than a table has."""
    body = _COUNTS.pack(page_shift, len(kernels)) + b"".join(map(_packed, kernels))
    table = _HEAD.pack(_MAGIC, google_crc32c.value(body)) + body
    if len(table) > config.HOOK_TABLE_BYTES_MAX:
        raise ImageRefused(f"{len(kernels)} kernels in one text: their names are too long")
    return (
        f"\n.visible .const .align {_CONTROL_BYTES} .u64 {CONTROL} = 0;\n"
        f".visible .global .align {_CONTROL_BYTES} .b8 {TABLE}[{len(table)}] = "
        f"{{{','.join(map(str, table))}}};\n"
    )


def read_assembled(data: bytes) -> Assembled | None:
    """What an assembler left of our hooks; None where there is nothing, or nothing certain."""
    if TABLE.encode() not in data:
        return None
    try:
        cubin = read_cubin(data)
        control_at = _control_at(cubin)
        table = bytes(_bytes_of(cubin, TABLE, _TABLE_SECTION))
        return Assembled(control_at, *_unpacked(table))
    except (ImageRefused, struct.error, UnicodeDecodeError):
        return None


def _control_at(cubin: Cubin) -> int:
    symbol, section = _find(cubin, CONTROL, _CONTROL_SECTION)
    filled = read_relocated(cubin).get(section.index, set())
    places = range(symbol.value - _CONTROL_BYTES + 1, symbol.value + _CONTROL_BYTES)
    if symbol.size != _CONTROL_BYTES or not filled.isdisjoint(places):
        raise ImageRefused(f"{CONTROL} has {symbol.size} bytes, or is filled in by the loader")
    if any(_bytes_of(cubin, CONTROL, _CONTROL_SECTION)):
        raise ImageRefused(f"{CONTROL} is filled in")
    return section.offset + symbol.value


def _bytes_of(cubin: Cubin, name: str, home: str) -> memoryview:
    symbol, section = _find(cubin, name, home)
    return cubin.bytes_of(section)[symbol.value : symbol.value + symbol.size]


def _find(cubin: Cubin, name: str, home: str) -> tuple[Symbol, Section]:
    """The only variable of this name, whole in its section."""
    found = [symbol for symbol in cubin.symbols if symbol.name == name]
    if len(found) != 1 or not 0 < found[0].section < len(cubin.sections):
        raise ImageRefused(f"{len(found)} times {name}")
    (symbol,), section = found, cubin.sections[found[0].section]
    if symbol.kind != _SYMBOL_OBJECT or section.name != home or section.kind in SECTIONS_NO_BITS:
        raise ImageRefused(f"{name} lies in {section.name}")
    if symbol.value + symbol.size > section.size:
        raise ImageRefused(f"{name}: {symbol.size} bytes at {symbol.value} of {section.size}")
    return symbol, section


def _packed(kernel: KernelReport) -> bytes:
    name, reason = kernel.name.encode(), kernel.reason.encode()
    if len(name) > config.KERNEL_NAME_BYTES_MAX or len(reason) > config.KERNEL_REASON_BYTES_MAX:
        raise ImageRefused(f"a kernel whose name has {len(name)} bytes")
    return _KERNEL.pack(kernel.hooks & _MADE, len(name), len(reason)) + name + reason


def _unpacked(table: bytes) -> tuple[int, tuple[KernelReport, ...]]:
    magic, crc = _HEAD.unpack_from(table)
    if magic != _MAGIC or google_crc32c.value(table[_HEAD.size :]) != crc:
        raise ImageRefused("no table of hooks")
    page_shift, count = _COUNTS.unpack_from(table, _HEAD.size)
    kernels = []
    at = _HEAD.size + _COUNTS.size
    for _ in range(count):
        hooks, name_bytes, reason_bytes = _KERNEL.unpack_from(table, at)
        at += _KERNEL.size
        end = at + name_bytes + reason_bytes
        if hooks & ~_MADE or end > len(table):
            raise ImageRefused(f"a kernel with hooks {hooks:#x}, {end} of {len(table)} bytes")
        name, reason = table[at : at + name_bytes], table[at + name_bytes : end]
        kernels.append(KernelReport(name.decode(), Hook(hooks), reason=reason.decode()))
        at = end
    if at != len(table):
        raise ImageRefused(f"{len(table) - at} bytes behind the table of hooks")
    return page_shift, tuple(kernels)
