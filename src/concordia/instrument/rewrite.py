"""From an image to the one that is loaded instead, floor 3.

Owns: the choice of what is hooked in an image and how. Promises: never raises for what is in an
image; on any doubt a kernel, or the whole image, is what it was, and the report says why. Called by
the rewriter's children and by `concordia instrument`. It changes no byte itself: splice and ptx do.
"""

from __future__ import annotations

from concordia.instrument.options import Options
from concordia.instrument.report import Hook, KernelReport, Rewritten, Slot

__all__ = ["KernelReport", "Options", "Rewritten", "Slot", "rewrite", "rewrite_of_library"]


def rewrite(image: bytes, options: Options) -> Rewritten:
    """The image with its hooks."""
    return rewrite_of_library(image, options, "")


def rewrite_of_library(image: bytes, options: Options, library: str) -> Rewritten:
    """The image with its hooks; `library` is the file that it came from, empty when unknown."""
    if options.is_opaque_library(library):
        return _unchanged(image, Hook.OPAQUE, f"{library.rpartition('/')[2]} is left as it is")
    return _unchanged(image, Hook.LEFT_ALONE, "no form that is known")


def _unchanged(image: bytes, hooks: Hook, reason: str) -> Rewritten:
    return Rewritten(image, (), (KernelReport("", hooks, 0, reason),), is_changed=False)
