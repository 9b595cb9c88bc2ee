"""What a rewrite says of an image, floor 3.

Owns: `Slot` (a place in the rewritten image that takes the address of the control block when it is
loaded), `KernelReport` and `Rewritten`. Promises: the numbers are those of the cache file, which
the shim reads; a kernel that was left alone says why. Made by ptx, splice and rewrite, stored by
cache, shown by `concordia instrument` and `concordia modules`. It decides nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

CONTROL_BLOCK: Final = 0  # the only address that a slot can ask for


class Hook(enum.IntFlag):
    """What was done to a kernel, or why it was not: bits of a kernel's entry in a cache file."""

    ENTRY = 1
    EXIT = 2
    MARKS = 4  # every store of the kernel marks its page
    OPAQUE = 8  # by policy: its library is left as it is
    LEFT_ALONE = 16  # `reason` says why
    PTX = 32  # the driver compiles this kernel from PTX
    WHOLE_REGION = 64  # it stores through tensor maps: whoever is in reach is dirty as a whole

    @property
    def is_hooked(self) -> bool:
        """Whether the kernel's code was changed."""
        return bool(self & (Hook.ENTRY | Hook.EXIT | Hook.MARKS))


class SlotKind(enum.IntEnum):
    """How an address is written into an image."""

    TEXT = 1  # PTX: sixteen lower-case hexadecimal digits, behind 0x
    LOW = 2  # low 32 bits into bytes 4..7 of a 16-byte instruction
    HIGH = 3  # high 32 bits likewise
    RAW = 4  # eight bytes, little endian


@dataclass(frozen=True, slots=True)
class Slot:
    """One place: for LOW and HIGH `offset` is that of the instruction."""

    offset: int
    kind: SlotKind
    name: int = CONTROL_BLOCK

    @property
    def bytes_used(self) -> int:
        """Bytes of the image from `offset` on that must be there."""
        return 8 if self.kind is SlotKind.RAW else 16

    def moved(self, offset: int) -> Slot:
        """The same place when its image begins at this offset of a larger one."""
        return Slot(self.offset + offset, self.kind, self.name)


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One kernel of an image."""

    name: str
    hooks: Hook
    registers: int = 0  # of a thread; 0 where the driver has yet to compile it
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The image to load instead; `image` is the original where nothing was changed."""

    image: bytes
    slots: tuple[Slot, ...]
    kernels: tuple[KernelReport, ...]
    is_changed: bool


def fill(image: bytes, slots: tuple[Slot, ...], address: int) -> bytes:
    """The image with this address in every slot, as the shim fills it."""
    filled = bytearray(image)
    low, high = (address & 0xFFFFFFFF).to_bytes(4, "little"), (address >> 32).to_bytes(4, "little")
    for slot in slots:
        at = slot.offset
        if slot.kind is SlotKind.TEXT:
            filled[at : at + 16] = f"{address:016x}".encode()
        elif slot.kind is SlotKind.RAW:
            filled[at : at + 8] = low + high
        else:
            filled[at + 4 : at + 8] = low if slot.kind is SlotKind.LOW else high
    assert len(filled) == len(image)
    return bytes(filled)
