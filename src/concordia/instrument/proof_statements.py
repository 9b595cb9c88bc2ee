"""What a cubin states of a kernel with hooks, as the proof expects it, floor 3.

Owns: `Hooked` and the statements that follow from it: registers in `.nv.info` and in a function's
sh_info, and the offsets of EXITs. Promises: they are worked out of the original file and of the
hooks that were found in the code, never taken from the file that is proven. Called by proof. It
compares nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from concordia.errors import ImageRefused
from concordia.instrument.elf import (
    ATTRIBUTE_EXIT_OFFSETS,
    ATTRIBUTE_REGISTERS,
    INFO,
    TEXT,
    Cubin,
    Section,
    read_attributes,
)

_REGISTERS_SHIFT: Final = 24


@dataclass(frozen=True, slots=True)
class Hooked:
    """A kernel that has hooks: the registers that they need, and where their EXIT lies in bytes
    from its begin; None without an exit hook.
    """

    registers: int
    exit_at: int | None


def stated_registers(cubin: Cubin) -> dict[int, int]:
    """Of kernels, by section; nothing when it cannot be read."""
    kernels = {symbol.index: symbol.section for symbol in cubin.symbols if symbol.is_kernel}
    found: dict[int, int] = {}
    try:
        for section in cubin.sections:
            for at in _register_statements(cubin, section):
                symbol, count = struct.unpack_from("<II", cubin.data, section.offset + at)
                if symbol in kernels:
                    home = kernels[symbol]
                    found[home] = max(count, found.get(home, 0))
    except ImageRefused:
        return {}
    return found


def moved_exits(cubin: Cubin, hooked: Mapping[int, Hooked]) -> dict[str, int]:
    """Where the EXITs of kernels with exit hooks are, by the name of the section that says so."""
    return {
        f"{INFO}.{cubin.sections[index].name.removeprefix(TEXT)}": found.exit_at
        for index, found in hooked.items()
        if found.exit_at is not None
    }


def expected_statements(
    cubin: Cubin, section: Section, hooked: Mapping[int, Hooked], exits: Mapping[str, int]
) -> bytes:
    """The bytes of a section once these kernels have hooks, and EXITs where `moved_exits` says.
    Raises ImageRefused.
    """
    expected = bytearray(cubin.bytes_of(section))
    if hooked and section.name == INFO:
        kernels = {symbol.index: symbol.section for symbol in cubin.symbols if symbol.is_kernel}
        for at in _register_statements(cubin, section):
            symbol, count = struct.unpack_from("<II", expected, at)
            found = hooked.get(kernels.get(symbol, -1))
            if found:
                struct.pack_into("<I", expected, at + 4, max(count, found.registers))
    elif section.name in exits:
        _move_exits(cubin, section, expected, exits[section.name])
    return bytes(expected)


def raised_info(info: int, hooked: Hooked | None) -> int:
    """sh_info of a function: registers in its high byte, where they are stated there at all."""
    registers = info >> _REGISTERS_SHIFT
    if hooked is None or not registers:
        return info
    low = info & (1 << _REGISTERS_SHIFT) - 1
    return low | max(registers, hooked.registers) << _REGISTERS_SHIFT


def _register_statements(cubin: Cubin, section: Section) -> list[int]:
    """Where in this section kernels state their registers: a symbol and a count."""
    if section.name != INFO:
        return []
    return [
        attribute.offset - section.offset
        for attribute in read_attributes(cubin, section)
        if attribute.code == ATTRIBUTE_REGISTERS and attribute.size == 8
    ]


def _move_exits(cubin: Cubin, section: Section, expected: bytearray, exit_at: int) -> None:
    """All EXITs of the kernel are that one."""
    for attribute in read_attributes(cubin, section):
        if attribute.code == ATTRIBUTE_EXIT_OFFSETS:
            count = attribute.size // 4
            at = attribute.offset - section.offset
            struct.pack_into(f"<{count}I", expected, at, *[exit_at] * count)
