"""Machine code of sm_90, as far as a hook needs it, floor 3.

Owns: the fields of a 128-bit instruction that are read or set here (opcode, guard, branch offset,
scoreboards), and making a branch. Promises: it never makes any other instruction; whole functions
are looked at as arrays, not in loops. Called by hook, splice and proof. Knows no file format. The
facts are what the vendor's disassembler and compiler show.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

INSTRUCTION_BYTES: Final = 16
BOUNDARY_BYTES: Final = 128  # functions begin and end at such offsets, as the compiler's do
# Of the registers that a kernel states, the hardware keeps the last ones for itself: the compiler
# states three more than the number of its highest, and naming one of the last two ends the context.
REGISTERS_KEPT: Final = 2
ALWAYS: Final = 7  # a guard or predicate that is always true

# An instruction is two little-endian words. Low: opcode 0..11, guard 12..14 and its negation 15.
# High: bit 27 belongs to the opcode; control from bit 41 on: issue 41..45, write scoreboard 46..48,
# read scoreboard 49..51 (7: none), scoreboards waited for 52..57, operands kept 58..60.
OPCODE_MASK: Final = 0xFFF
GUARD_MASK: Final = 0xF << 12
_OPCODE_HIGH: Final = 1 << 27
PREDICATE_MASK: Final = 0xF << 23  # of BRA and EXIT: a second predicate and its negation
CONTROL_SHIFT: Final = 41
CONTROL_MASK: Final = 0x7FFFFF << CONTROL_SHIFT
WAIT_SHIFT: Final = 52
WAIT_ALL: Final = 0x3F << WAIT_SHIFT
KEPT_MASK: Final = 7 << 58
WRITE_SHIFT: Final = 46
READ_SHIFT: Final = 49
SCOREBOARD_NONE: Final = 7

LOAD_STACK_POINTER: Final = (0x00000A00FF017B82, 0x800)  # LDC R1, c[0x0][0x28]; without control
NO_OPERATION: Final = struct.pack("<QQ", 0x7918, 0x000FC00000000000)
# as the compiler issues a BRA or an EXIT: no scoreboard, five cycles
_CONTROL_BRANCH: Final = 0x7F5

BRANCH: Final = 0x947
EXIT: Final = 0x94D
CALL_RELATIVE: Final = 0x944
BARRIER_SET: Final = 0x945
SET_REGISTERS: Final = 0x19C8
BRANCHES: Final = (BRANCH, 0x1947)  # the second one by a uniform predicate
BASE_MASK: Final = 0x1FF  # of an opcode without the form of its operands
BASE_FENCE: Final = 0x192  # MEMBAR
# S2UR, R2UR, ULDC, VOTEU and the uniform arithmetic: what writes registers that a warp has but once
_UNIFORM_BASES: Final = np.array(
    [0x1C3, 0xCA, 0xB9, 0xBB, 0x82, 0x83, 0x86, 0x87, 0x8C, *range(0x90, 0xC0)], dtype=np.uint16
)

Words = NDArray[np.uint64]


def words(code: bytes | memoryview) -> Words:
    """Two columns: low and high words of each instruction."""
    return np.frombuffer(code, dtype="<u8").reshape(-1, 2)


def opcodes(code: Words) -> NDArray[np.uint16]:
    """Of every instruction; bit 12 is the one that lies apart."""
    low = code[:, 0] & np.uint64(OPCODE_MASK)
    high = (code[:, 1] >> np.uint64(15)) & np.uint64(0x1000)
    return (low | high).astype(np.uint16)


def writes_uniform(found: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Which of these opcodes may write a uniform register or predicate."""
    return np.isin(found & BASE_MASK, _UNIFORM_BASES)


def branch_targets(code: Words, at: NDArray[np.intp]) -> NDArray[np.int64]:
    """Byte offsets that the BRA at these places lead to: 56 signed bits, in units of 4 bytes, from
    the next instruction on; bits 16..23 and 34..81 of the instruction.
    """
    low, high = code[at, 0], code[at, 1]
    units = (
        ((low >> np.uint64(16)) & np.uint64(0xFF))
        | (low >> np.uint64(34)) << np.uint64(8)
        | (high & np.uint64(0x3FFFF)) << np.uint64(38)
    )
    signed = (units << np.uint64(8)).view(np.int64) >> 8
    targets: NDArray[np.int64] = (at.astype(np.int64) + 1) * INSTRUCTION_BYTES + signed * 4
    return targets


def near_targets(code: Words, at: NDArray[np.intp]) -> NDArray[np.int64]:
    """The same for BSSY and CALL.REL, whose offset is bits 34..63 and what of it lies above; only
    the low 32 bits are looked at, which no function exceeds.
    """
    low, high = code[at, 0], code[at, 1]
    units = (low >> np.uint64(34)) | (high & np.uint64(3)) << np.uint64(30)
    signed = units.astype(np.uint32).view(np.int32).astype(np.int64)
    targets: NDArray[np.int64] = (at.astype(np.int64) + 1) * INSTRUCTION_BYTES + signed * 4
    return targets


def branch(at: int, target: int) -> bytes:
    """BRA from byte `at` of a function to byte `target`, for all lanes."""
    high = (ALWAYS << 23) | (_CONTROL_BRANCH << CONTROL_SHIFT)
    low = BRANCH | (ALWAYS << 12)
    return _aimed(low, high, at, target)


def branch_instead(low: int, high: int, at: int, target: int) -> bytes:
    """BRA for exactly the lanes that this EXIT at byte `at` ends: same guard, second predicate and
    control.
    """
    low = BRANCH | (low & GUARD_MASK)
    high = high & (PREDICATE_MASK | CONTROL_MASK)
    return _aimed(low, high, at, target)


def is_plain_exit(low: int, high: int) -> bool:
    """An EXIT without a mode, which touches no scoreboard and keeps no operand."""
    none = SCOREBOARD_NONE << WRITE_SHIFT | SCOREBOARD_NONE << READ_SHIFT
    return (
        low & ~GUARD_MASK == EXIT
        and high & ((1 << CONTROL_SHIFT) - 1) & ~PREDICATE_MASK == 0
        and high & none == none
        and high & KEPT_MASK == 0
    )


def waiting(instruction: bytes) -> bytes:
    """The same instruction, issued once nothing is under way, with no operand kept."""
    low, high = struct.unpack("<QQ", instruction)
    return struct.pack("<QQ", low, (high | WAIT_ALL) & ~KEPT_MASK)


def _aimed(low: int, high: int, at: int, target: int) -> bytes:
    assert at % INSTRUCTION_BYTES == 0
    assert target % INSTRUCTION_BYTES == 0
    units = ((target - at - INSTRUCTION_BYTES) // 4) & ((1 << 56) - 1)
    low |= (units & 0xFF) << 16 | ((units >> 8) & ((1 << 30) - 1)) << 34
    return struct.pack("<QQ", low, high | units >> 38)
