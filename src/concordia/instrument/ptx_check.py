"""Whether rewritten PTX assembles, floor 3.

Owns: asking the assembler, where there is one, before a driver compiles what was rewritten.
Promises: no GPU and no driver needed; bounded in time, in a process of its own, because a driver's
compiler is the same code: what crashes here would crash the program; what the assembler does not
take of the original either says nothing of the rewrite (it is older than the text). Called by
rewrite. It looks into no text.
"""

from __future__ import annotations

from typing import Final

from concordia import config
from concordia.device.nvrtc import link_cubin
from concordia.errors import CompileError, EnvironmentRefused
from concordia.instrument.child import exit_code_of

_TAKEN: Final = 0
_REFUSED: Final = 3
_NO_ASSEMBLER: Final = 4


def is_assembled(rewritten: bytes, original: bytes, architecture: str) -> bool:
    """False when the original assembles for e.g. "sm_90a" and the rewritten text does not. Without
    an assembler, or for a text that takes it long, the driver finds out.
    """
    if len(rewritten) > config.PTX_CHECK_BYTES_MAX:
        return True
    found = _ask(rewritten, architecture)
    if found in (_TAKEN, _NO_ASSEMBLER, None):
        return True
    return _ask(original, architecture) != _TAKEN


def _ask(text: bytes, architecture: str) -> int | None:
    def work() -> int:
        try:
            link_cubin([text], name="image", architecture=architecture)
        except CompileError:
            return _REFUSED
        except EnvironmentRefused:
            return _NO_ASSEMBLER
        return _TAKEN

    return exit_code_of(work, config.PTX_CHECK_S)
