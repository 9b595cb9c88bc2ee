"""What a run's programs loaded, and what became of it, floor 7.

Owns: reading the shims' logs and the kernel tables of the cache, and how that is shown. Promises: a
line that is torn or no line of ours is counted and left out, never a failure; every image is there,
with what was hooked in it or why it was left alone. Called by `concordia modules` and, for its
summary, by launch. It asks no program.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from concordia.errors import ConcordiaError
from concordia.instrument.cache import ImageCache
from concordia.instrument.cache_folder import is_key
from concordia.instrument.report import Hook, KernelReport
from concordia.integrations.program.run_folder import ProgramRun, processes
from concordia.integrations.program.unseen import HEAD, Unseen, UnseenCounts

REWRITTEN: Final = "rewritten"
_MARKS: Final = {
    Hook.ENTRY: "entry",
    Hook.EXIT: "exit",
    Hook.MARKS: "marks",
    Hook.WHOLE_REGION: "region",
}
_WIDTH_NAME: Final = 60


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """One image that a process loaded. `kernels` is None where nobody has read it yet; `own_us` is
    what of `us` the driver did not take.
    """

    pid: int
    library: str
    kind: str
    key: str
    image_bytes: int
    outcome: str
    why: str
    us: int
    own_us: int
    kernels: tuple[KernelReport, ...] | None

    def as_json(self) -> dict[str, Any]:
        kernels = None
        if self.kernels is not None:
            kernels = [
                {
                    "name": kernel.name,
                    "level": "ptx" if kernel.hooks & Hook.PTX else "sass",
                    "registers": kernel.registers,
                    "hooks": _hooks(kernel.hooks) if self.outcome == REWRITTEN else [],
                    "why_not": kernel.reason,
                }
                for kernel in self.kernels
            ]
        return {
            "pid": self.pid,
            "library": self.library,
            "kind": self.kind,
            "key": self.key,
            "bytes": self.image_bytes,
            "outcome": self.outcome,
            "why": self.why,
            "us": self.us,
            "own_us": self.own_us,
            "kernels": kernels,
        }


@dataclass(frozen=True, slots=True)
class RunCoverage:
    """All of a run."""

    run: Path
    command: tuple[str, ...]
    images: tuple[LoadedImage, ...]
    notes: tuple[str, ...]
    unseen: tuple[Unseen, ...]
    launches: int
    lines_lost: int

    def summary(self) -> str:
        """One line."""
        done = sum(image.outcome == REWRITTEN for image in self.images)
        left = Counter(image.why for image in self.images if image.outcome != REWRITTEN)
        why = "".join(f", {count} left alone ({text})" for text, count in left.most_common(2))
        processes = len({image.pid for image in self.images})
        return (
            f"{len(self.images)} images in {processes} processes: {done} hooked{why}; "
            f"`concordia modules {self.run.name}` lists them"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "command": list(self.command),
            "images": [image.as_json() for image in self.images],
            "notes": list(self.notes),
            "unseen": [row.as_json() for row in self.unseen],
            "launches": self.launches,
            "lines_lost": self.lines_lost,
        }

    def text(self, *, with_kernels: bool = False) -> str:
        """A table: a line for what a library loaded of one kind with one outcome, or, with kernels,
        for each of these.
        """
        rows: list[tuple[str, ...]] = [
            ("LIBRARY", "IMAGE", "COUNT", "KERNELS", "REGISTERS", "HOOKED", "OUTCOME"),
            *_rows(self.images),
        ]
        lines = [f"run {self.run.name}: {' '.join(self.command)}", "", *_columns(rows)]
        if with_kernels:
            head = ("KERNEL", "LEVEL", "REGISTERS", "HOOKS", "LIBRARY")
            lines += ["", *_columns([head, *_kernel_rows(self.images)])]
        if self.unseen:
            rows = [row.cells(_shortened(row.kernel)) for row in self.unseen]
            lines += ["", *_columns([HEAD, *rows])]
        lines += [f"note: {note}" for note in self.notes]
        if self.lines_lost:
            lines.append(f"note: {self.lines_lost} lines of logs could not be read")
        return "\n".join([*lines, "", self.summary()])


def read_run(run: ProgramRun) -> RunCoverage:
    """What the logs of a run say."""
    cache = _cache(run)
    tables: dict[str, tuple[KernelReport, ...] | None] = {"": None}
    images: list[LoadedImage] = []
    notes: list[str] = []
    unseen = UnseenCounts()
    launches = lost = 0
    for pid, path in processes(run):
        for found in _lines(path):
            match found:
                case {"event": "image"}:
                    image = _image(pid, found, tables, cache)
                    lost += image is None
                    images += [image] if image else []
                case {"event": "note", "what": what, "why": why}:
                    notes.append(f"process {pid}: {what}: {why}")
                case {"event": "unseen", "kernel": kernel, "why": why, "count": int(count)}:
                    unseen.add(str(kernel), str(why), count)
                case {"event": "end"}:
                    launches += _number(found, "launches")
                case {"event": "process"}:
                    pass
                case _:
                    lost += 1
    command = run.about().get("command", [])
    words = tuple(str(word) for word in command)
    return RunCoverage(
        run.path, words, tuple(images), tuple(notes), unseen.rows(), launches, lost
    )


def _cache(run: ProgramRun) -> ImageCache | None:
    folder = run.settings().get("cache")
    if folder is None or not Path(folder).is_dir():
        return None
    try:
        return ImageCache(Path(folder).parent, Path(folder).name)
    except ConcordiaError:
        return None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Each line, nothing in it where it is none of ours."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        yield {}
        return
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        yield found if isinstance(found, dict) else {}


def _image(
    pid: int,
    found: dict[str, Any],
    tables: dict[str, tuple[KernelReport, ...] | None],
    cache: ImageCache | None,
) -> LoadedImage | None:
    try:
        key = str(found["key"])
        if key not in tables:
            rewritten = cache.load(key) if cache is not None and is_key(key) else None
            tables[key] = None if rewritten is None else rewritten.kernels
        return LoadedImage(
            pid,
            str(found["library"]),
            str(found["kind"]),
            key,
            _number(found, "bytes"),
            str(found["outcome"]),
            str(found["why"]),
            _number(found, "us"),
            _number(found, "own_us"),
            tables[key],
        )
    except KeyError:
        return None


def _number(found: dict[str, Any], name: str) -> int:
    value = found.get(name, 0)
    return value if isinstance(value, int) else 0


def _hooks(hooks: Hook) -> list[str]:
    return [name for hook, name in _MARKS.items() if hooks & hook]


def _rows(images: Sequence[LoadedImage]) -> Iterator[tuple[str, ...]]:
    """A row for each library, kind and outcome, most images first, and a total for a library that
    has several.
    """
    groups: dict[str, dict[tuple[str, str], list[LoadedImage]]] = {}
    for image in images:
        outcome = image.outcome if image.outcome == REWRITTEN else f"{image.outcome}: {image.why}"
        name = image.library.rpartition("/")[2] or "(unknown)"
        groups.setdefault(name, {}).setdefault((image.kind, outcome), []).append(image)
    order = sorted(groups.items(), key=lambda item: (-sum(map(len, item[1].values())), item[0]))
    for name, kinds in order:
        for (kind, outcome), members in sorted(kinds.items()):
            yield (name, kind, *_totals(members), outcome)
        if len(kinds) > 1:
            yield (name, "all", *_totals([m for ms in kinds.values() for m in ms]), "")


def _totals(members: Sequence[LoadedImage]) -> tuple[str, str, str, str]:
    """Images, kernels, registers of a thread from least to most, kernels hooked. An image that was
    loaded again counts again; its kernels once.
    """
    tables = {image.key: image for image in members if image.kernels is not None}
    kernels = [kernel for image in tables.values() for kernel in image.kernels or ()]
    hooked = sum(
        kernel.hooks.is_hooked
        for image in tables.values()
        if image.outcome == REWRITTEN
        for kernel in image.kernels or ()
    )
    registers = [kernel.registers for kernel in kernels if kernel.registers]
    span = f"{min(registers)}..{max(registers)}" if registers else "-"
    known = str(len(kernels)) if tables else "-"
    return str(len(members)), known, span, str(hooked) if tables else "-"


def _kernel_rows(images: Sequence[LoadedImage]) -> Iterator[tuple[str, ...]]:
    seen = set()
    for image in images:
        for kernel in image.kernels or ():
            if (image.key, kernel.name) in seen:
                continue
            seen.add((image.key, kernel.name))
            hooks = "+".join(_hooks(kernel.hooks)) if image.outcome == REWRITTEN else ""
            yield (
                _shortened(kernel.name),
                "ptx" if kernel.hooks & Hook.PTX else "sass",
                str(kernel.registers or "-"),
                hooks or f"none: {kernel.reason or image.why}",
                image.library.rpartition("/")[2],
            )


def _shortened(name: str) -> str:
    return name if len(name) <= _WIDTH_NAME else f"{name[: _WIDTH_NAME - 3]}..."


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
