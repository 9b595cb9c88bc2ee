"""A rewritten text, run by the interpreter: what it marks, counts and writes.

Owns: the addresses of buffer, control block and map, and reading them after a run. Called by test_instrument_ptx*.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from concordia.instrument.ptx import PtxRewritten
from concordia.instrument.report import fill
from ptx_interpreter import SHARED_WINDOW, Machine, Memory

BUFFER = SHARED_WINDOW + (16 << 20)
CONTROL, MAP = 0x7F80_0000_0000, 0x7F90_0000_0000
MAP_STRIDE = 8192 + 64  # of copies of the map
COPIES = 16
ALL_BEFORE = -(16 << 20)  # a window from here covers what generic addresses of shared memory are


@dataclass(frozen=True)
class Ran:
    """What is there afterwards."""

    data: bytes
    marked: frozenset[int]  # in any copy of the map
    copies: frozenset[int]  # in which something is marked
    entries: tuple[int, ...]
    exits: tuple[int, ...]


def run(text: str, kernel: str, *, buffer_bytes: int, threads: int, blocks: int, window: tuple[int, int] = (0, 0), copies: int = COPIES, control_at: int = CONTROL) -> Ran:
    """One launch over a buffer of zeroes; `window` counts from the buffer's first byte. `control_at` is what a text for an assembler reads."""
    memory = Memory()
    data, control, page_map = memory.add(BUFFER, buffer_bytes), memory.add(CONTROL, 0x10000), memory.add(MAP, copies * MAP_STRIDE)
    for at, word in ((0x08, BUFFER + window[0]), (0x10, window[1]), (0x18, MAP), (0x28, copies - 1 << 32 | MAP_STRIDE)):
        control[at : at + 8] = word.to_bytes(8, "little")
    machine = Machine(text, memory, threads=threads, blocks=blocks)
    machine.constants["__concordia_control"] = control_at
    machine.launch(kernel, [BUFFER])
    assert set(page_map) <= {0, 1}
    entries, exits = (tuple(int.from_bytes(control[at : at + 8], "little") for at in range(begin, begin + 256 * 64, 64)) for begin in (0x100, 0x4100))
    marks = [divmod(at, MAP_STRIDE) for at, byte in enumerate(page_map) if byte]
    return Ran(bytes(data), frozenset(page for _, page in marks), frozenset(copy for copy, _ in marks), entries, exits)


def filled(rewritten: PtxRewritten) -> str:
    """The text as it is loaded."""
    return fill(rewritten.text.encode(), rewritten.slots, CONTROL).decode()
