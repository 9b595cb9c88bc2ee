"""PTX with its hooks, floor 3.

Owns: `rewrite_ptx`: which functions of a text are edited, and what is said of its kernels.
Promises: the text is only added to; every kernel is reported; `MARKS` says that each store that a
launch of it can make is marked, `WHOLE_REGION` that some go through tensor maps, whose regions the
host marks; a kernel that hides a store is not marked at all, and says why. A text that does not
parse is ImageRefused. Called by rewrite. It compiles nothing: whether a compiler takes the result
is for the caller to find out.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Final

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument.assembled import CONTROL, TABLE, declarations
from concordia.instrument.ptx_calls import Calls
from concordia.instrument.ptx_control import SLOT, Control
from concordia.instrument.ptx_hooks import entry_hook, exit_hook
from concordia.instrument.ptx_marks import MarkText
from concordia.instrument.ptx_names import Names
from concordia.instrument.ptx_tokens import Kind, tokens
from concordia.instrument.ptx_tree import Module, parse
from concordia.instrument.ptx_walk import Piece, Walk, walk
from concordia.instrument.report import Hook, KernelReport, Slot, SlotKind

_PREFIXES_TRIED: Final = 1000
_REASON_CHARACTERS_MAX: Final = config.KERNEL_REASON_BYTES_MAX // 4  # of four bytes at most


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
    is_for_assembler: bool = False,
) -> PtxRewritten:
    """The text with its hooks; `skip` are kernels that stay as they are, with the reason.
    A text for an assembler has no slots: what it becomes says by itself where the address goes, see
    assembled.py, and of its kernels those that have marks are hooked. Raises ImageRefused.
    """
    module = parse(text)
    prefix = _prefix(text)
    names = Names(module)
    control = Control(CONTROL if is_for_assembler else "")
    if is_for_assembler and (CONTROL in text or TABLE in text):
        raise ImageRefused("PTX that has been here before")
    mark_text = MarkText(prefix, page_shift, control)
    walks: dict[str, Walk] = {}
    for function in module.functions:
        if function.has_body:
            if function.name in walks:
                raise ImageRefused(f"PTX has two functions {function.name}")
            walks[function.name] = walk(module, function, names, mark_text)
    calls = Calls(walks, _aliases(module))
    wanted = Hook.PTX
    for hook, is_wanted in ((Hook.ENTRY, entry), (Hook.EXIT, exit), (Hook.MARKS, marks)):
        wanted |= hook if is_wanted else Hook(0)
    reports = tuple(
        _judge(module, name, calls, skip or {}, wanted)
        for name, found in walks.items()
        if found.function.is_entry
    )
    reports = _apart(reports, calls, skip or {})
    if is_for_assembler:
        reports = _without_exits(tuple(map(_marked_or_left, reports)), calls, wanted)
    else:
        reports = _without_exits(reports, calls, wanted)
    hooked = {report.name: report.hooks for report in reports if report.hooks.is_hooked}
    pieces = sorted(
        (
            piece
            for found, hooks in calls.pass_down(hooked)
            for piece in _pieces(found, hooks, prefix, control)
        ),
        key=lambda piece: piece.at,
    )
    if is_for_assembler and pieces:
        at = min(function.start for function in module.functions)
        pieces.insert(0, Piece(at, declarations(page_shift, reports)))
    return PtxRewritten(module.edited(pieces), _slots(text, pieces), reports)


def _judge(
    module: Module, name: str, calls: Calls, skip: Mapping[str, str], hooks: Hook
) -> KernelReport:
    """What is done to a kernel."""
    if name in skip:
        return KernelReport(name, Hook.PTX | Hook.LEFT_ALONE, reason=skip[name])
    if module.address_bits != 64:
        return KernelReport(name, Hook.PTX | Hook.LEFT_ALONE, reason="addresses of 32 bits")
    reasons = []
    if Hook.EXIT in hooks and calls.may_exit_unseen(name):
        hooks &= ~Hook.EXIT
        reasons.append("exits are not counted: it calls code that is not here")
    if Hook.MARKS in hooks and calls.reasons[name]:
        hooks &= ~Hook.MARKS
        reasons.append(f"stores are not marked: {'; '.join(calls.reasons[name])}")
    if Hook.MARKS in hooks and calls.is_whole(name):
        hooks |= Hook.WHOLE_REGION
    return KernelReport(name, hooks, reason=". ".join(reasons)[:_REASON_CHARACTERS_MAX])


def _apart(
    reports: tuple[KernelReport, ...], calls: Calls, skip: Mapping[str, str]
) -> tuple[KernelReport, ...]:
    """No function of a kernel that stays as it is gets marks for another one."""
    left = [report.name for report in reports if report.name in skip]
    sharers = calls.sharers(left, _is_marked, is_chained=False) if left else set()
    reason = "stores are not marked: a function of it is also of a kernel that stays as it is"
    hooks = Hook.MARKS | Hook.WHOLE_REGION
    return _without(reports, sharers.difference(left), hooks, reason)


def _without_exits(
    reports: tuple[KernelReport, ...], calls: Calls, wanted: Hook
) -> tuple[KernelReport, ...]:
    """A function that ends threads counts them for all kernels that get to it, or for none."""
    if Hook.EXIT not in wanted:
        return reports
    left = [report.name for report in reports if Hook.EXIT not in report.hooks]
    sharers = calls.sharers(left, _ends_threads, is_chained=True) if left else set()
    reason = "exits are not counted: a function of it ends threads of a kernel whose are not"
    return _without(reports, sharers.difference(left), Hook.EXIT, reason)


def _without(
    reports: tuple[KernelReport, ...], names: Set[str], hooks: Hook, reason: str
) -> tuple[KernelReport, ...]:
    return tuple(
        replace(
            report,
            hooks=report.hooks & ~hooks,
            reason=". ".join(filter(None, (report.reason, reason)))[:_REASON_CHARACTERS_MAX],
        )
        if report.name in names and report.hooks & hooks
        else report
        for report in reports
    )


def _is_marked(found: Walk) -> bool:
    return bool(found.pieces)


def _ends_threads(found: Walk) -> bool:
    return any(leaving.root != "ret" for leaving in found.exits)


def _marked_or_left(report: KernelReport) -> KernelReport:
    """Hooks in machine code are the better ones for a kernel that has no marks."""
    if report.hooks & Hook.MARKS:
        return report
    return KernelReport(report.name, Hook.PTX | Hook.LEFT_ALONE, reason=report.reason)


def _pieces(found: Walk, hooks: Hook, prefix: str, control: Control) -> list[Piece]:
    """All that is put into a function."""
    pieces = []
    if Hook.ENTRY in hooks:
        pieces.append(Piece(found.head_at, entry_hook(prefix, control)))
    if Hook.MARKS in hooks:
        pieces += found.pieces
    if Hook.EXIT in hooks:
        is_entry = found.function.is_entry
        for leaving in found.exits:
            if is_entry or leaving.root != "ret":
                hook = exit_hook(prefix, control, leaving.guard)
                pieces.append(Piece(leaving.start, hook))
        if is_entry and found.falls_out:
            hook = exit_hook(prefix, control, "")
            pieces.append(Piece(found.function.statements[-1].start, hook))
    return pieces


def _slots(text: str, pieces: list[Piece]) -> tuple[Slot, ...]:
    """Where the control block's address goes, in bytes of the edited text."""
    slots = []
    done = length = 0
    is_ascii = text.isascii()
    for at, piece in pieces:
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
