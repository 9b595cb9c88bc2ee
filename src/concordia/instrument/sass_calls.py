"""Where the calls in a kernel's machine code lead, floor 3.

Owns: the judgement of every call: within the kernel's own section, to an address that the linker
wrote (of which sass_marks knows what it can be), or anywhere. Promises: a call by register leads to
such an address only when the pair was filled from the linker's constants on the straight way there.
Called by sass_marks. It does not know what a called function does.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from concordia import config
from concordia.instrument import sass

_CALLS: Final = (0x143, 0x144)  # absolute, relative
_ABSOLUTE: Final = 0x943
_BY_REGISTER: Final = 0x343
_INDIRECT_BRANCH: Final = 0x149
_LOAD_CONSTANT: Final = 0xB82
# LDC: the bank is bits 54..58 of the low word; its size bits 9..11 and its mode bits 14..15 of the
# high one.
_BANK_SHIFT: Final = 54
_BANK_MASK: Final = 0x1F
_LINKER_BANK: Final = 4  # c[0x4]: addresses that relocations write
_SHAPE_MASK: Final = 7 << 9 | 3 << 14
_SHAPE_PAIR: Final = 5 << 9
_GUARD_ALWAYS: Final = sass.ALWAYS << 12
_TARGET_SHIFT: Final = 16  # of the first register that is written
_WIDEST: Final = 4  # registers that an instruction writes, but
_PRODUCTS: Final = range(0x1F0, 0x200)  # of a whole warpgroup
# MOV SEL FSETP ISETP IADD3 LEA LOP3 PRMT SHF IMAD S2R and what writes none (BSSY BRA EXIT and
# stores): a pair beside the named register is not touched
_NARROW: Final = (
    *(0x002, 0x007, 0x00B, 0x00C, 0x010, 0x011, 0x012, 0x016, 0x019, 0x024, 0x119, 0x145, 0x147),
    *(0x14D, 0x186, 0x187, 0x188),
)
_STEP: Final = sass.INSTRUCTION_BYTES


def leads_within(code: sass.Words, opcodes: NDArray[np.uint16], size: int) -> bool:
    """Whether no near call leaves the section of this size."""
    targets = sass.near_targets(code, np.flatnonzero(opcodes == sass.CALL_RELATIVE))
    return not ((targets < 0) | (targets >= size)).any()


def leads_anywhere(code: sass.Words, opcodes: NDArray[np.uint16]) -> bool:
    """Whether a call may lead to what is known to nobody: through a pointer."""
    far = _far(opcodes)
    if not len(far):
        return False
    if ((opcodes & sass.BASE_MASK) == _INDIRECT_BRANCH).any():
        return True
    landings = _landings(code, opcodes)
    return any(
        opcodes[index] != _ABSOLUTE
        and not (
            opcodes[index] == _BY_REGISTER and _is_of_linker(code, opcodes, int(index), landings)
        )
        for index in far.tolist()
    )


def has_far_calls(opcodes: NDArray[np.uint16]) -> bool:
    """Whether a call may leave the section."""
    return bool(len(_far(opcodes)))


def _far(opcodes: NDArray[np.uint16]) -> NDArray[np.intp]:
    is_call = np.isin(opcodes & sass.BASE_MASK, _CALLS)
    return np.flatnonzero(is_call & (opcodes != sass.CALL_RELATIVE))


def _landings(code: sass.Words, opcodes: NDArray[np.uint16]) -> frozenset[int]:
    """Indices that code elsewhere may go on at."""
    branches = np.flatnonzero(np.isin(opcodes, sass.BRANCHES))
    near = np.flatnonzero(np.isin(opcodes, (sass.BARRIER_SET, sass.CALL_RELATIVE)))
    targets = np.concatenate([sass.branch_targets(code, branches), sass.near_targets(code, near)])
    return frozenset((targets // _STEP).tolist())


def _is_of_linker(
    code: sass.Words, opcodes: NDArray[np.uint16], call: int, landings: frozenset[int]
) -> bool:
    """Whether the pair that a call takes was loaded, whole and for all lanes, from the linker's
    constants, on the only way to the call.
    """
    register = int(code[call, 0]) >> 24 & 0xFF
    for index in range(call, max(call - config.CALL_LOOK_BACK, 0) - 1, -1):
        if index != call:
            base = int(opcodes[index]) & sass.BASE_MASK
            if base in _CALLS or base in _PRODUCTS:
                return False
            if _may_write(code, opcodes, index, register):
                return _is_linker_pair(code, opcodes, index, register)
        if index in landings:
            return False
    return False


def _may_write(code: sass.Words, opcodes: NDArray[np.uint16], index: int, register: int) -> bool:
    """Whether an instruction may write this register or the one behind it."""
    if sass.writes_uniform(opcodes[index : index + 1])[0]:
        return False
    written = int(code[index, 0]) >> _TARGET_SHIFT & 0xFF
    widest = 1 if int(opcodes[index]) & sass.BASE_MASK in _NARROW else _WIDEST
    return register - widest < written <= register + 1


def _is_linker_pair(
    code: sass.Words, opcodes: NDArray[np.uint16], index: int, register: int
) -> bool:
    """LDC.64 of exactly this pair out of c[0x4], by every lane."""
    low, high = code[index].tolist()
    return (
        bool(opcodes[index] == _LOAD_CONSTANT)
        and low >> _TARGET_SHIFT & 0xFF == register
        and low & sass.GUARD_MASK == _GUARD_ALWAYS
        and low >> _BANK_SHIFT & _BANK_MASK == _LINKER_BANK
        and high & _SHAPE_MASK == _SHAPE_PAIR
    )
