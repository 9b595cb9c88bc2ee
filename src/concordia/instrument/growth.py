"""A cubin whose functions are longer, floor 3.

Owns: where everything of a cubin lies once bytes were added to the ends of sections. Promises:
every byte in front of, between and behind the sections is kept, what moves does so by a multiple of
every alignment, and headers and segments say where things are. Called by splice. What the added
bytes are, and which symbols cover them, is its caller's.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Mapping
from typing import Final

from concordia.instrument.elf import SECTION_NULL, Cubin

_AT_SEGMENTS: Final = 32  # in the file's header
_AT_SECTIONS: Final = 40
ALIGNMENT: Final = 128  # of functions; nothing else that has bytes in the file has a larger one


class Grown:
    """A copy of a cubin whose functions are longer; to be changed in place by who asked for it."""

    def __init__(self, cubin: Cubin, tails: Mapping[int, bytes]) -> None:
        """`tails` are bytes for the ends of these sections."""
        pieces: list[bytes | memoryview] = []
        source, at = memoryview(cubin.data), 0
        self._ends: list[int] = []
        self._shifts: list[int] = [0]
        for section in sorted((cubin.sections[i] for i in tails), key=lambda found: found.offset):
            tail = tails[section.index]
            pieces += (source[at : section.end], tail, bytes(-len(tail) % ALIGNMENT))
            at = section.end
            self._ends.append(at)
            self._shifts.append(self._shifts[-1] + len(tail) + -len(tail) % ALIGNMENT)
        pieces.append(source[at:])
        self.data = bytearray().join(pieces)
        self._point_to_moved(cubin, tails)

    def moved(self, offset: int) -> int:
        """Where what lay at this offset lies now; an end of a section is behind its tail."""
        return offset + self._shifts[bisect.bisect_right(self._ends, offset)]

    def _point_to_moved(self, cubin: Cubin, tails: Mapping[int, bytes]) -> None:
        data, moved = self.data, self.moved
        struct.pack_into("<Q", data, _AT_SECTIONS, moved(cubin.sections_offset))
        if cubin.segments:
            struct.pack_into("<Q", data, _AT_SEGMENTS, moved(cubin.segments_offset))
        for section in cubin.sections:
            if section.kind != SECTION_NULL:
                size = section.size + len(tails.get(section.index, b""))
                at = moved(section.header_offset)
                struct.pack_into("<QQ", data, at + 24, moved(section.offset), size)
        for segment in cubin.segments:
            begin = moved(segment.offset)
            grown = moved(segment.offset + segment.file_bytes) - begin - segment.file_bytes
            at = moved(segment.header_offset)
            struct.pack_into("<Q", data, at + 8, begin)
            sizes = segment.file_bytes + grown, segment.memory_bytes + grown
            struct.pack_into("<QQ", data, at + 32, *sizes)
