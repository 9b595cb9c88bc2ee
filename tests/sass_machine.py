"""A machine that runs the code of store marks, one thread at a time, for tests without a GPU.

Owns: the meaning of the dozen instructions that marks are made of, in words of 32 bits. Promises: an instruction, or a modifier, that it
does not know is an error; loads and stores go through dictionaries. Called by test_instrument_sass_marks.py. It knows no scoreboards.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

M32 = (1 << 32) - 1
ZERO = 255


@dataclass
class Thread:
    """Registers, 64-bit words of memory by address, and the bytes that were stored."""

    registers: dict[int, int]
    memory: dict[int, int] = field(default_factory=dict)
    stored: list[tuple[int, int]] = field(default_factory=list)
    predicate: bool = True  # of every guard

    def run(self, code: bytes, *, skip: int = -1) -> None:
        """All instructions but the one at byte `skip`, which is the kernel's own."""
        for at in range(0, len(code), 16):
            if at != skip:
                self._step(*struct.unpack_from("<QQ", code, at))

    def _step(self, low: int, high: int) -> None:
        guard = low >> 12 & 0xF
        if guard != 7 and not self.predicate:
            return
        opcode = low & 0xFFF | (high >> 27 & 1) << 12
        target, a, b, c = low >> 16 & 0xFF, low >> 24 & 0xFF, low >> 32 & 0xFF, high & 0xFF
        constant = low >> 32 & M32
        if opcode == 0x802:  # MOV of a constant
            assert high & 0xFFF == 0xF00
            self._set(target, constant)
        elif opcode == 0x210:  # IADD3
            assert (high & (1 << 8 | 1 << 11), low >> 63, high >> 13 & 0x3FF) == (0, 0, 0x3FF)
            self._set(target, self._get(a) + self._get(b) + self._get(c))
        elif opcode in (0x224, 0x824):  # IMAD, low half
            assert high & (1 << 8 | 1 << 10) == 0
            factor = constant if opcode == 0x824 else self._get(b)
            addend = -self._get(c) if high & 1 << 11 else self._get(c)
            self._set(target, self._get(a) * factor + addend)
        elif opcode in (0x225, 0x227):  # IMAD.WIDE.U32, IMAD.HI.U32
            assert high >> 8 & 0x1FF == 0, "signs and carries"
            total = self._get(a) * self._get(b) + self._pair(c)
            if opcode == 0x225:
                self._set(target, total)
                self._set(target + 1, total >> 32)
            else:
                self._set(target, total >> 32)
        elif opcode in (0x212, 0x812):  # LOP3
            table, result = high >> 8 & 0xFF, 0
            sources = self._get(a), constant if opcode == 0x812 else self._get(b), self._get(c)
            for bit in range(32):
                row = sum((source >> bit & 1) << 2 - place for place, source in enumerate(sources))
                result |= (table >> row & 1) << bit
            self._set(target, result)
        elif opcode == 0x819:  # SHF.R.W.U32 by a constant: the low word of a pair shifted right
            assert high >> 8 & 0x1FF == 0x1E
            self._set(target, (self._get(c) << 32 | self._get(a)) >> constant)
        elif opcode in (0x381, 0x1981):  # LDG of 64 or 128 bits
            words = {5: 1, 6: 2}[high >> 9 & 7]
            for word in range(words):
                value = self.memory[self._address(a, low) + 8 * word]
                self._set(target + 2 * word, value)
                self._set(target + 2 * word + 1, value >> 32)
        elif opcode in (0x386, 0x1986):  # STG.U8
            assert high >> 9 & 7 == 0
            self.stored.append((self._address(a, low), self._get(b) & 0xFF))
        else:
            raise AssertionError(f"an instruction that marks are not made of: {opcode:#x}")

    def _address(self, register: int, low: int) -> int:
        offset = low >> 40
        return self._pair(register) + offset - (offset >> 23 << 24)

    def _pair(self, register: int) -> int:
        return 0 if register == ZERO else self._get(register + 1) << 32 | self._get(register)

    def _get(self, register: int) -> int:
        return 0 if register == ZERO else self.registers[register]

    def _set(self, register: int, value: int) -> None:
        if register != ZERO:
            self.registers[register] = value & M32
