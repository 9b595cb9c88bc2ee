"""The machine code of store marks, floor 3.

Owns: `marks_sm90.json`, pieces that the pinned compiler made of sass_marks.ptx, their making
(`python -m concordia.instrument.sass_mark_code`), and what makes them fit. Promises:
nothing in it was written by hand; it writes no predicate, no uniform register and no register below
`base`; each piece can follow another without a hazard. Called by sass_marks and sass_proof. A test
compiles afresh and compares.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from concordia import abi
from concordia.errors import CompileError
from concordia.instrument import sass
from concordia.instrument.elf import TEXT, read_cubin
from concordia.instrument.sass_registers import FIELDS, STORES, opcode_of, registers_of, renamed

HERE: Final = Path(__file__).resolve().parent
SOURCE: Final = HERE / "sass_marks.ptx"
GOLDEN: Final = HERE / "marks_sm90.json"
ARCHITECTURE: Final = "sm_90"
# The mark's loads of four registers need a multiple of four below its first.
ALIGNMENT: Final = 4
_REGISTERS_MAX: Final = 16
_SHIFT: Final = 16  # stands for the page shift
_STAND_IN: Final = 0x11223344
_SCOREBOARD: Final = 5
_STEP: Final = sass.INSTRUCTION_BYTES

_SHIFT_FUNNEL: Final = 0x819
_MOVE: Final = 0x802
_LOAD_SHARED: Final = 0x184
_STORE_SHARED: Final = 0x188
_BARRIER: Final = 0x11D
_EXIT: Final = sass.EXIT & sass.BASE_MASK
_DESCRIBED: Final = {
    "LOADS": "ld.global.u64 window, [control + @BASE@];"
    "ld.global.v2.u64 {bytes, map}, [control + @BYTES@];",
    "STORE": "st.global.u8 [map], one;",
}
# Without a descriptor there are only accesses that bypass the first-level cache, one word each.
_BARE: Final = {
    "LOADS": "ld.mmio.relaxed.sys.global.u64 window, [control + @BASE@];"
    "ld.mmio.relaxed.sys.global.u64 bytes, [control + @BYTES@];"
    "ld.mmio.relaxed.sys.global.u64 map, [control + @MAP@];",
    "STORE": "st.mmio.relaxed.sys.global.u8 [map], one;",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """Instructions, and where they take what: first registers of the inputs and of the result."""

    code: bytes
    address: int  # a pair: of the mark the address, of the sum the address in a register
    other: int  # a pair: of the mark the control block, of the sum its offset and its result
    one: int
    registers: int


@dataclass(frozen=True, slots=True)
class MarkCode:
    """All pieces. `move` takes a constant in its bytes 4..7; a mark with a descriptor has it at the
    uniform pair 0.
    """

    move: bytes
    sum: Piece
    described: Piece
    bare: Piece

    def mark(self, descriptor: int | None) -> Piece:
        """The piece for a store with, or without, a descriptor."""
        return self.bare if descriptor is None else self.described


@functools.cache
def mark_code() -> MarkCode:
    """The pieces that are shipped."""
    found = json.loads(GOLDEN.read_text(encoding="utf-8"))
    pieces = {
        name: Piece(**(found[name] | {"code": bytes.fromhex("".join(found[name]["code"]))}))
        for name in ("sum", "described", "bare")
    }
    return MarkCode(move=bytes.fromhex(found["move"]), **pieces)


def compile_marks() -> MarkCode:
    """The pieces, by the compiler of this environment; raises CompileError for code that breaks a
    promise.
    """
    described, bare = _compiled(_DESCRIBED, 3), _compiled(_BARE, 3)
    plain = sass.words(_compiled(_DESCRIBED, 0)["move"])
    at = np.flatnonzero((plain[:, 0] >> np.uint64(32)) == _STAND_IN)
    if len(at) != 1 or int(sass.opcodes(plain)[at[0]]) != _MOVE:
        raise CompileError("the compiler moves a constant in another way: look at it")
    low, high = plain[at[0]].tolist()
    move = settled(struct.pack("<QQ", low & 0xFFFFFFFF, high & ~sass.WAIT_ALL))
    added = _piece(described["address"])
    if added.other != _result(described["address"]):
        raise CompileError("the compiler leaves the sum elsewhere: look at it")
    return MarkCode(
        move=renamed(move, {_destination(move): 0}),
        sum=added,
        described=_piece(described["mark"]),
        bare=_piece(bare["mark"]),
    )


def shifted(code: bytes, page_shift: int) -> bytes:
    """The code for pages of another size."""
    out = bytearray(code)
    for at in range(0, len(code), _STEP):
        low, high = struct.unpack_from("<QQ", code, at)
        if opcode_of(low, high) == _SHIFT_FUNNEL:
            out[at + 4 : at + 8] = page_shift.to_bytes(4, "little")
    return bytes(out)


def settled(instruction: bytes) -> bytes:
    """The same, and what follows is issued so late that its result is there: 15 cycles."""
    low, high = struct.unpack("<QQ", instruction)
    high = (high | 0xF << sass.CONTROL_SHIFT) & ~(1 << sass.CONTROL_SHIFT + 4) & ~sass.KEPT_MASK
    return struct.pack("<QQ", low, high)


def read_scoreboard(piece: Piece) -> int:
    """The one that tells when the mark's store has read its registers."""
    _, high = struct.unpack("<QQ", piece.code[-_STEP:])
    return int(high >> sass.READ_SHIFT & sass.SCOREBOARD_NONE)


