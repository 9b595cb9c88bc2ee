"""The code of the hooks, floor 3.

Owns: `hooks_sm90.json`, machine code that the pinned compiler made of hook_entry.ptx and
hook_exit.ptx, and its making (`python -m concordia.instrument.hook`). Promises: nothing in it was
written by hand; the address of the control block is zeros at places that are known; an entry hook
leaves no barrier open, and each of its memory operations has a scoreboard to wait for; an exit hook
writes nothing that lanes of a warp share. It counts when the first thread of a CTA leaves, whatever
the others do. Called by splice and proof. A test compiles afresh and compares.
"""

from __future__ import annotations

import functools
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from concordia import abi
from concordia.errors import CompileError
from concordia.instrument import sass
from concordia.instrument.elf import (
    ATTRIBUTE_REGISTERS,
    INFO,
    TEXT,
    read_attributes,
    read_cubin,
)

HERE: Final = Path(__file__).resolve().parent
GOLDEN: Final = HERE / "hooks_sm90.json"
ARCHITECTURE: Final = "sm_90"
# stand-ins for the halves of the address. A sum with LOW carries over from any offset on, so the
# compiler cannot do without the carry.
STAND_INS: Final = (0xFFFFFF00, 0x11223344)
# whatever setmaxnreg leaves to a warp (24 at least), and no occupancy is lost for them
REGISTERS_MAX: Final = 24
_SYMBOL: Final = "hook"
_BASE_BARRIER: Final = 0x11D  # BAR, in all forms of its operands
_REDUCE: Final = 0x18E
_BARRIER_WAIT: Final = 0x941  # BSYNC


@dataclass(frozen=True, slots=True)
class HookCode:
    """A hook: instructions that run in place, wherever they lie. Offsets are bytes of `code`."""

    code: bytes
    low_at: tuple[int, ...]  # instructions that take the low half of the control block's address
    high_at: tuple[int, ...]
    exits: tuple[int, ...]
    registers: int


@functools.cache
def entry_hook() -> HookCode:
    """What runs before a kernel's first instruction, by every thread, with nothing of its own."""
    return _shipped("entry")


@functools.cache
def exit_hook() -> HookCode:
    """What runs instead of a kernel's EXIT; ends with the only one in it."""
    return _shipped("exit")


def compile_hooks(stand_ins: tuple[int, int] = STAND_INS) -> dict[str, HookCode]:
    """Both, by the compiler of this environment; raises CompileError for code that breaks a
    promise.
    """
    entry = _compiled("hook_entry.ptx", stand_ins, optimization=3)
    end = int(np.flatnonzero(_bases(entry[0]) == _BASE_BARRIER)[0]) * sass.INSTRUCTION_BYTES
    # Unoptimized, the address is two plain moves, uniform registers are left alone and each
    # instruction waits for the one before.
    leaving = _compiled("hook_exit.ptx", stand_ins, optimization=0)
    last = int(np.flatnonzero(_bases(leaving[0]) == (sass.EXIT & sass.BASE_MASK))[-1])
    hooks = {
        "entry": _hook(entry[0][:end], entry[1], stand_ins),
        "exit": _hook(leaving[0][: (last + 1) * sass.INSTRUCTION_BYTES], leaving[1], stand_ins),
    }
    _check_entry(hooks["entry"])
    _check_exit(hooks["exit"])
    return hooks


def _shipped(name: str) -> HookCode:
    found = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    return HookCode(
        code=bytes.fromhex("".join(found["code"])),
        low_at=tuple(found["low_at"]),
        high_at=tuple(found["high_at"]),
        exits=tuple(found["exits"]),
        registers=found["registers"],
    )


