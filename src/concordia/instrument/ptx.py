"""PTX with its hooks, floor 3.

Owns: `rewrite_ptx`: which functions of a text are edited, and what is said of its kernels.
Promises: the text is only added to; every kernel is reported; `MARKS` says that each store that a
launch of it can make is marked, `WHOLE_REGION` that some go through tensor maps, whose regions the
host marks; a kernel that hides a store is not marked at all, and says why. A text that does not
parse is ImageRefused. Called by rewrite. It compiles nothing: whether a compiler takes the result
is for the caller to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument.ptx_hooks import entry_hook, exit_hook
from concordia.instrument.ptx_marks import SLOT, MarkText
from concordia.instrument.ptx_names import Names
from concordia.instrument.ptx_tokens import Kind, tokens
from concordia.instrument.ptx_tree import Module, parse
from concordia.instrument.ptx_walk import Piece, Walk, walk
from concordia.instrument.report import Hook, KernelReport, Slot, SlotKind

# Of CUDA's own library on the device: they write buffers of the driver and the heap, which no
# region can be.
_SYSTEM_CALLS: Final = frozenset({"vprintf", "__assertfail", "malloc", "free"})
_PREFIXES_TRIED: Final = 1000


@dataclass(frozen=True, slots=True)
class PtxRewritten:
    """The text to load instead; offsets of slots are in its bytes."""

    text: str
    slots: tuple[Slot, ...]
    kernels: tuple[KernelReport, ...]


def read_text(image: bytes) -> str:
    """PTX as it is loaded: text up to a zero byte. Raises ImageRefused."""
    try:
        return image.partition(b"\0")[0].decode()
    except UnicodeDecodeError as error:
        raise ImageRefused(f"PTX is text: {error}") from None


def rewrite_ptx(
    text: str,
    *,
    entry: bool,
    exit: bool,
    marks: bool,
    skip: Mapping[str, str] | None = None,
    page_shift: int = config.MARK_PAGE_SHIFT,
    is_spread: bool = False,
) -> PtxRewritten:
    """The text with its hooks; `skip` are kernels that stay as they are, with the reason.
    `is_spread` stores marks into one of several copies of the map. Raises ImageRefused.
    """
    module = parse(text)
    prefix = _prefix(text)
    names = Names(module)
    mark_text = MarkText(prefix, page_shift, is_spread)
    walks: dict[str, Walk] = {}
    for function in module.functions:
        if function.has_body:
            if function.name in walks:
                raise ImageRefused(f"PTX has two functions {function.name}")
            walks[function.name] = walk(module, function, names, mark_text)
    calls = _Calls(walks, _aliases(module))
    all_hooks = Hook.PTX
    for hook, is_wanted in ((Hook.ENTRY, entry), (Hook.EXIT, exit), (Hook.MARKS, marks)):
        all_hooks |= hook if is_wanted else Hook(0)
    reports: list[KernelReport] = []
    wanted: dict[str, Hook] = {}  # of every function that is edited
    for name, found in walks.items():
        if not found.function.is_entry:
            continue
        report = _judge(module, name, calls, skip or {}, all_hooks)
        reports.append(report)
        if not report.hooks & Hook.LEFT_ALONE:
            wanted[name] = wanted.get(name, Hook(0)) | report.hooks
            for callee in calls.reached(name):
                passed_on = report.hooks & (Hook.EXIT | Hook.MARKS)
                wanted[callee] = wanted.get(callee, Hook(0)) | passed_on
    pieces = [
        piece for name, hooks in wanted.items() for piece in _pieces(walks[name], hooks, prefix)
    ]
    edited = module.edited(pieces)
    return PtxRewritten(edited, _slots(module.text, pieces), tuple(reports))


class _Calls:
    """Who calls whom."""

    def __init__(self, walks: dict[str, Walk], aliases: dict[str, str]) -> None:
        self._walks = walks
        self._aliases = aliases

    def reached(self, name: str) -> dict[str, Walk]:
        """Every function with a body that it can get to, itself among them."""
        found: dict[str, Walk] = {}
        ahead = [name]
        while ahead:
            next_ = self._aliases.get(ahead[-1], ahead[-1])
            ahead.pop()
            if next_ in self._walks and next_ not in found:
                found[next_] = self._walks[next_]
                ahead += found[next_].callees
        return found

    def foreign(self, found: dict[str, Walk]) -> list[str]:
        """Names that they call and that have no body here."""
        called = {self._aliases.get(n, n) for walk in found.values() for n in walk.callees}
        return sorted(called - self._walks.keys() - _SYSTEM_CALLS)


def _judge(
    module: Module, name: str, calls: _Calls, skip: Mapping[str, str], hooks: Hook
) -> KernelReport:
    """What is done to a kernel."""
    if name in skip:
        return KernelReport(name, Hook.PTX | Hook.LEFT_ALONE, reason=skip[name])
    if module.address_bits != 64:
        return KernelReport(name, Hook.PTX | Hook.LEFT_ALONE, reason="addresses of 32 bits")
    found = calls.reached(name)
    reasons = [reason for walk in found.values() for reason in walk.reasons]
    reasons += [f"a call of {callee}, whose code is not here" for callee in calls.foreign(found)]
    if Hook.MARKS not in hooks:
        return KernelReport(name, hooks)
    if reasons:
        told = "; ".join(dict.fromkeys(reasons))[: config.KERNEL_REASON_BYTES_MAX // 4]
        return KernelReport(name, hooks & ~Hook.MARKS, reason=f"stores are not marked: {told}")
    if any(walk.is_whole for walk in found.values()):
        hooks |= Hook.WHOLE_REGION
    return KernelReport(name, hooks)


def _pieces(found: Walk, hooks: Hook, prefix: str) -> list[Piece]:
    """All that is put into a function."""
    pieces = []
    if Hook.ENTRY in hooks:
        pieces.append(Piece(found.head_at, entry_hook(prefix)))
    if Hook.MARKS in hooks:
        pieces += found.pieces
    if Hook.EXIT in hooks:
        is_entry = found.function.is_entry
        for leaving in found.exits:
            if is_entry or leaving.root != "ret":
                pieces.append(Piece(leaving.start, exit_hook(prefix, leaving.guard)))
        if is_entry and found.falls_out:
            pieces.append(Piece(found.function.statements[-1].start, exit_hook(prefix, "")))
    return pieces


def _slots(text: str, pieces: list[Piece]) -> tuple[Slot, ...]:
    """Where the control block's address goes, in bytes of the edited text."""
    slots = []
    done = length = 0
    is_ascii = text.isascii()
    for at, piece in sorted(pieces, key=lambda pair: pair[0]):
        length += at - done if is_ascii else len(text[done:at].encode())
        done = at
        found = piece.find(SLOT)
        while found >= 0:
            slots.append(Slot(length + found + 2, SlotKind.TEXT))
            found = piece.find(SLOT, found + len(SLOT))
        length += len(piece)
    return tuple(slots)


def _prefix(text: str) -> str:
    """One that no name of the text begins with."""
    for attempt in range(_PREFIXES_TRIED):
        prefix = f"%cnc{attempt or ''}_"
        if prefix not in text and prefix[1:] not in text:
            return prefix
    raise ImageRefused("PTX that uses every name of ours")


def _aliases(module: Module) -> dict[str, str]:
    found = {}
    for statement in module.directives:
        if statement.head == ".alias":
            words = tokens(module.text, statement.start, statement.end)
            names = [token.text for token in words if token.kind is Kind.WORD]
            if len(names) == 2:
                found[names[0]] = names[1]
    return found