def _compiled(words: Mapping[str, str], optimization: int) -> dict[str, bytes]:
    """Code of each kernel of the source."""
    from concordia.device.nvrtc import link_cubin

    text = SOURCE.read_text(encoding="utf-8")
    offsets = abi.CONTROL.offsets()
    assert offsets["map"] == offsets["window_bytes"] + 8
    for word, value in {
        **words,
        "BASE": str(offsets["window_base"]),
        "BYTES": str(offsets["window_bytes"]),
        "MAP": str(offsets["map"]),
        "SHIFT": str(_SHIFT),
        "SPARE": str(abi.CONTROL_SPARE_OFFSET),
        "SPARE_MASK": str(abi.CONTROL_SPARE_BYTES - 1),
        "STAND_IN": str(_STAND_IN),
    }.items():
        text = text.replace(f"@{word}@", value)
    cubin = read_cubin(
        link_cubin(
            [text.encode()], name=SOURCE.name, architecture=ARCHITECTURE, optimization=optimization
        )
    )
    return {
        section.name.removeprefix(TEXT): bytes(cubin.bytes_of(section))
        for section in cubin.sections
        if section.name.startswith(TEXT)
    }


def _piece(code: bytes) -> Piece:
    """What lies between the inputs and the end, with the seams made safe."""
    words = sass.words(code)
    bases = sass.opcodes(words) & sass.BASE_MASK
    loads = np.flatnonzero(bases == _LOAD_SHARED)
    inputs = {int(words[i, 0]) >> 40: int(words[i, 0]) >> 16 & 0xFF for i in loads}
    begin = int(loads[-1]) + 1
    begin += int(bases[begin] == _BARRIER)
    end = int(np.flatnonzero(np.isin(bases, [_EXIT, _STORE_SHARED]))[0])
    body = [code[at * _STEP : (at + 1) * _STEP] for at in range(begin, end)]
    unknown = [hex(opcode_of(*struct.unpack("<QQ", one))) for one in body]
    if sorted(inputs) != [0, 8, 16] or any(int(name, 16) not in FIELDS for name in unknown):
        raise CompileError(f"the compiler made another form of mark: {inputs} {unknown}")
    body[-1] = _told(settled(body[-1]))
    whole = b"".join(body)
    registers = registers_of(whole)
    if registers > _REGISTERS_MAX:
        raise CompileError("a mark needs more registers than before: look at it")
    return Piece(
        code=renamed(whole, {number: number for number in range(registers)}),
        address=inputs[0],
        other=inputs[8],
        one=inputs[16],
        registers=registers,
    )


def _result(code: bytes) -> int:
    """The register that the kernel stores at its end."""
    words = sass.words(code)
    bases = sass.opcodes(words) & sass.BASE_MASK
    (at,) = np.flatnonzero(bases == _STORE_SHARED)
    return int(words[at, 0]) >> 32 & 0xFF


def _told(instruction: bytes) -> bytes:
    """A store with a scoreboard that tells when its registers may be written again: the compiler
    gives none at a kernel's end. The last one: kernels use the others first.
    """
    low, high = struct.unpack("<QQ", instruction)
    none = sass.SCOREBOARD_NONE << sass.READ_SHIFT
    if opcode_of(low, high) in STORES and high & none == none:
        high = high & ~none | _SCOREBOARD << sass.READ_SHIFT
    return struct.pack("<QQ", low, high)


def _destination(instruction: bytes) -> int:
    return instruction[2]


def _write() -> None:
    from concordia.device.nvrtc import versions

    made = compile_marks()
    golden: dict[str, Any] = {
        "compiler": versions(),
        "architecture": ARCHITECTURE,
        "move": made.move.hex(),
    }
    for name in ("sum", "described", "bare"):
        piece: Piece = getattr(made, name)
        code = [piece.code[at : at + _STEP].hex() for at in range(0, len(piece.code), _STEP)]
        golden[name] = asdict(piece) | {"code": code}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _write()
