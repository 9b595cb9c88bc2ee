"""Instrument a file without a GPU, floor 3.

Owns: reading FILE, choosing the image in it, writing OUT and its slots, and what is told of it.
Promises: whatever is wrong is an error of one line, and then nothing was written; OUT is whole or
not there; an image whose slots are empty is never written unasked: its hooks would write to
address 0. Called by `concordia instrument`. It changes no code: rewrite does.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concordia import config
from concordia.errors import ImageRefused, UsageError
from concordia.instrument.image import Image, ImageKind, read_image
from concordia.instrument.library_file import FoundImage, images_in
from concordia.instrument.options import Options
from concordia.instrument.report import Hook, KernelReport, Rewritten, fill
from concordia.instrument.rewrite import check_readable, rewrite


@dataclass(frozen=True, slots=True)
class Target:
    """Where the result goes. `control` is the address of the control block, None for empty slots
    with a list of them beside the file.
    """

    path: Path
    control: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found, and what was done with the image that was chosen."""

    file: Path
    images: tuple[FoundImage, ...]
    is_library: bool
    chosen: int | None
    rewritten: Rewritten | None
    target: Target | None

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        done = self.rewritten
        return {
            "file": str(self.file),
            "images": [_image_json(one) for one in self.images],
            "image": self.chosen,
            "is_changed": done is not None and done.is_changed,
            "kernels": [_kernel_json(kernel) for kernel in done.kernels] if done else [],
            "slots": _slots_json(done) if done else [],
            "output": str(self.target.path) if self.target else None,
            "control": self.target.control if self.target else None,
        }

    def text(self) -> str:
        """For people."""
        lines = []
        for index, one in enumerate(self.images):
            where = f"image {index} at {one.offset:#x}: " if self.is_library else f"{self.file}: "
            if self.chosen in (None, index):
                lines.append(where + _describe(one.image))
        if self.rewritten is None:
            lines.append(f"{len(self.images)} images; --image N shows the kernels of one")
            return "\n".join(lines)
        lines += [_line(kernel) for kernel in self.rewritten.kernels]
        hooked = sum(kernel.hooks.is_hooked for kernel in self.rewritten.kernels)
        lines.append(f"{hooked} of {len(self.rewritten.kernels)} kernels hooked")
        if self.target is not None:
            lines.append(self._written(self.target, self.rewritten))
        return "\n".join(lines)

    @staticmethod
    def _written(target: Target, done: Rewritten) -> str:
        if not done.is_changed:
            return f"{target.path}: the original, nothing was hooked"
        if target.control is None:
            return f"{target.path}: with {len(done.slots)} empty slots, in {slots_path(target)}"
        return f"{target.path}: for the control block at {target.control:#x}"


def instrument(
    file: Path, options: Options, *, image: int | None = None, target: Target | None = None
) -> Outcome:
    """Rewrite the image in a file, or list the images of a library. Raises UsageError."""
    if target is not None:
        _check_target(file, target)
    try:
        return _instrument(file, options, image=image, target=target)
    except MemoryError:
        raise UsageError(f"{file}: not enough memory") from None


def _instrument(
    file: Path, options: Options, *, image: int | None, target: Target | None
) -> Outcome:
    data = _read(file)
    found = read_image(data)
    is_library = found.kind is ImageKind.OTHER
    images = images_in(data) if is_library else (FoundImage(0, found),)
    if not images:
        raise ImageRefused(f"{file} is no cubin, PTX or fatbin, and has none in it")
    chosen = _choose(file, images, image, must=target is not None) if is_library else 0
    if not is_library and image not in (None, 0):
        raise UsageError(f"{file} is one image: leave --image {image} out")
    done = None
    if chosen is not None:
        original = images[chosen].image.data
        is_opaque = is_library and options.is_opaque_library(file.name)
        done = _opaque(original, file) if is_opaque else rewrite(original, options)
        if any(not kernel.name for kernel in done.kernels):
            check_readable(images[chosen].image, options)
    if target is not None:
        assert done is not None
        _write(target, done)
    return Outcome(file, images, is_library, chosen, done, target)


def slots_path(target: Target) -> Path:
    """Where the list of an image's empty slots is written."""
    return target.path.with_name(target.path.name + ".slots.json")


