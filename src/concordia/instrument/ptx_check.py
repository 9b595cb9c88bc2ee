"""Whether rewritten PTX assembles, floor 3.

Owns: asking the assembler, where there is one, before a driver compiles what was rewritten.
Promises: no GPU and no driver needed; what the assembler does not take of the original either says
nothing of the rewrite (it is older than the text). Called by rewrite. It looks into no text.
"""

from __future__ import annotations

from concordia import config
from concordia.device.nvrtc import link_cubin
from concordia.errors import CompileError, EnvironmentRefused


def is_assembled(rewritten: bytes, original: bytes, architecture: str) -> bool:
    """False when the original assembles for e.g. "sm_90a" and the rewritten text does not. Without
    an assembler, or for a text that would take it long, the driver finds out.
    """
    if len(rewritten) > config.PTX_CHECK_BYTES_MAX:
        return True
    try:
        return _assembles(rewritten, architecture) or not _assembles(original, architecture)
    except EnvironmentRefused:
        return True


def _assembles(text: bytes, architecture: str) -> bool:
    try:
        link_cubin([text], name="image", architecture=architecture)
    except CompileError:
        return False
    return True
