"""The facts that a cubin states about its functions, floor 2.

Owns: reading ELF sections, symbols and NVIDIA's `.nv.info` attributes. Promises: nothing is loaded
or run, no CUDA is needed, and a file that does not parse is a CompileError, never a guess. Called
by loader.py for the lint and by the tests of every kernel. Does not judge the facts: loader.py
does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from concordia.errors import CompileError

# Codes of `.nv.info` attributes, as cuobjdump names them.
_ATTRIBUTE_FRAME_SIZE = 0x11
_ATTRIBUTE_REGISTER_COUNT = 0x2F
_ATTRIBUTE_BARRIER_COUNT = 0x4C
# a 16-bit size and that many bytes follow; every other format is 4 bytes in all
_FORMAT_SIZED = 0x04

_SYMBOL_FUNCTION = 2
_SECTION_RELOCATIONS = 4
_SECTION_NO_BITS = 8
_INSTRUCTION_BYTES = 16
# the low 12 bits of an instruction; seen on sm_90 (nvdisasm: CALL.ABS)
_OPCODE_CALL_ABSOLUTE = 0x943
_INFO = ".nv.info"


@dataclass(frozen=True, slots=True)
class Section:
    """One section: where its bytes lie in the file."""

    name: str
    offset: int
    size: int
    kind: int
    link: int
    target: int  # of relocations: index of the section that they fill in


@dataclass(frozen=True, slots=True)
class Facts:
    """What the code needs from whoever launches or calls it; zero where a function does not say."""

    registers: dict[str, int]
    frame_bytes: dict[str, int]
    barriers: dict[str, int]
    functions: frozenset[str]
    undefined: frozenset[str]
    constant_banks: frozenset[int]
    shared_bytes: int
    dangling_calls: int  # to an absolute address that no relocation fills in

    @property
    def registers_max(self) -> int:
        return max(self.registers.values(), default=0)

    @property
    def frame_bytes_total(self) -> int:
        """All frames together: no call chain without recursion can need more."""
        return sum(self.frame_bytes.values())

    @property
    def barriers_max(self) -> int:
        return max(self.barriers.values(), default=0)


def read_facts(cubin: bytes) -> Facts:
    """Read a linked cubin; raises CompileError for anything that is not one."""
    try:
        return _read(cubin)
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        raise CompileError(f"not a readable cubin of {len(cubin)} bytes: {error}") from error


def initial_word(cubin: bytes, symbol: str) -> int | None:
    """The 64 bits that a global variable starts with; None when there is no such variable."""
    try:
        sections = _sections(cubin)
        for name, value, home in _placed(cubin, sections):
            if name == symbol and home and sections[home].kind != _SECTION_NO_BITS:
                (word,) = struct.unpack_from("<Q", cubin, sections[home].offset + value)
                return int(word)
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        raise CompileError(f"not a readable cubin of {len(cubin)} bytes: {error}") from error
    return None


def _read(cubin: bytes) -> Facts:
    sections = _sections(cubin)
    symbols = list(_symbols(cubin, sections))
    names = [name for name, _, _ in symbols]
    registers: dict[str, int] = {}
    frames: dict[str, int] = {}
    barriers: dict[str, int] = {}
    for section in sections:
        if section.name == _INFO:
            for code, value in _attributes(cubin, section):
                if code == _ATTRIBUTE_REGISTER_COUNT:
                    registers[names[value[0]]] = value[1]
                elif code == _ATTRIBUTE_FRAME_SIZE:
                    frames[names[value[0]]] = value[1]
        elif section.name.startswith(_INFO + "."):
            for code, value in _attributes(cubin, section):
                if code == _ATTRIBUTE_BARRIER_COUNT:
                    barriers[section.name[len(_INFO) + 1 :]] = value[0]
    return Facts(
        registers=registers,
        frame_bytes=frames,
        barriers=barriers,
        functions=frozenset(n for n, kind, home in symbols if kind == _SYMBOL_FUNCTION and home),
        undefined=frozenset(
            n for n, _, home in symbols if n and not home and not n.startswith(".nv.")
        ),
        constant_banks=frozenset(_constant_banks(sections)),
        shared_bytes=sum(s.size for s in sections if s.name.startswith(".nv.shared")),
        dangling_calls=_dangling_calls(cubin, sections),
    )


def _sections(cubin: bytes) -> list[Section]:
    if cubin[:4] != b"\x7fELF" or cubin[4] != 2:
        raise ValueError("no 64-bit ELF")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    raw = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * entry) for i in range(count)]
    names_at = raw[names_index][4]
    found = []
    for name, kind, _, _, offset, size, link, target, *_ in raw:
        if kind not in (0, _SECTION_NO_BITS) and offset + size > len(cubin):
            raise ValueError("a section ends beyond the file")
        found.append(Section(_text(cubin, names_at + name), offset, size, kind, link, target))
    return found


def _symbols(cubin: bytes, sections: list[Section]) -> Iterator[tuple[str, int, int]]:
    """Name, type and section index (0: undefined) of each symbol, in the table's order."""
    for table in (s for s in sections if s.name == ".symtab"):
        names_at = sections[table.link].offset
        for at in range(table.offset, table.offset + table.size, 24):
            name, info, _, home = struct.unpack_from("<IBBH", cubin, at)
            yield _text(cubin, names_at + name), info & 0xF, home


def _placed(cubin: bytes, sections: list[Section]) -> Iterator[tuple[str, int, int]]:
    """Name, value and section index of each symbol."""
    for table in (s for s in sections if s.name == ".symtab"):
        names_at = sections[table.link].offset
        for at in range(table.offset, table.offset + table.size, 24):
            name, _, _, home, value = struct.unpack_from("<IBBHQ", cubin, at)
            yield _text(cubin, names_at + name), value, home


def _attributes(cubin: bytes, section: Section) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Code and value words of each attribute; a value that lies in the entry itself is one word."""
    at, end = section.offset, section.offset + section.size
    while at < end:
        form, code, inline = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form == _FORMAT_SIZED:
            words = struct.unpack_from(f"<{inline // 4}I", cubin, at)
            at += inline
            yield code, words
        else:
            yield code, (inline,)


def _dangling_calls(cubin: bytes, sections: list[Section]) -> int:
    filled: dict[int, set[int]] = {}
    for table in (s for s in sections if s.kind == _SECTION_RELOCATIONS):
        places = filled.setdefault(table.target, set())
        for at in range(table.offset, table.offset + table.size, 24):
            places.add(struct.unpack_from("<Q", cubin, at)[0])
    count = 0
    for index, section in enumerate(sections):
        if not section.name.startswith(".text."):
            continue
        for offset in range(0, section.size, _INSTRUCTION_BYTES):
            (low,) = struct.unpack_from("<Q", cubin, section.offset + offset)
            is_call = low & 0xFFF == _OPCODE_CALL_ABSOLUTE and low >> 32 == 0
            count += is_call and offset not in filled.get(index, ())
    return count


def _constant_banks(sections: list[Section]) -> Iterator[int]:
    prefix = ".nv.constant"
    for section in sections:
        if section.name.startswith(prefix):
            yield int(section.name[len(prefix) :].split(".")[0])


def _text(cubin: bytes, at: int) -> str:
    return cubin[at : cubin.index(b"\0", at)].decode()
