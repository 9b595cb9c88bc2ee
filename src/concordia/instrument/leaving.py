"""Where a kernel may be made to run something before it ends, floor 3.

Owns: the judgement whether an exit hook is safe in a kernel, from its instructions. Promises: a
reason whenever that is not provable; an instruction that nobody looked at is one. The danger: at
EXIT, operations under way may still read registers that the hook writes. The hook first waits for
all scoreboards and for a fence that goes the way of all loads and stores; what reads registers late
by another way is refused. Called by splice.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from concordia.instrument import sass

# By base opcode, with the names that the disassembler gives them. Operands are read at issue:
_AT_ISSUE: Final = (
    # MOV P2R R2P CS2R VOTE SEL FSEL FMNMX FSET FSETP ISETP VIMNMX3 IADD3 LEA LOP3 IABS PRMT SHF
    *(0x002, 0x003, 0x004, 0x005, 0x006, 0x007, 0x008, 0x009, 0x00A, 0x00B, 0x00C, 0x00F, 0x010),
    # SGXT BMSK
    *(0x011, 0x012, 0x013, 0x016, 0x019, 0x01A, 0x01B),
    # PLOP3 FMUL FADD FFMA IMAD IDP DMUL DADD DSETP DFMA PREEXIT ACQBULK ELECT HADD2 HFMA2 HMUL2
    *(0x01C, 0x020, 0x021, 0x023, 0x024, 0x025, 0x026, 0x027, 0x028, 0x029, 0x02A, 0x02B, 0x02D),
    *(0x02E, 0x02F, 0x030, 0x031, 0x032),
    # HSET2 HSETP2 VIADD IMMA I2I I2IP HMMA F2FP HMNMX2 I2FP VIADDMNMX VIMNMX
    *(0x033, 0x034, 0x035, 0x036, 0x037, 0x038, 0x039, 0x03C, 0x03E, 0x040, 0x045, 0x046, 0x048),
    # uniform arithmetic
    *(0x082, 0x083, 0x084, 0x086, 0x087, 0x08C, 0x090, 0x091, 0x092, 0x096, 0x097, 0x099, 0x09B),
    *(0x09C, 0x0A4, 0x0A5, 0x0B9, 0x0BB, 0x0BD, 0x0BE, 0x0BF, 0x0CA, 0x1C3),
    # NOP S2R DEPBAR ENDCOLLECTIVE BSYNC BREAK CALL BSSY YIELD BRA WARPSYNC BRX EXIT LEPC RET BMOV
    *(0x118, 0x119, 0x11A, 0x11B, 0x141, 0x142, 0x143, 0x144, 0x145, 0x146, 0x147, 0x148, 0x149),
    *(0x14D, 0x14E, 0x150, 0x155, 0x156),
    # BPT NANOSLEEP CGAERRBAR ERRBAR REDUX WARPGROUP FENCE UCGABAR_ARV, UCGABAR_WAIT, USETMAXREG
    *(0x15C, 0x15D, 0x1AB, 0x1C4, 0x1C5, 0x1C6, 0x1C7, 0x1C8),
)
# One queue with the fence, in order: loads, stores, atomics, shuffles, barriers, LDC, LDGSTS
_IN_ORDER: Final = (
    *(0x03B, 0x044, 0x11D, 0x180, 0x181, 0x182, 0x183, 0x184, 0x185, 0x186, 0x187, 0x188, 0x189),
    *(0x18A, 0x18B, 0x18C, 0x18D, 0x18E, 0x18F, 0x192, 0x1A1, 0x1A2, 0x1A3, 0x1A5, 0x1A6, 0x1A7),
    *(0x1A8, 0x1A9, 0x1AA, 0x1AE, 0x1AF, 0x1B0, 0x1B2),
)
# Uniform registers alone, which an exit hook leaves alone: tensor copies and bulk copies
_UNIFORM: Final = (0x1B3, 0x1B4, 0x1B5, 0x1B6, 0x1B7, 0x1B9, 0x1BA, 0x1BB)
# Read late, each from a queue of its own that is in order, so that a scoreboard of a later one
# tells of earlier ones, too: FLO BREV FCHK F2F F2I I2F FRND MUFU POPC; MOVM; B2R
_QUEUES: Final = (
    np.array([*range(0x100, 0x10A), *range(0x110, 0x114)], dtype=np.uint16),
    np.array([0x03A], dtype=np.uint16),
    np.array([0x11C], dtype=np.uint16),
)
# What may lead away: BRA BRX CALL RET EXIT BREAK BSYNC WARPSYNC and their like
_LEADING: Final = np.arange(0x140, 0x152, dtype=np.uint16)
_KNOWN: Final = np.zeros(sass.BASE_MASK + 1, dtype=np.bool_)
_KNOWN[[*_AT_ISSUE, *_IN_ORDER, *_UNIFORM]] = True
_QUEUED: Final = np.concatenate(_QUEUES)
# HGMMA, QGMMA, IGMMA, BGMMA: matrices that are multiplied while the warp goes on
_MATRIX: Final = np.arange(0x1F0, 0x1F8, dtype=np.uint16)


def refuse_exit(code: sass.Words, opcodes: NDArray[np.uint16]) -> str | None:
    """Why a kernel of these instructions gets no exit hook; None when it may have one."""
    bases: NDArray[np.uint16] = opcodes & np.uint16(sass.BASE_MASK)
    if np.isin(bases, _MATRIX).any():
        return "a warp-group's matrix product may still read registers where the kernel ends"
    none = np.uint64(sass.SCOREBOARD_NONE)
    is_answered = code[:, 1] >> np.uint64(sass.WRITE_SHIFT) & none != none
    is_read = code[:, 1] >> np.uint64(sass.READ_SHIFT) & none != none
    # An instruction that nobody looked at must tell of both.
    is_unknown = ~_KNOWN[bases] & ~np.isin(bases, _QUEUED) & ~(is_answered & is_read)
    if is_unknown.any():
        first = int(opcodes[is_unknown][0])
        return f"instruction {first:#x}, of which is not known when it reads its registers"
    if any(_is_untold(bases, is_answered | is_read, queue) for queue in _QUEUES):
        return "an instruction may still read registers where the kernel ends"
    exits = np.flatnonzero(bases == (sass.EXIT & sass.BASE_MASK))
    if not len(exits):
        return "it has no EXIT"
    for low, high in code[exits].tolist():
        if not sass.is_plain_exit(low, high):
            return f"an EXIT of a form that is not known ({high:016x} {low:016x})"
    before = code[exits[exits > 0] - 1, 1]
    if (before & np.uint64(sass.KEPT_MASK) != 0).any():
        return "an instruction before an EXIT keeps an operand"
    return None


def _is_untold(
    bases: NDArray[np.uint16], has_scoreboard: NDArray[np.bool_], queue: NDArray[np.uint16]
) -> bool:
    """Whether one of this queue may be under way at an EXIT, and no scoreboard tells of it: none is
    behind it before the code may lead away.
    """
    queued = np.isin(bases, queue)
    loose = np.flatnonzero(queued & ~has_scoreboard)
    if not len(loose):
        return False
    end = len(bases)
    telling = np.append(np.flatnonzero(queued & has_scoreboard), end)
    leading = np.append(np.flatnonzero(np.isin(bases, _LEADING)), end - 1)
    told = telling[np.searchsorted(telling, loose)]
    led = leading[np.minimum(np.searchsorted(leading, loose), len(leading) - 1)]
    return bool((told >= led).any())
