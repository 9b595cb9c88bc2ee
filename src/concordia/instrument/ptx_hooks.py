"""The text of entry and exit hooks, floor 3.

Owns: how a block counts itself in and out. Promises: the first thread of a block adds one to a word
that its multiprocessor chooses; at an exit its own writes are visible first; registers and names
are in a scope of their own. Called by ptx. It waits for nothing: other threads of the block may run
on when it counts out.
"""

from __future__ import annotations

from concordia import abi
from concordia.instrument.ptx_control import Control


def entry_hook(prefix: str, control: Control) -> str:
    """For the head of a kernel."""
    return _count(prefix, control, abi.CONTROL_ENTRY_OFFSET, "")


def exit_hook(prefix: str, control: Control, guard: str) -> str:
    """For the place before an instruction that leaves; `guard` is that instruction's."""
    return _count(prefix, control, abi.CONTROL_EXIT_OFFSET, guard)


def _count(prefix: str, control: Control, words: int, guard: str) -> str:
    p = prefix
    first = f"setp.eq.u32 {p}first, {p}x, 0;"
    if guard:
        first = f"setp.eq.and.u32 {p}first, {p}x, 0, {guard};"
    lines = [
        "{",
        f".reg .pred {p}first;",
        f".reg .b32 {p}x, {p}y;",
        f".reg .b64 {p}word, {p}index;",
        f"mov.u32 {p}x, %tid.x;",
        f"mov.u32 {p}y, %tid.y;",
        f"or.b32 {p}x, {p}x, {p}y;",
        f"mov.u32 {p}y, %tid.z;",
        f"or.b32 {p}x, {p}x, {p}y;",
        first,
        f"mov.u32 {p}y, %smid;",
        f"and.b32 {p}y, {p}y, {abi.CONTROL_PROGRESS_WORDS - 1};",
        f"mul.wide.u32 {p}index, {p}y, {abi.CONTROL_PROGRESS_STRIDE};",
        control.load(f"{p}word"),
        *([f"setp.ne.and.u64 {p}first, {p}word, 0, {p}first;"] if control.may_be_missing else []),
        f"add.s64 {p}word, {p}word, {p}index;",
        *([f"@{p}first membar.gl;"] if words == abi.CONTROL_EXIT_OFFSET else []),
        f"@{p}first red.global.add.u64 [{p}word+{words}], 1;",
        "}",
    ]
    return "".join(f"\n\t{line}" for line in lines) + "\n\t"
