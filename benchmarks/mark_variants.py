"""The variants that mark_cost.py compares.

Owns: the product's hooks, whole and in parts, and what was not taken: fewer copies of the map of
marks, copies at other distances, copies chosen otherwise, marks that look first. Promises: those
under the product's names are as `concordia run` makes them. It needs no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from concordia import abi

PAGES: Final = 1 << 14  # of the array that is written
# Edits of a text, as patterns: the copy of the map by the CTA instead of by its multiprocessor, and
# a mark that looks first whether the byte is set.
BY_CTA: Final = ((r"%smid;", "%ctaid.x;"),)
CHECKED: Final = (
    (r"(\.reg \.pred )(%\w+?)pending,", r"\1\2new, \2pending,"),
    (
        r"@(%\w+) (st\.global\.u8 \[(%\w+?)to\], (%\w+);)",
        r"@\1 ld.relaxed.gpu.global.u8 \4, [\3to]; setp.eq.and.u32 \3new, \4, 0, \1; "
        r"mov.b32 \4, 1; @\3new \2",
    ),
)


@dataclass(frozen=True, slots=True)
class Variant:
    """Which hooks, how they came into the code, where the map's copies lie, and whether the output
    is tracked.
    """

    entry: bool
    marks: bool
    copies: int = abi.CONTROL_MAP_COPIES
    stride: int = abi.CONTROL_MAP_STRIDE
    edits: tuple[tuple[str, str], ...] = ()
    is_tracked: bool = True
    is_assembled: bool = False
    is_filled: bool = True  # with the control block's address


VARIANTS: Final = {
    "entry": Variant(entry=True, marks=False),
    "untracked": Variant(entry=False, marks=True, is_tracked=False),
    "marks": Variant(entry=False, marks=True),
    "all": Variant(entry=True, marks=True),
    "assembled_marks": Variant(entry=False, marks=True, is_assembled=True),
    "assembled_empty": Variant(entry=True, marks=True, is_assembled=True, is_filled=False),
    "assembled_all": Variant(entry=True, marks=True, is_assembled=True),
    # Not the product's: why it is as it is.
    "one_copy": Variant(entry=False, marks=True, copies=1),
    "four_copies": Variant(entry=False, marks=True, copies=4),
    "many_copies": Variant(entry=False, marks=True, copies=128, stride=PAGES + 512),
    "stride_even": Variant(entry=False, marks=True, stride=abi.CONTROL_MAP_BYTES),
    "stride_small": Variant(entry=False, marks=True, stride=PAGES),
    "by_cta": Variant(entry=False, marks=True, edits=BY_CTA),
    "checked": Variant(entry=False, marks=True, edits=CHECKED),
    "checked_one_copy": Variant(entry=False, marks=True, copies=1, edits=CHECKED),
}