def _opaque(image: bytes, file: Path) -> Rewritten:
    reason = f"{file.name} is left as it is, by policy"
    kernels = (KernelReport("", Hook.OPAQUE, 0, reason),)
    return Rewritten(image, (), kernels, is_changed=False)


def _read(file: Path) -> bytes:
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe or device may never end
            raise UsageError(f"{file} is no regular file")
        with file.open("rb") as opened:
            data = opened.read(config.LIBRARY_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    if len(data) > config.LIBRARY_BYTES_MAX:
        raise UsageError(f"{file} has more than {config.LIBRARY_BYTES_MAX} bytes")
    if not data:
        raise UsageError(f"{file} is empty")
    return data


def _choose(
    file: Path, images: Sequence[FoundImage], image: int | None, *, must: bool
) -> int | None:
    if image is not None and image >= len(images):
        raise UsageError(f"{file} has images 0 to {len(images) - 1}, no image {image}")
    if image is None and len(images) == 1:
        return 0
    if image is None and must:
        raise UsageError(f"{file} has {len(images)} images: say which with --image N")
    return image


def _check_target(file: Path, target: Target) -> None:
    for path in (target.path, slots_path(target)):
        try:
            _check_place(file, path)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None


def _check_place(file: Path, path: Path) -> None:
    """Raises UsageError, or OSError for a name that a system does not take."""
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is there and no file")
    if path.exists() and file.exists() and path.samefile(file):
        raise UsageError(f"{path} is the file to be read: name another for -o")


def _write(target: Target, done: Rewritten) -> None:
    image = done.image
    if done.is_changed and target.control is not None:
        image = fill(image, done.slots, target.control)
    files = [(target.path, image)]
    if done.is_changed and target.control is None:
        text = json.dumps({"slots": _slots_json(done)}, indent=1) + "\n"
        files.insert(0, (slots_path(target), text.encode()))
    begun: list[Path] = []
    try:
        for path, content in files:
            begun.append(_begin(path, content))
        for (path, _), temporary in zip(files, begun, strict=True):
            temporary.rename(path)
        if len(files) == 1:  # those of an image that was there before
            slots_path(target).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{target.path}: {error.strerror}") from None
    finally:
        for temporary in begun:
            temporary.unlink(missing_ok=True)


def _begin(path: Path, content: bytes) -> Path:
    """The content beside its place, as readable as a compiler's output."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        mask = os.umask(0o077)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _describe(image: Image) -> str:
    parts = [
        f"{entry.kind.name} for sm_{entry.architecture}{entry.suffix} "
        f"({entry.unpacked_bytes} bytes, {entry.packing.value})"
        for entry in image.entries
    ]
    return f"{image.kind.value}, {len(image.data)} bytes" + "".join(f"\n  {p}" for p in parts)


def _line(kernel: KernelReport) -> str:
    hooks = " ".join(_hook_names(kernel.hooks)) or "-"
    why = f": {kernel.reason}" if kernel.reason else ""
    return _printable(f"{hooks:<24} {kernel.registers:>4}  {kernel.name or '(all)'}{why}")


def _printable(text: str) -> str:
    """Names come out of files: none moves a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _hook_names(hooks: Hook) -> list[str]:
    return [str(hook.name).lower().replace("_", " ") for hook in hooks]


def _kernel_json(kernel: KernelReport) -> dict[str, Any]:
    return {
        "name": kernel.name,
        "hooks": _hook_names(kernel.hooks),
        "registers": kernel.registers,
        "reason": kernel.reason,
    }


def _slots_json(done: Rewritten) -> list[dict[str, Any]]:
    return [
        {"offset": slot.offset, "kind": slot.kind.name.lower(), "name": "control"}
        for slot in done.slots
    ]


def _image_json(one: FoundImage) -> dict[str, Any]:
    return {
        "offset": one.offset,
        "kind": one.image.kind.value,
        "bytes": len(one.image.data),
        "entries": [
            {
                "kind": entry.kind.name.lower(),
                "architecture": f"sm_{entry.architecture}{entry.suffix}",
                "packing": entry.packing.value,
                "bytes": entry.unpacked_bytes,
            }
            for entry in one.image.entries
        ],
    }
