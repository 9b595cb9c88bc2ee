"""How a shared structure is described, floor 1.

Owns: `Struct` and `Field`. Promises: a structure has no hidden padding, and its size is a multiple
of its alignment; numpy sees the bytes that C sees. Called by the rooms that lay out structures, and
by c_header. It reads and writes no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

__all__ = ["Field", "Struct"]

_DTYPES: Final = {"u8": "<u1", "u16": "<u2", "u32": "<u4", "u64": "<u8"}
C_TYPES: Final = {"u8": "uint8_t", "u16": "uint16_t", "u32": "uint32_t", "u64": "uint64_t"}
_SIZES: Final = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}


@dataclass(frozen=True, slots=True)
class Field:
    """One member: name, element type, count (1 is a scalar) and who writes it."""

    name: str
    kind: str
    count: int = 1
    note: str = ""

    @property
    def size(self) -> int:
        return _SIZES[self.kind] * self.count


@dataclass(frozen=True, slots=True)
class Struct:
    """A shared structure of `size` bytes, laid out in the order of `fields`."""

    name: str
    size: int
    fields: tuple[Field, ...]

    def offsets(self) -> dict[str, int]:
        """Byte offset of each member; raises ValueError for hidden padding or a wrong size."""
        at = 0
        found: dict[str, int] = {}
        for field in self.fields:
            if at % _SIZES[field.kind]:
                raise ValueError(f"{self.name}.{field.name} at {at} is not aligned")
            found[field.name] = at
            at += field.size
        if at != self.size:
            raise ValueError(f"{self.name} is {at} bytes, not {self.size}")
        return found

    @property
    def dtype(self) -> np.dtype[np.void]:
        """The numpy record type over the same bytes."""
        return np.dtype(
            [
                (f.name, _DTYPES[f.kind]) if f.count == 1 else (f.name, _DTYPES[f.kind], (f.count,))
                for f in self.fields
            ]
        )


def pad(size: int, name: str) -> Field:
    """Bytes that nobody reads; every gap is one, so that none is hidden."""
    return Field(name, "u8", size)
