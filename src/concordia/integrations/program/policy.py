"""The policy file of `concordia run`: what of a program is protected, and when.

Owns: reading the TOML file, and the plain lines that the shim reads of it. Promises: a mistake is a
UsageError of one line that names the file, the line or the key, and says what to write; what is
read here is bounded, so the shim's fixed tables have room for it; defaults protect nothing.
Called by the launcher and the agent. It does not know the program: which allocation is which
region is found by the shim while the program runs (native/region_rules.c).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from concordia import config
from concordia.errors import UsageError
from concordia.integrations.program.policy_table import (
    Table,
    WrongKey,
    folder,
    line_of,
    may_share,
    name_of,
    number,
    pattern,
    patterns,
    size_of,
    sizes_of,
    switch,
)

FORMAT: Final = 1  # of the shim's lines; native/policy.c refuses another
EVERY: Final = -1  # ordinal: each allocation that matches is a region
TRUSTS: Final = ("trust_arguments", "trust_maps")
TRIGGERS: Final = ("graph-launch", "stream-synchronize", "kernel:")


@dataclass(frozen=True, slots=True)
class RegionRule:
    """One region by the way in which it comes to be; what is not asked for is left out."""

    name: str
    size_min: int = 1
    size_max: int = 1 << 62
    ordinal: int = EVERY  # which of the allocations that match, from 0
    stack: str = ""  # pattern of a function's or library's name in the stack of the allocation
    kernel: str = ""  # pattern of a kernel; the region is where its pointer argument points to
    argument: int = 0
    bytes: int = 0  # of a kernel's region, from the pointer on; 0: all of the allocation


@dataclass(frozen=True, slots=True)
class Trigger:
    """A point of the program's work at which it may be saved."""

    on: str  # graph-launch, stream-synchronize or kernel
    kernel: str = ""
    every: int = 1
    interval_us: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """All of a file."""

    series: str = "program"
    warm_points: int = 1  # trigger points at the start that always run for real
    audit_every: int = 0  # each so manieth checkpoint compares every page; 0: none does
    keep_addresses: bool = False  # allocations have the same addresses in every run
    journal: Path = Path()
    journal_bytes: int | None = None
    linger_s: float = config.OWNER_LINGER_S
    stage_bytes: int = config.PROGRAM_STAGE_BYTES
    reads_bytes: int = config.PROGRAM_READS_BYTES
    regions: tuple[RegionRule, ...] = ()
    triggers: tuple[Trigger, ...] = ()
    hooks: Mapping[str, bool] = field(default_factory=dict)  # entry, exit, marks
    opaque: tuple[str, ...] | None = None  # None: the rewriter's own list
    deny: tuple[str, ...] = ()
    trust_arguments: tuple[str, ...] = ()
    trust_maps: tuple[str, ...] = ()

    @property
    def protects(self) -> bool:
        """Whether there is anything to save."""
        return bool(self.regions)

    def lines(self) -> str:
        """What the shim reads: a word and its values on each line."""
        found = [
            f"concordia-policy {FORMAT}",
            f"warm {self.warm_points}",
            f"audit {self.audit_every}",
            f"addresses {int(self.keep_addresses)}",
            f"stage {self.stage_bytes}",
            f"reads {self.reads_bytes}",
        ]
        for rule in self.regions:
            found.append(
                f"region {rule.name} {rule.size_min} {rule.size_max} {rule.ordinal} "
                f"{rule.argument} {rule.bytes} {rule.stack or '-'} {rule.kernel or '-'}"
            )
        for trigger in self.triggers:
            found.append(
                f"trigger {trigger.on} {trigger.every} {trigger.interval_us} "
                f"{trigger.kernel or '-'}"
            )
        found += [f"trust {pattern}" for pattern in self.trust_arguments]
        found += [f"maps {pattern}" for pattern in self.trust_maps]
        return "".join(line + "\n" for line in found)


def read_policy(path: Path) -> Policy:
    """The policy of this file; raises UsageError."""
    try:
        if path.stat().st_size > config.POLICY_BYTES_MAX:
            raise UsageError(f"{path}: more than {config.POLICY_BYTES_MAX} bytes is no policy")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; give a policy file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from error
    return parse_policy(text, str(path))


