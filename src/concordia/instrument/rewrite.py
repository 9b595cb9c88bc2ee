"""From an image to the one that is loaded instead, floor 3.

Owns: the choice of what is hooked in an image and how. Promises: nothing that is in an image is an
error: on any doubt a kernel, or the whole image, stays what it was, and the report says why; what
the driver takes for this device is what was hooked (machine code where there is some, else PTX).
Called by the rewriter's children and by `concordia instrument`. It changes no byte itself: splice
and ptx do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from concordia.errors import ImageRefused
from concordia.instrument.assembled import Assembled, read_assembled
from concordia.instrument.cache import check_bounds
from concordia.instrument.elf import read_cubin
from concordia.instrument.fatbin import Entry, EntryKind
from concordia.instrument.image import Image, ImageKind, read_image
from concordia.instrument.options import Options
from concordia.instrument.proof import first_difference
from concordia.instrument.ptx import PtxRewritten, read_text, rewrite_ptx
from concordia.instrument.ptx_check import is_assembled
from concordia.instrument.ptx_tree import parse
from concordia.instrument.report import Hook, KernelReport, Rewritten, Slot, SlotKind
from concordia.instrument.splice import Spliced, splice_cubin

__all__ = ["KernelReport", "Options", "Rewritten", "Slot", "rewrite"]


def rewrite(image: bytes, options: Options) -> Rewritten:
    """The image with its hooks. Where it came from decides nothing: results are kept by content."""
    try:
        done = _rewrite(read_image(image), options)
        check_bounds(len(done.image), len(done.slots), len(done.kernels))
    except ImageRefused as error:
        return _unchanged(image, Hook.LEFT_ALONE, str(error))
    return done


def check_readable(image: Image, options: Options) -> None:
    """Raises ImageRefused when a part that the driver may take is malformed."""
    if image.kind in (ImageKind.OTHER, ImageKind.RELOCATABLE):
        return
    is_alone = image.kind is not ImageKind.FATBIN
    for entry in image.entries if is_alone else driver_takes(image.entries, options.arch):
        payload = image.payload(entry.index)
        if entry.kind is EntryKind.PTX:
            parse(read_text(payload))
        else:
            read_cubin(payload)


def driver_takes(entries: Sequence[Entry], arch: int) -> tuple[Entry, ...]:
    """What a driver may load for a device of this architecture: all machine code that runs there,
    or, without any, the newest PTX that can be compiled for it.
    """
    code = [e for e in entries if e.kind is EntryKind.ELF and _runs(e, arch)]
    if code:
        return tuple(code)
    texts = [e for e in entries if e.kind is EntryKind.PTX and _compiles(e, arch)]
    newest = max((e.architecture for e in texts), default=0)
    return tuple(e for e in texts if e.architecture == newest)


def _rewrite(image: Image, options: Options) -> Rewritten:
    is_text = image.kind is ImageKind.PTX
    if image.kind in (ImageKind.OTHER, ImageKind.RELOCATABLE) or (
        options.assembler and not is_text
    ):
        return _unchanged(image.data, Hook.LEFT_ALONE, f"{image.kind.value}: passed through")
    # what a text is assembled for is not of our choosing
    taken = image.entries if options.assembler else driver_takes(image.entries, options.arch)
    if not taken:
        return _unchanged(image.data, Hook.LEFT_ALONE, f"no code for sm_{options.arch} in it")
    parts = {e.index: _rewrite_entry(image.payload(e.index), e, options) for e in taken}
    kernels = _merged([kernel for part in parts.values() for kernel in part.kernels])
    if any(options.is_opaque_kernel(kernel.name) for kernel in kernels):
        return Rewritten(image.data, (), tuple(map(_opaque, kernels)), is_changed=False)
    hidden = [kernel for kernel in kernels if not kernel.name]
    if hidden:  # the driver may take the part whose kernels nobody could name
        reason = f"a part of the image cannot be read: {hidden[0].reason}"
        return _whole_left_alone(image.data, kernels, reason)
    changed = {index: part for index, part in parts.items() if part.is_changed}
    if not changed:
        return Rewritten(image.data, (), kernels, is_changed=False)
    rebuilt = image.rebuild({index: part.image for index, part in changed.items()})
    slots = [
        slot.moved(rebuilt.offsets[index]) for index, part in changed.items() for slot in part.slots
    ]
    return Rewritten(rebuilt.data, tuple(slots), kernels, is_changed=True)


def _rewrite_entry(payload: bytes, entry: Entry, options: Options) -> Rewritten:
    """One part; a part that cannot be read or changed stays as it is."""
    is_text = entry.kind is EntryKind.PTX
    try:
        return (_rewrite_text if is_text else _rewrite_code)(payload, entry, options)
    except ImageRefused as error:
        hooks = Hook.LEFT_ALONE | (Hook.PTX if is_text else Hook(0))
        return _unchanged(payload, hooks, str(error))


def _rewrite_code(payload: bytes, _: Entry, options: Options) -> Rewritten:
    """Hooks that an assembler compiled are taken up; a kernel that has some gets no others."""
    made = _assembled(payload, options)
    if made is None:
        return _spliced(payload, options, {})
    marked = {kernel.name: kernel.hooks for kernel in made.kernels if kernel.hooks.is_hooked}
    code = _spliced(payload, options, dict.fromkeys(marked, "marked by its assembler"))
    placed = read_assembled(code.image)
    if placed is None or placed.kernels != made.kernels:
        return _whole_left_alone(payload, code.kernels, "its table of hooks was lost")
    why_not = {kernel.name: kernel.reason for kernel in made.kernels if kernel.reason}
    kernels = tuple(
        replace(kernel, hooks=marked[kernel.name], reason=why_not.get(kernel.name, ""))
        if kernel.name in marked
        else replace(kernel, reason=why_not.get(kernel.name) or kernel.reason)
        for kernel in code.kernels
    )
    slot = Slot(placed.control_at, SlotKind.RAW)
    return Rewritten(code.image, (*code.slots, slot), kernels, is_changed=True)


def _assembled(payload: bytes, options: Options) -> Assembled | None:
    """None for hooks of other options: their word stays 0, and they do nothing."""
    found = read_assembled(payload) if options.marks else None
    if found is None or found.page_shift != options.page_shift:
        return None
    hooked = [kernel.name for kernel in found.kernels if kernel.hooks.is_hooked]
    return None if not hooked or any(map(options.is_denied, hooked)) else found


def _spliced(payload: bytes, options: Options, skip: Mapping[str, str]) -> Rewritten:
    marks = options.page_shift if options.sass_marks else None

    def spliced(skip: Mapping[str, str]) -> Spliced:
        return splice_cubin(payload, entry=options.entry, exit=options.exit, marks=marks, skip=skip)

    done = spliced(skip)
    denied = _denied(done.kernels, options)
    if denied:
        done = spliced({**skip, **denied})
    if not _is_hooked(done.kernels):
        kernels = done.kernels
        if options.marks and not (options.entry or options.exit or options.sass_marks):
            kernels = _because(kernels, "marks in machine code are sass-marks")
        return Rewritten(payload, (), kernels, is_changed=False)
    wrong = first_difference(payload, done.cubin, marks)
    if wrong is not None:
        return _whole_left_alone(payload, done.kernels, f"not proven to be the original: {wrong}")
    return Rewritten(done.cubin, done.slots, done.kernels, is_changed=True)


def _rewrite_text(payload: bytes, entry: Entry, options: Options) -> Rewritten:
    text = read_text(payload)

    def rewritten(skip: Mapping[str, str]) -> PtxRewritten:
        return rewrite_ptx(
            text,
            entry=options.entry,
            exit=options.exit,
            marks=options.marks,
            skip=skip,
            page_shift=options.page_shift,
            is_for_assembler=options.assembler,
        )

    done = rewritten({})
    denied = _denied(done.kernels, options)
    if denied:
        done = rewritten(denied)
    if not _is_hooked(done.kernels):
        kernels = done.kernels
        if options.sass_marks and not (options.entry or options.exit or options.marks):
            kernels = _because(kernels, "marks in PTX are marks, not sass-marks")
        return Rewritten(payload, (), kernels, is_changed=False)
    changed = done.text.encode()
    if options.assembler:  # which says itself what it does not take
        return Rewritten(changed, done.slots, done.kernels, is_changed=True)
    if not is_assembled(changed, text.encode(), _architecture(entry, options.arch)):
        return _whole_left_alone(payload, done.kernels, "the assembler refuses what came out")
    return Rewritten(changed, done.slots, done.kernels, is_changed=True)


def _runs(entry: Entry, arch: int) -> bool:
    """Machine code runs on later devices of its generation; with a suffix "a" on its own alone."""
    if entry.suffix == "a":
        return entry.architecture == arch
    return entry.architecture // 10 == arch // 10 and entry.architecture <= arch


def _compiles(entry: Entry, arch: int) -> bool:
    """PTX can be compiled for its own and every later device, unless its suffix binds it."""
    return entry.architecture <= arch if not entry.suffix else _runs(entry, arch)


def _architecture(entry: Entry, arch: int) -> str:
    """What the driver compiles a text for."""
    return f"sm_{arch}{'a' if entry.suffix == 'a' else ''}"


def _denied(kernels: Sequence[KernelReport], options: Options) -> dict[str, str]:
    return {k.name: "denied by name" for k in kernels if options.is_denied(k.name)}


def _is_hooked(kernels: Sequence[KernelReport]) -> bool:
    return any(kernel.hooks.is_hooked for kernel in kernels)


def _because(kernels: Sequence[KernelReport], reason: str) -> tuple[KernelReport, ...]:
    return tuple(replace(kernel, reason=reason) for kernel in kernels)


def _merged(kernels: Sequence[KernelReport]) -> tuple[KernelReport, ...]:
    """One report for each name: of several codes of one kernel the driver takes any, so only what
    was done to all of them was done.
    """
    found: dict[str, KernelReport] = {}
    for kernel in kernels:
        other = found.get(kernel.name)
        if other is None:
            found[kernel.name] = kernel
            continue
        done = Hook.ENTRY | Hook.EXIT | Hook.MARKS
        hooks = (kernel.hooks & other.hooks & done) | ((kernel.hooks | other.hooks) & ~done)
        found[kernel.name] = KernelReport(
            kernel.name,
            hooks,
            max(kernel.registers, other.registers),
            other.reason or kernel.reason,
        )
    return tuple(found.values())


def _opaque(kernel: KernelReport) -> KernelReport:
    return replace(kernel, hooks=Hook.OPAQUE, reason="of a library that is left as it is")


def _whole_left_alone(payload: bytes, kernels: Sequence[KernelReport], reason: str) -> Rewritten:
    """A part that stays as it is although its kernels could be hooked."""
    left = tuple(
        replace(
            kernel,
            hooks=Hook.LEFT_ALONE | (kernel.hooks & Hook.PTX),
            reason=reason if kernel.hooks.is_hooked else kernel.reason,
        )
        for kernel in kernels
    )
    return Rewritten(payload, (), left, is_changed=False)


def _unchanged(image: bytes, hooks: Hook, reason: str) -> Rewritten:
    return Rewritten(image, (), (KernelReport("", hooks, 0, reason),), is_changed=False)
