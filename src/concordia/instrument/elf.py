"""Cubins: the ELF files that hold machine code, floor 3.

Owns: sections, symbols, segments and `.nv.info` attributes of both generations of the format.
Promises: nothing is read beyond a checked length and nothing that overlaps is accepted; malformed
is ImageRefused with the place. Called by image, growth, splice and proof. It changes nothing.
device/cubin.py reads facts of our own kernels by name; here are foreign files, the places of
everything in them, and bounds.
"""

from __future__ import annotations

import enum
import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument.elf_names import NameTable

_PLACE_MAX: Final = 1 << 48  # of what takes no bytes in the file: more than any device addresses
HEADER_BYTES: Final = 64
MACHINE: Final = 190
RELOCATABLE: Final = 1
EXECUTABLE: Final = 2
# identification, type, machine, version, entry, segments at, sections at, flags, header bytes,
# bytes and count of segments, of sections, names of sections
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")

SECTION_NULL: Final = 0
SECTION_CODE: Final = 1
SECTION_SYMBOLS: Final = 2
SECTION_RELOCATIONS: Final = (4, 9)  # with and without addends
# without bytes in the file: the usual kind, and the vendor's for global, local, shared and reserved
# shared memory
SECTIONS_NO_BITS: Final = frozenset({8, 0x70000007, 0x70000009, 0x7000000A, 0x70000015})
SYMBOL_FUNCTION: Final = 2
SYMBOL_ENTRY: Final = 0x10  # in st_other: a kernel, as against a function that kernels call
TEXT: Final = ".text."
INFO: Final = ".nv.info"

ATTRIBUTE_EXIT_OFFSETS: Final = 0x1C
ATTRIBUTE_REGISTERS: Final = 0x2F
_FORMATS_INLINE: Final = (1, 2, 3)
_FORMAT_SIZED: Final = 4


class Generation(enum.Enum):
    """ABI of the file, as operating system and ABI version of its identification say."""

    V1 = (0x33, 7)  # CUDA 11 and 12
    V2 = (0x41, 8)  # CUDA 13


@dataclass(frozen=True, slots=True)
class Section:
    """One section, and where its header lies."""

    index: int
    name: str
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    header_offset: int

    @property
    def end(self) -> int:
        """Of its bytes in the file."""
        return self.offset + (0 if self.kind in SECTIONS_NO_BITS else self.size)


@dataclass(frozen=True, slots=True)
class Symbol:
    """One symbol, and where it lies in the file."""

    index: int
    name: str
    kind: int
    other: int
    section: int
    value: int
    size: int
    offset: int

    @property
    def is_kernel(self) -> bool:
        return self.kind == SYMBOL_FUNCTION and bool(self.other & SYMBOL_ENTRY)


