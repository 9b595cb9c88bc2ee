"""The registers of an instruction of sm_90, floor 3.

Owns: which fields of an instruction name registers, for the opcodes that a mark's pieces are made
of and no others, and giving them other registers. Promises: nothing else of an instruction changes.
Called by sass_mark_code and sass_trampoline. A test shows every result to the vendor's
disassembler.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from concordia.instrument import sass
from concordia.instrument.sass_stores import NO_REGISTER

# Which registers the instructions of these pieces have: the destination at bits 16..23, and sources
# A at 24..31, B at 32..39, C at 64..71; D the uniform descriptor of a load, U of a store.
FIELDS: Final = {
    0x202: "dB",  # MOV
    0x802: "d",  # MOV of a constant
    0x210: "dABC",  # IADD3
    0x212: "dABC",  # LOP3
    0x812: "dAC",  # LOP3 with a constant
    0x224: "dABC",  # IMAD
    0x824: "dAC",  # IMAD by a constant
    0x225: "dABC",  # IMAD.WIDE
    0x227: "dABC",  # IMAD.HI
    0x819: "dAC",  # SHF by a constant
    0x381: "dA",  # LDG of an address alone
    0x1981: "dAD",  # LDG with a descriptor
    0x386: "AB",  # STG of an address alone
    0x1986: "ABU",  # STG with a descriptor
}
_PLACES: Final = {"d": (0, 16), "A": (0, 24), "B": (0, 32), "C": (1, 0)}
LOADS: Final = (0x381, 0x1981)
STORES: Final = (0x386, 0x1986)
_WIDE: Final = (0x225, 0x227)
_STEP: Final = sass.INSTRUCTION_BYTES


def renamed(code: bytes, registers: Mapping[int, int], descriptor: int = 0) -> bytes:
    """The code with other registers; the descriptor is the uniform pair."""
    out = bytearray()
    for at in range(0, len(code), _STEP):
        words = list(struct.unpack_from("<QQ", code, at))
        for field in FIELDS[opcode_of(*words)]:
            if field == "D":
                words[0] = words[0] & ~(0x3F << 32) | descriptor << 32
            elif field == "U":
                words[1] = words[1] & ~0x3F | descriptor
            else:
                word, shift = _PLACES[field]
                number = words[word] >> shift & 0xFF
                if number != NO_REGISTER:
                    words[word] ^= (number ^ registers[number]) << shift
        out += struct.pack("<QQ", *words)
    return bytes(out)


def registers_of(code: bytes) -> int:
    """How many, counted from the first that there is."""
    found = 0
    for at in range(0, len(code), _STEP):
        words = list(struct.unpack_from("<QQ", code, at))
        opcode = opcode_of(*words)
        for field in FIELDS[opcode]:
            word, shift = _PLACES.get(field, (0, 0))
            number = words[word] >> shift & 0xFF
            if field in _PLACES and number != NO_REGISTER:
                found = max(found, number + width_of(opcode, field, words[1]))
    return found


def opcode_of(low: int, high: int) -> int:
    """Of an instruction's two words."""
    return low & sass.OPCODE_MASK | (high >> 27 & 1) << 12


def width_of(opcode: int, field: str, high: int) -> int:
    """Registers of an operand."""
    if opcode in LOADS and field == "d":
        return {4: 1, 5: 2, 6: 4}[high >> 9 & 7]
    is_pair = field == "A" if opcode in (*LOADS, *STORES) else opcode in _WIDE and field in "dC"
    return 2 if is_pair else 1
