"""Where the marks of a function go, floor 3.

Owns: `Walk`: one pass over a function: the pieces of text that mark its stores, and what it was
found to write, call or hide. Promises: no run of stores goes over a place where threads wait,
publish, branch or are branched to, so a mark is never held back for longer than straight code
takes; an instruction is never moved or changed. Called by ptx for every function that has a body.
It decides nothing about which functions are edited.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from concordia import config
from concordia.instrument.ptx_marks import MarkText
from concordia.instrument.ptx_names import Names
from concordia.instrument.ptx_stores import Reach, Write, write_of
from concordia.instrument.ptx_tokens import Kind, number, tokens
from concordia.instrument.ptx_tree import Function, Module, Shape, Statement

# A run of stores ends before these, and before whatever has an order of its own.
_ENDS_RUN_WORDS: Final = """
    bar barrier bra brkpt brx call clusterlaunchcontrol cp exit fence griddepcontrol mbarrier membar
    multimem nanosleep ret setmaxnreg tcgen05 tensormap trap wgmma
"""
_ENDS_RUN: Final = frozenset(_ENDS_RUN_WORDS.split())
_ORDERED: Final = frozenset({"release", "acq_rel", "acquire", "sc"})
_LEAVES: Final = frozenset({"ret", "exit", "trap", "bra", "brx"})
_LIMITS: Final = frozenset({".reqntid", ".maxntid", ".minnctapersm", ".maxnreg"})
_REGISTERS: Final = 65536  # of a multiprocessor
REASONS_KEPT: Final = 4
_RUNS_APART_MAX: Final = 4  # that read their words where they begin: two loads each


class Piece(NamedTuple):
    """Text that is put in at an index."""

    at: int
    text: str


@dataclass(slots=True)
class Walk:
    """What one function was found to do, and its marks."""

    function: Function
    head_at: int = 0  # the first statement behind the leading declarations
    pieces: list[Piece] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # why not every store is marked
    callees: dict[str, None] = field(default_factory=dict)  # in order
    exits: list[Statement] = field(default_factory=list)  # ret, exit and trap
    falls_out: bool = False  # of its end, where no instruction says so
    is_whole: bool = False  # it stores through tensor maps or multicast addresses
    is_calling_unknown: bool = False


def walk(module: Module, function: Function, names: Names, marks: MarkText) -> Walk:
    """Look at every statement of a function that has a body."""
    assert function.has_body
    walker = _Walker(module, function, names, marks)
    names.enter(function)
    for statement in function.statements:
        walker.see(statement)
        names.pass_by(statement)
    return walker.finish()


class _Walker:
    def __init__(self, module: Module, function: Function, names: Names, marks: MarkText) -> None:
        self._text = module.text
        self._names = names
        self._marks = marks
        self._found = Walk(function)
        self._targets, self._loops = _branches(module.text, function)  # names, places
        self._lists: dict[str, list[str]] = {}  # of functions, by label
        self._twice = _labels_there_twice(function)  # in scopes: which is meant is not looked at
        self._label = ""
        self._is_pending = False
        self._groups: list[tuple[int, int]] = []  # place of a run's words: index of pieces, at
        self._last: Statement | None = None

    def see(self, statement: Statement) -> None:
        """The next statement."""
        found = self._found
        is_leading = statement.shape is Shape.DIRECTIVE or statement is found.function.statements[0]
        if not found.head_at and not is_leading:
            found.head_at = statement.start
        if statement.shape is Shape.LABEL:
            self._label = statement.head
            if statement.head in self._targets:
                self._end_run(statement)
        elif statement.shape is Shape.DIRECTIVE:
            if statement.head == ".calltargets" and self._label not in self._twice:
                self._lists[self._label] = self._words(statement)
        elif statement.shape is Shape.INSTRUCTION:
            self._instruction(statement)
        if statement.shape is Shape.INSTRUCTION or statement.head in self._targets:
            self._last = statement

    def finish(self) -> Walk:
        """All of it was seen."""
        found, close = self._found, self._found.function.statements[-1]
        found.head_at = found.head_at or close.start
        last = self._last
        found.falls_out = last is None or bool(last.guard) or last.root not in _LEAVES
        self._end_run(close)
        self._place_words()
        return found

    def _instruction(self, statement: Statement) -> None:
        root = statement.root
        writes = write_of(self._text, statement, self._names)
        if root in _ENDS_RUN or not _ORDERED.isdisjoint(statement.head.split(".")):
            self._end_run(statement)
        if root in {"ret", "exit", "trap"}:
            self._found.exits.append(statement)
        elif root == "call":
            self._call(statement)
        for write in writes:
            self._write(statement, write)

    def _write(self, statement: Statement, write: Write) -> None:
        pieces, marks = self._found.pieces, self._marks
        if write.reach is Reach.UNKNOWN:
            self._reason(write.reason)
        elif write.reach is Reach.WHOLE:
            self._found.is_whole = True
        elif write.reach is Reach.RANGE:
            assert write.address is not None
            assert write.length is not None
            self._end_run(statement)
            self._begin_words(statement)
            label = f"${marks.prefix[1:]}r{len(pieces)}_{self._found.function.start}"
            text = marks.range(write.address, write.length, statement.guard, label)
            pieces.append(Piece(statement.end, text))
        else:
            assert write.address is not None
            is_first = not self._is_pending
            if is_first:
                self._begin_words(statement)
            if write.is_destroyed:
                pieces.append(Piece(statement.start, marks.kept(write.address) + "\n\t"))
            text = marks.store(
                write.address, statement.guard, is_first=is_first, is_kept=write.is_destroyed
            )
            pieces.append(Piece(statement.end, text))
            self._is_pending = True

    def _begin_words(self, statement: Statement) -> None:
        self._groups.append((len(self._found.pieces), statement.start))

    def _end_run(self, before: Statement) -> None:
        if self._is_pending:
            self._found.pieces.append(Piece(before.start, self._marks.flush() + "\n\t"))
            self._is_pending = False

    def _place_words(self) -> None:
        """Once at the head where many runs or turns need them and a thread has the registers for
        it, else where a run begins.
        """
        found, marks = self._found, self._marks
        if not self._groups:
            return
        head = marks.declaration()
        is_often = len(self._groups) > _RUNS_APART_MAX or any(
            self._is_in_loop(at) for _, at in self._groups
        )
        if is_often and found.function.is_entry and _has_room(self._text, found.function):
            found.pieces.insert(0, Piece(found.head_at, head + marks.words() + "\n\t"))
            return
        placed = [Piece(found.head_at, head + "\n\t")]
        done = 0
        for index, at in self._groups:
            placed += found.pieces[done:index]
            placed.append(Piece(at, marks.words() + "\n\t"))
            done = index
        found.pieces = placed + found.pieces[done:]

    def _is_in_loop(self, at: int) -> bool:
        index = bisect.bisect_left(self._loops, (at,)) - 1
        return index >= 0 and at < self._loops[index][1]

    def _call(self, statement: Statement) -> None:
        words = list(tokens(self._text, statement.body, statement.end))
        depth, at = 0, 0
        if words[0].text == "(":  # of what it returns
            while depth or not at:
                depth += (words[at].text == "(") - (words[at].text == ")")
                at += 1
            at += 1  # the comma
        name = words[at].text if at < len(words) else ""
        if self._names.find(name) is None:
            self._found.callees[name] = None
            return
        listed = self._lists.get(words[-3].text) if len(words) > 3 else None
        if listed is None:
            self._reason("an indirect call")
            self._found.is_calling_unknown = True
        else:
            self._found.callees |= dict.fromkeys(listed)

    def _words(self, statement: Statement) -> list[str]:
        found = tokens(self._text, statement.body, statement.end)
        return [token.text for token in found if token.kind is Kind.WORD]

    def _reason(self, reason: str) -> None:
        if reason not in self._found.reasons and len(self._found.reasons) < REASONS_KEPT:
            self._found.reasons.append(reason)


def _branches(text: str, function: Function) -> tuple[set[str], list[tuple[int, int]]]:
    """The labels that are branched to, and from where to where it goes back: loops, merged where
    they touch.
    """
    targets: set[str] = set()
    passed: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for statement in function.statements:
        if statement.shape is Shape.LABEL:
            passed[statement.head] = statement.start
        elif statement.root in {"bra", "brx"} or statement.head == ".branchtargets":
            found = tokens(text, statement.body, statement.end)
            names = {token.text for token in found if token.kind is Kind.WORD}
            targets |= names
            begin = min((passed[name] for name in names if name in passed), default=None)
            if begin is not None:
                while loops and loops[-1][1] > begin:
                    begin = min(begin, loops.pop()[0])
                loops.append((begin, statement.end))
    return targets, loops


def _labels_there_twice(function: Function) -> set[str]:
    labels = Counter(s.head for s in function.statements if s.shape is Shape.LABEL)
    return {label for label, count in labels.items() if count > 1}


def _has_room(text: str, function: Function) -> bool:
    """Whether a kernel's limits leave a thread enough registers."""
    if any(statement.root == "setmaxnreg" for statement in function.statements):
        return False
    limits: dict[str, list[int]] = {}
    name = ""
    for token in tokens(text, function.start, function.head_end):
        if token.kind is Kind.DOT:
            name = token.text
        elif token.kind is Kind.NUMBER and name in _LIMITS:
            limits.setdefault(name, []).append(min(number(token.text) or 1, _REGISTERS))
    threads = math.prod(limits.get(".reqntid", limits.get(".maxntid", [1])))
    blocks = max(limits.get(".minnctapersm", [1]))
    registers = min(_REGISTERS // max(threads * blocks, 1), *limits.get(".maxnreg", [256]), 256)
    return registers >= config.PTX_HOIST_REGISTERS_MIN
