"""Which instructions of sm_90 write global memory, and where, floor 3.

Owns: the judgement of every opcode: it writes no global memory, it is a store whose address is in
registers (`StoreSite`), it writes through a tensor map, or it cannot be followed.
Promises: an instruction that nobody looked at cannot be followed. Called by sass_marks. The facts
are what the vendor's disassembler shows for real kernels and for every form of these opcodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from concordia.instrument import sass

NO_REGISTER: Final = 255  # RZ
# Forms of a store, by full opcode. [Ra + offset] needs 64-bit addresses; desc[UR][Ra.64 + offset]
# that the uniform register is a descriptor and no part of the address, and that Ra is a pair. Bits
# are those of the high word.
_EXTENDED: Final = 1 << 8
_BARE: Final = (0x385, 0x386, 0x38A, 0x38B, 0x3A2, 0x3A3, 0x3A8, 0x3A9, 0x98E, 0x9A6)
_DESCRIBED: Final = {
    0x1985: 1 << 12 | 1 << 26,  # ST
    0x1986: 1 << 12 | 1 << 26,  # STG
    0x198A: 1 << 7 | 1 << 6,  # ATOM
    0x198E: 1 << 7 | 1 << 26,  # REDG
    0x19A2: 1 << 7 | 1 << 6,  # ATOM of floating-point numbers
    0x19A3: 1 << 7 | 1 << 6,  # ATOMG of floating-point numbers
    0x19A6: 1 << 7 | 1 << 26,  # REDG of floating-point numbers
    0x19A8: 1 << 7 | 1 << 6,  # ATOMG
}
_STORES: Final = (0x185, 0x186, 0x18A, 0x18B, 0x18E, 0x1A2, 0x1A3, 0x1A6, 0x1A8, 0x1A9)
ATOMICS: Final = (0x18A, 0x18B, 0x1A2, 0x1A3, 0x1A8, 0x1A9)
# UTMASTG UTMAREDG: the address is in a tensor map; UBLKCP UBLKRED: and a size in uniform registers
_TENSOR: Final = (0x1B5, 0x1B6)
_BULK: Final = (0x1BA, 0x1BB)
_BULK_TO_SHARED: Final = 1 << 9
_CACHE_CONTROL: Final = 0x18F
_CACHE_OPERATION: Final = 0xF << 23
_DISCARD: Final = 11 << 23  # CCTL.RML2: what was in memory is lost
# PF1 PF2 DML2 leave what is cached as it is. IVALL does not: loads behind it see what others wrote.
_CACHE_KEPT: Final = (0, 1 << 23, 10 << 23)
# LDGMC: the kernel uses multicast memory, whose other addresses nobody knows here
_MULTICAST: Final = (0x1A4, 0x1A5)
# UTMACCTL, but for the form that fetches ahead (PF): the kernel uses a map that the device made
_MAP_CONTROL: Final = 0x1B9
_MAP_FETCH: Final = 1 << 18
_SURFACES: Final = (0x199, 0x19B, 0x19D, 0x19F)  # SUST SURED SUATOM and their like
LOADS: Final = (0x180, 0x181)  # LD LDG
_PREDICATE_SHIFT: Final = 17  # of the predicate that an atomic writes
_ORDER_SHIFT: Final = 13
_ORDER_MASK: Final = 0xF
_ORDERS_WITHIN: Final = (0, 4, 5)  # plain, of constants, and those that order within a CTA

# Without a write to global memory, by base opcode, as the disassembler names them:
_HARMLESS: Final = (
    # MOV P2R R2P CS2R VOTE SEL FSEL FMNMX FSETP ISETP VIMNMX3 IADD3 LEA LOP3 IABS PRMT SHF BMSK
    *(0x002, 0x003, 0x004, 0x005, 0x006, 0x007, 0x008, 0x009, 0x00B, 0x00C, 0x00F, 0x010, 0x011),
    *(0x012, 0x013, 0x016, 0x019, 0x01B),
    # PLOP3 FMUL FADD FFMA IMAD (3) IDP DMUL DADD DSETP DFMA PREEXIT ACQBULK ELECT
    *(0x01C, 0x020, 0x021, 0x023, 0x024, 0x025, 0x027, 0x026, 0x028, 0x029, 0x02A, 0x02B, 0x02D),
    *(0x02E, 0x02F),
    # HADD2 HFMA2 (2) HMUL2 HSETP2 VIADD IMMA I2I MOVM LDSM HMMA F2FP HMNMX2 STSM I2FP VIADDMNMX
    *(0x030, 0x031, 0x035, 0x032, 0x034, 0x036, 0x037, 0x038, 0x03A, 0x03B, 0x03C, 0x03E, 0x040),
    *(0x044, 0x045, 0x046),
    # VHMNMX VIMNMX UMOV UP2UR VOTEU USEL UISETP UR2UP UIADD3 (2) ULEA ULOP3 UPRMT USHF UBMSK UPLOP3
    *(
        0x047,
        0x048,
        0x082,
        0x083,
        0x084,
        0x086,
        0x087,
        0x08C,
        0x090,
        0x097,
        0x091,
        0x092,
        0x096,
        0x099,
    ),
    *(0x09B, 0x09C),
    # UIMAD (2) ULDC (2) UFLO UBREV UPOPC R2UR FLO BREV FCHK F2F F2I I2F FRND MUFU POPC
    *(0x0A4, 0x0A5, 0x0B9, 0x0BB, 0x0BD, 0x0BE, 0x0BF, 0x0CA, 0x100, 0x101, 0x102, 0x104, 0x105),
    *(0x106, 0x107, 0x108, 0x109, 0x110, 0x111, 0x112),
    # NOP S2R DEPBAR ENDCOLLECTIVE B2R BAR BSYNC BREAK CALL (2) BSSY YIELD BRA WARPSYNC BRX EXIT
    *(0x118, 0x119, 0x11A, 0x11B, 0x11C, 0x11D, 0x141, 0x142, 0x143, 0x144, 0x145, 0x146, 0x147),
    *(0x148, 0x149, 0x14D),
    # LEPC RET BMOV (2) BPT NANOSLEEP LD LDG LDC LDL LDS STL STS SHFL ATOMS (2) CCTL MEMBAR MATCH
    *(0x14E, 0x150, 0x155, 0x156, 0x15C, 0x15D, 0x180, 0x181, 0x182, 0x183, 0x184, 0x187, 0x188),
    *(0x189, 0x18C, 0x18D, 0x18F, 0x192, 0x1A1),
    # SYNCS (2) QSPC ERRBAR LDGSTS LDGDEPBAR ARRIVES UTMALDG UTMACMDFLUSH UTMAPF UTMACCTL
    *(0x1A7, 0x1B2, 0x1AA, 0x1AB, 0x1AE, 0x1AF, 0x1B0, 0x1B4, 0x1B7, 0x1B8, 0x1B9),
    # UBLKPF STAS REDAS
    *(0x1BC, 0x1BD, 0x1BE),
    # S2UR REDUX WARPGROUP FENCE UCGABAR HGMMA IGMMA QGMMA
    *(0x1C3, 0x1C4, 0x1C5, 0x1C6, 0x1C7, 0x1F0, 0x1F1, 0x1F3),
)
_IS_KNOWN: Final = np.zeros(sass.BASE_MASK + 1, dtype=np.bool_)
_IS_KNOWN[[*_HARMLESS, *_STORES, *_TENSOR, *_BULK]] = True
_ROUND_ABOUT: Final = (0x143, 0x144, 0x149)  # CALL (2) and BRX
_SET_REGISTERS: Final = sass.SET_REGISTERS & sass.BASE_MASK


@dataclass(frozen=True, slots=True)
class StoreSite:
    """A store at byte `at` of a function: to the address in registers `register` and the one
    behind it, and `offset`; with a descriptor in a uniform pair, or without.
    """

    at: int
    low: int
    high: int
    descriptor: int | None

    @property
    def guard(self) -> int:
        """The predicate under which it stores, and its negation, where an instruction has them."""
        return self.low & sass.GUARD_MASK

    @property
    def writes_predicate(self) -> bool:
        """Whether it is an atomic that tells by a predicate what it did."""
        base = self.low & sass.BASE_MASK
        return base in ATOMICS and self.high >> _PREDICATE_SHIFT & sass.ALWAYS != sass.ALWAYS

    @property
    def register(self) -> int:
        return self.low >> 24 & 0xFF

    @property
    def offset(self) -> int:
        """Signed bytes."""
        value = self.low >> 40
        return value - (1 << 24) if value >> 23 else value


@dataclass(frozen=True, slots=True)
class Stores:
    """All of a function whose addresses are in registers, and whether others are in tensor maps."""

    sites: tuple[StoreSite, ...]
    has_tensor_maps: bool


def find_stores(code: sass.Words, opcodes: NDArray[np.uint16]) -> Stores | str:
    """Every write to global memory, or why they cannot all be followed."""
    bases: NDArray[np.uint16] = opcodes & np.uint16(sass.BASE_MASK)
    if refused := _refuse(code, opcodes, bases):
        return refused
    sites = []
    for index in np.flatnonzero(np.isin(bases, _STORES)).tolist():
        low, high = code[index].tolist()
        opcode = int(opcodes[index])
        needed = _DESCRIBED.get(opcode)
        is_bare = opcode in _BARE
        wanted = _EXTENDED | (needed or 0)
        descriptor = None if is_bare else high & 0x3F
        site = StoreSite(index * sass.INSTRUCTION_BYTES, low, high, descriptor)
        is_known = (is_bare or needed is not None) and high & wanted == wanted
        # Pairs begin at an even register.
        if not is_known or (site.register % 2 and site.register != NO_REGISTER):
            return f"a store of a form that is not known ({high:016x} {low:016x})"
        sites.append(site)
    return Stores(tuple(sites), has_tensor_maps=bool(np.isin(bases, _TENSOR).any()))


def may_wait_for_others(code: sass.Words, opcodes: NDArray[np.uint16]) -> bool:
    """Whether the kernel may look at what other CTAs do until they did it: by loads that are
    ordered among CTAs, or within a loop by atomics with a result or by plain loads behind a fence,
    which drops what is cached. The loop may lie in another function.
    """
    bases: NDArray[np.uint16] = opcodes & np.uint16(sass.BASE_MASK)
    order = code[:, 1] >> np.uint64(_ORDER_SHIFT) & np.uint64(_ORDER_MASK)
    if (np.isin(bases, LOADS) & ~np.isin(order, _ORDERS_WITHIN)).any():
        return True
    has_result = (code[:, 0] >> np.uint64(16) & np.uint64(0xFF) != NO_REGISTER) | (
        code[:, 1] >> np.uint64(_PREDICATE_SHIFT) & np.uint64(sass.ALWAYS) != sass.ALWAYS
    )
    operation = code[:, 1] & np.uint64(_CACHE_OPERATION)
    drops = (bases == _CACHE_CONTROL) & ~np.isin(operation, _CACHE_KEPT)
    looks = np.flatnonzero(np.isin(bases, ATOMICS) & has_result | drops) * sass.INSTRUCTION_BYTES
    if not len(looks):
        return False
    if np.isin(bases, _ROUND_ABOUT).any():
        return True
    at = np.flatnonzero(np.isin(opcodes, sass.BRANCHES))
    targets = sass.branch_targets(code, at)
    backward = targets <= at * sass.INSTRUCTION_BYTES
    begins, ends = targets[backward], at[backward] * sass.INSTRUCTION_BYTES
    return any(bool(((begins <= place) & (place <= ends)).any()) for place in looks.tolist())


def _refuse(code: sass.Words, opcodes: NDArray[np.uint16], bases: NDArray[np.uint16]) -> str | None:
    if (bases == _SET_REGISTERS).any():
        return "it changes how many registers its warps have"
    if np.isin(bases, _MULTICAST).any():
        return "it uses multicast memory"
    if ((bases == _MAP_CONTROL) & (code[:, 1] & np.uint64(_MAP_FETCH) == 0)).any():
        return "it uses a tensor map that the device makes"
    if np.isin(bases, _SURFACES).any():
        return "it may write surfaces"
    if (np.isin(bases, _BULK) & (code[:, 1] & np.uint64(_BULK_TO_SHARED) == 0)).any():
        return "it stores in bulk, from an address and a size in uniform registers"
    discards = code[:, 1] & np.uint64(_CACHE_OPERATION) == np.uint64(_DISCARD)
    if ((bases == _CACHE_CONTROL) & discards).any():
        return "it discards memory"
    unknown = ~_IS_KNOWN[bases]
    if unknown.any():
        return f"instruction {int(opcodes[unknown][0]):#x}, of which is not known what it writes"
    return None