def _compiled(file: str, stand_ins: tuple[int, int], *, optimization: int) -> tuple[bytes, int]:
    """Code without the load of the stack pointer, and registers."""
    from concordia.device.nvrtc import link_cubin

    text = (HERE / file).read_text(encoding="utf-8")
    for word, value in {
        "LOW": f"{stand_ins[0]:#x}",
        "HIGH": f"{stand_ins[1]:#x}",
        "STRIDE": abi.CONTROL_PROGRESS_STRIDE,
        "ENTRIES": abi.CONTROL_ENTRY_OFFSET,
        "EXITS": abi.CONTROL_EXIT_OFFSET,
    }.items():
        text = text.replace(f"@{word}@", str(value))
    linked = link_cubin(
        [text.encode()], name=file, architecture=ARCHITECTURE, optimization=optimization
    )
    cubin = read_cubin(linked)
    (code,) = (section for section in cubin.sections if section.name == TEXT + _SYMBOL)
    (info,) = (section for section in cubin.sections if section.name == INFO)
    (registers,) = (
        struct.unpack_from("<I", linked, attribute.offset + 4)[0]
        for attribute in read_attributes(cubin, info)
        if attribute.code == ATTRIBUTE_REGISTERS
    )
    return bytes(cubin.bytes_of(code))[sass.INSTRUCTION_BYTES :], registers


def _hook(code: bytes, registers: int, stand_ins: tuple[int, int]) -> HookCode:
    """The code with zeros instead of the stand-ins."""
    blank = bytearray(code)
    found: list[tuple[int, ...]] = []
    for value in stand_ins:
        wanted = value.to_bytes(4, "little")
        places = range(0, len(code), sass.INSTRUCTION_BYTES)
        at = tuple(place for place in places if code[place + 4 : place + 8] == wanted)
        for place in at:
            blank[place + 4 : place + 8] = bytes(4)
        found.append(at)
    if not all(found):
        raise CompileError("a hook without the address of the control block")
    exits = np.flatnonzero(_bases(code) == (sass.EXIT & sass.BASE_MASK)) * sass.INSTRUCTION_BYTES
    low_at, high_at = found
    return HookCode(bytes(blank), low_at, high_at, tuple(map(int, exits)), registers)


def _check_entry(hook: HookCode) -> None:
    code, opcodes = sass.words(hook.code), sass.opcodes(sass.words(hook.code))
    reduced = np.flatnonzero(opcodes & sass.BASE_MASK == _REDUCE)
    read = code[reduced, 1] >> np.uint64(sass.READ_SHIFT) & np.uint64(sass.SCOREBOARD_NONE)
    opened = int((opcodes == sass.BARRIER_SET).sum())
    if (
        len(reduced) != 1
        or int(read[0]) == sass.SCOREBOARD_NONE
        or opened != int((opcodes == _BARRIER_WAIT).sum())
        or opcodes[-1] != _BARRIER_WAIT
        or hook.exits
        or hook.registers > REGISTERS_MAX
    ):
        raise CompileError("the compiler made another form of entry hook: look at it")


def _check_exit(hook: HookCode) -> None:
    code = sass.words(hook.code)
    opcodes = sass.opcodes(code)
    is_barrier = (opcodes == sass.BARRIER_SET) | (opcodes == _BARRIER_WAIT)
    is_fence = opcodes & sass.BASE_MASK == sass.BASE_FENCE
    if (
        is_barrier.any()
        or sass.writes_uniform(opcodes).any()
        or not is_fence.any()
        or hook.exits != (len(hook.code) - sass.INSTRUCTION_BYTES,)
        or hook.registers > REGISTERS_MAX
    ):
        raise CompileError("the compiler made another form of exit hook: look at it")


def _bases(code: bytes) -> Any:
    return sass.opcodes(sass.words(code)) & sass.BASE_MASK


def _write() -> None:
    from concordia.device.nvrtc import versions

    golden: dict[str, Any] = {"compiler": versions(), "architecture": ARCHITECTURE}
    for name, hook in compile_hooks().items():
        step = sass.INSTRUCTION_BYTES
        code = [hook.code[at : at + step].hex() for at in range(0, len(hook.code), step)]
        golden[name] = asdict(hook) | {"code": code}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _write()