@dataclass(frozen=True, slots=True)
class Segment:
    """One program header, and where it lies."""

    offset: int
    file_bytes: int
    memory_bytes: int
    header_offset: int


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute of a `.nv.info` section; `offset` and `size` are those of its value."""

    code: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Cubin:
    """A file that was read. `generation` is None for an unknown ABI."""

    data: bytes
    kind: int
    generation: Generation | None
    architecture: int
    sections: tuple[Section, ...]
    segments: tuple[Segment, ...]
    symbols: tuple[Symbol, ...]
    segments_offset: int
    sections_offset: int

    def bytes_of(self, section: Section) -> memoryview:
        """What the section holds in the file."""
        return memoryview(self.data)[section.offset : section.end]


def architecture_of(data: bytes) -> int:
    """90 for sm_90, from the header alone; 0 for an unknown ABI."""
    flags = _HEADER.unpack_from(data)[7]
    generation = _generation(data)
    if generation is None:
        return 0
    return int(flags >> 8 & 0xFF if generation is Generation.V2 else flags & 0xFF)


def read_cubin(data: bytes) -> Cubin:
    """Read everything; raises ImageRefused for what is no whole ELF file of a GPU."""
    if len(data) < HEADER_BYTES or data[:4] != b"\x7fELF" or data[4:6] != b"\x02\x01":
        raise ImageRefused(f"no 64-bit little-endian ELF file in {len(data)} bytes")
    if len(data) > config.CUBIN_BYTES_MAX:
        raise ImageRefused(f"a cubin of {len(data)} bytes, at most {config.CUBIN_BYTES_MAX}")
    header = _HEADER.unpack_from(data)
    if header[2] != MACHINE or header[1] not in (RELOCATABLE, EXECUTABLE):
        raise ImageRefused(f"ELF file of type {header[1]} for machine {header[2]}: no cubin")
    sections = _read_sections(data, header)
    segments = _read_segments(data, header)
    cubin = Cubin(
        data=data,
        kind=header[1],
        generation=_generation(data),
        architecture=architecture_of(data),
        sections=sections,
        segments=segments,
        symbols=tuple(_read_symbols(data, sections)),
        segments_offset=header[5],
        sections_offset=header[6],
    )
    _check_apart(cubin)
    return cubin


def read_attributes(cubin: Cubin, section: Section) -> list[Attribute]:
    """All of a `.nv.info` section; raises ImageRefused for a format that is not known."""
    found, at, end = [], section.offset, section.end
    while at < end:
        if end - at < 4:
            raise ImageRefused(f"{section.name}: {end - at} bytes are left for an attribute")
        form, code, size = struct.unpack_from("<BBH", cubin.data, at)
        at += 4
        if form in _FORMATS_INLINE:
            found.append(Attribute(code, at - 2, 2))
        elif form == _FORMAT_SIZED and size <= end - at:
            found.append(Attribute(code, at, size))
            at += size
        else:
            raise ImageRefused(
                f"{section.name}: attribute {code:#x} of format {form} with {size} bytes, "
                f"{end - at} are left"
            )
    return found


def read_relocated(cubin: Cubin) -> dict[int, set[int]]:
    """Of each section, the offsets in it that relocations fill in."""
    found: dict[int, set[int]] = {}
    for table in cubin.sections:
        if table.kind not in SECTION_RELOCATIONS:
            continue
        size = 24 if table.kind == SECTION_RELOCATIONS[0] else 16
        if table.size % size:
            raise ImageRefused(f"{table.name}: {table.size} bytes of relocations")
        places = found.setdefault(table.info, set())
        view = cubin.bytes_of(table)
        places.update(struct.unpack_from("<Q", view, at)[0] for at in range(0, len(view), size))
    return found


def _generation(data: bytes) -> Generation | None:
    try:
        return Generation((data[7], data[8]))
    except ValueError:
        return None


def _read_sections(data: bytes, header: tuple[int, ...]) -> tuple[Section, ...]:
    at, size, count, names_index = header[6], header[11], header[12], header[13]
    if size != _SECTION.size or not 0 < names_index < count:
        raise ImageRefused(f"{count} section headers of {size} bytes, names in {names_index}")
    if at < HEADER_BYTES or at + count * size > len(data):
        raise ImageRefused(f"{count} section headers at {at} in {len(data)} bytes")
    raw = list(_SECTION.iter_unpack(memoryview(data)[at : at + count * size]))
    for index, fields in enumerate(raw):
        if fields[1] == SECTION_NULL:
            if fields[5]:
                raise ImageRefused(f"section {index}: {fields[5]} bytes of no kind")
            continue
        if fields[1] in SECTIONS_NO_BITS:
            if fields[4] > _PLACE_MAX:  # it is moved with the others
                raise ImageRefused(f"section {index}: of no bytes, at {fields[4]}")
            continue
        if fields[4] + fields[5] > len(data) or fields[4] < HEADER_BYTES:
            raise ImageRefused(
                f"section {index}: {fields[5]} bytes at {fields[4]} in {len(data)} bytes"
            )
    _check_names(raw[names_index][1])
    names = NameTable(data, raw[names_index][4], raw[names_index][5])
    return tuple(
        Section(
            index=index,
            name=names[fields[0]],
            kind=fields[1],
            flags=fields[2],
            address=fields[3],
            offset=fields[4],
            size=fields[5],
            link=fields[6],
            info=fields[7],
            alignment=fields[8],
            header_offset=at + index * size,
        )
        for index, fields in enumerate(raw)
    )


def _read_segments(data: bytes, header: tuple[int, ...]) -> tuple[Segment, ...]:
    at, size, count = header[5], header[9], header[10]
    if not count:
        return ()
    if size != _SEGMENT.size or at < HEADER_BYTES or at + count * size > len(data):
        raise ImageRefused(f"{count} program headers of {size} bytes at {at} in {len(data)} bytes")
    found = []
    for index, fields in enumerate(_SEGMENT.iter_unpack(memoryview(data)[at : at + count * size])):
        if fields[2] + fields[5] > len(data):
            raise ImageRefused(f"segment {index}: {fields[5]} bytes at {fields[2]}")
        if fields[6] > _PLACE_MAX:
            raise ImageRefused(f"segment {index}: {fields[6]} bytes of memory")
        found.append(Segment(fields[2], fields[5], fields[6], at + index * size))
    return tuple(found)


def _read_symbols(data: bytes, sections: tuple[Section, ...]) -> Iterator[Symbol]:
    tables = [section for section in sections if section.kind == SECTION_SYMBOLS]
    if len(tables) != 1:
        raise ImageRefused(f"{len(tables)} symbol tables, not one")
    (table,) = tables
    if table.size % _SYMBOL.size or not table.link < len(sections):
        raise ImageRefused(f"{table.name}: {table.size} bytes, names in section {table.link}")
    home = sections[table.link]
    _check_names(home.kind)
    names = NameTable(data, home.offset, home.size)
    raw = _SYMBOL.iter_unpack(memoryview(data)[table.offset : table.end])
    for index, (name, info, other, section, value, size) in enumerate(raw):
        offset = table.offset + index * _SYMBOL.size
        yield Symbol(index, names[name], info & 0xF, other, section, value, size, offset)


def _check_names(kind: int) -> None:
    if kind == SECTION_NULL or kind in SECTIONS_NO_BITS:
        raise ImageRefused("names in a section without bytes")


def _check_apart(cubin: Cubin) -> None:
    """No two of the file's parts share a byte."""
    header_end = cubin.sections_offset + len(cubin.sections) * _SECTION.size
    parts = [(0, HEADER_BYTES, "header"), (cubin.sections_offset, header_end, "section headers")]
    if cubin.segments:
        end = cubin.segments_offset + len(cubin.segments) * _SEGMENT.size
        parts.append((cubin.segments_offset, end, "program headers"))
    parts += [
        (section.offset, section.end, section.name)
        for section in cubin.sections
        if section.kind != SECTION_NULL and section.end > section.offset
    ]
    for before, after in itertools.pairwise(sorted(parts)):
        if after[0] < before[1]:
            raise ImageRefused(f"{before[2]} ends at {before[1]}, {after[2]} begins at {after[0]}")
