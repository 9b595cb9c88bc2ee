"""Where a hook in PTX has the control block's address from, floor 3.

Owns: `Control`: an immediate that is filled in before a driver compiles the text, or a variable of
the module for a text that an assembler compiles. Promises: a variable is a word of the constant
bank, which costs no access to memory; while it is 0 nothing is read or written through it. Called
by ptx_marks and ptx_hooks. Who fills it in is not its matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SLOT: Final = "0x" + "0" * 16  # the control block's address, once it is known


@dataclass(frozen=True, slots=True)
class Control:
    """`variable` is the name of the constant that has the address; empty for an immediate."""

    variable: str = ""

    def load(self, register: str) -> str:
        """The line that brings the address into a register."""
        if self.variable:
            return f"ld.const.u64 {register}, [{self.variable}];"
        return f"mov.u64 {register}, {SLOT};"

    @property
    def may_be_missing(self) -> bool:
        """Whether the address has to be looked at before it is used."""
        return bool(self.variable)