def parse_policy(text: str, name: str) -> Policy:
    """The same of a text; `name` is what errors call it."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name}: {error}") from error
    try:
        return _policy(Table(table, ""))
    except WrongKey as wrong:
        line = line_of(text, wrong.key)
        raise UsageError(f"{name}:{line}: {wrong.key}: {wrong.text}") from None


def _policy(table: Table) -> Policy:
    program, journal = table.table("program"), table.table("journal")
    limits, images = table.table("limits"), table.table("images")
    regions = tuple(_region(found) for found in table.tables("region"))
    triggers = tuple(_trigger(found) for found in table.tables("trigger"))
    table.end("program", "journal", "limits", "images", "region", "trigger")
    names = [rule.name for rule in regions]
    for i, rule in enumerate(regions):
        if rule.name in names[:i]:
            raise WrongKey(f"region[{i}].name", f"{rule.name} is there already: give another name")
    if len(regions) > config.PROGRAM_RULES_MAX or len(triggers) > config.PROGRAM_TRIGGERS_MAX:
        raise WrongKey(
            "region" if len(regions) > config.PROGRAM_RULES_MAX else "trigger",
            f"at most {config.PROGRAM_RULES_MAX} regions, {config.PROGRAM_TRIGGERS_MAX} triggers",
        )
    if regions and not triggers:
        raise WrongKey("region", "nothing says when to save them: add a [[trigger]]")
    if triggers and not regions:
        raise WrongKey("trigger", "nothing says what to save: add a [[region]]")
    if regions and not journal.has("place"):
        raise WrongKey("journal", 'say where it lies: place = "/dev/shm/some-name"')
    found = Policy(
        series=program.take("series", "program", name_of),
        warm_points=program.take("warm_points", 1, number(1, 1 << 30)),
        audit_every=program.take("audit_every", 0, number(0, 1 << 30)),
        keep_addresses=program.take("keep_addresses", False, switch),
        journal=journal.take("place", Path(), folder),
        journal_bytes=journal.take("size", None, size_of),
        linger_s=float(journal.take("linger_s", config.OWNER_LINGER_S, number(0, 1 << 20))),
        stage_bytes=limits.take("stage", config.PROGRAM_STAGE_BYTES, size_of),
        reads_bytes=limits.take("reads", config.PROGRAM_READS_BYTES, size_of),
        regions=regions,
        triggers=triggers,
        hooks={
            name: images.take(f"{name}_hooks", name != "exit", switch) for name in ("entry", "exit")
        }
        | {"marks": images.take("store_marks", True, switch)},
        opaque=images.take("opaque", None, patterns),
        deny=images.take("deny", (), patterns),
        trust_arguments=images.take("trust_arguments", (), patterns),
        trust_maps=images.take("trust_maps", (), patterns),
    )
    for one in found.trust_maps:
        if not any(may_share(one, other) for other in found.trust_arguments):
            raise WrongKey(
                images.key("trust_maps"), f"{one!r}: name such a kernel in trust_arguments, too"
            )
    program.end("series", "warm_points", "audit_every", "keep_addresses")
    journal.end("place", "size", "linger_s")
    limits.end("stage", "reads")
    images.end("entry_hooks", "exit_hooks", "store_marks", "opaque", "deny", *TRUSTS)
    return found


def _region(table: Table) -> RegionRule:
    by_size, by_stack, by_kernel = (table.has(name) for name in ("size", "stack", "kernel"))
    if not (by_size or by_stack or by_kernel):
        raise WrongKey(table.key("size"), "say which allocation: size, stack or kernel")
    if by_kernel and (by_stack or table.has("ordinal")):
        raise WrongKey(
            table.key("kernel"), "a kernel's argument names one place: no stack, ordinal"
        )
    for name in ("argument", "bytes"):
        if table.has(name) and not by_kernel:
            raise WrongKey(table.key(name), "belongs to a kernel: add kernel")
    sizes = table.take("size", (1, 1 << 62), sizes_of)
    rule = RegionRule(
        name=table.take("name", "", name_of),
        size_min=sizes[0],
        size_max=sizes[1],
        ordinal=table.take("ordinal", EVERY, number(0, 1 << 30)),
        stack=table.take("stack", "", pattern),
        kernel=table.take("kernel", "", pattern),
        argument=table.take("argument", 0, number(0, 255)),
        bytes=table.take("bytes", 0, size_of),
    )
    if not rule.name:
        raise WrongKey(table.key("name"), "give the region a name")
    table.end("name", "size", "ordinal", "stack", "kernel", "argument", "bytes")
    return rule


def _trigger(table: Table) -> Trigger:
    text = table.take("on", "", pattern)
    on, _, rest = text.partition(":")
    kernel, every = "", 1
    if on == "kernel":
        kernel, _, period = rest.partition(":every=")
        every = int(period) if period.isdecimal() else 0 if period else 1
    if not (text in TRIGGERS[:2] or kernel):
        raise WrongKey(
            table.key("on"), f"{text!r}: write graph-launch, stream-synchronize or kernel:NAME"
        )
    if every < 1:
        raise WrongKey(table.key("on"), f"{text!r}: write kernel:NAME:every=4")
    every = table.take("every", every, number(1, 1 << 30))
    interval_ms = table.take("interval_ms", 0, number(0, 1 << 30))
    table.end("on", "every", "interval_ms")
    return Trigger(on=on, kernel=kernel, every=every, interval_us=1000 * interval_ms)
