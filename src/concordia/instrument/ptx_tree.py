"""The statements of a PTX text, floor 3.

Owns: `Module`, `Function`, `Statement` and the grammar that finds where each begins and ends.
Promises: a statement is a place in the text, so what nobody edits stays as it is, byte for byte;
sizes and nesting are bounded and nothing recurses; what does not parse is ImageRefused with its
line. Called by ptx and the rooms that look into statements. It judges no instruction: a compiler
does, of the rewritten text as of the original.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument.ptx_reader import Reader
from concordia.instrument.ptx_tokens import Kind, Token

_LINKAGE: Final = frozenset({".visible", ".extern", ".weak", ".common"})


class Shape(enum.IntEnum):
    """What a statement is."""

    DIRECTIVE = 1
    LABEL = 2
    INSTRUCTION = 3
    OPEN = 4  # of a scope
    CLOSE = 5


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement; `end` is behind its semicolon. `head` is the instruction with its modifiers,
    the directive or the label's name; `guard` is "", "%p" or "!%p".
    """

    shape: Shape
    start: int
    end: int
    head: str = ""
    guard: str = ""
    body: int = 0  # where the operands begin

    @property
    def root(self) -> str:
        """The instruction without its modifiers."""
        return self.head.partition(".")[0]


@dataclass(slots=True)
class Function:
    """A kernel or a function; without a body it is a declaration."""

    name: str
    is_entry: bool
    start: int
    head_end: int  # where the body's brace is, or behind the semicolon
    end: int = 0
    statements: list[Statement] = field(default_factory=list)

    @property
    def has_body(self) -> bool:
        """Whether its code is here."""
        return bool(self.statements)


@dataclass(slots=True)
class Module:
    """A whole text."""

    text: str
    functions: list[Function] = field(default_factory=list)
    directives: list[Statement] = field(default_factory=list)  # everything outside of functions
    version: str = ""
    target: tuple[str, ...] = ()
    address_bits: int = 32  # what PTX says where it says nothing

    def edited(self, insertions: Sequence[tuple[int, str]]) -> str:
        """The text with these pieces put in; they are in order of their places."""
        pieces: list[str] = []
        done = 0
        for at, piece in insertions:
            pieces += (self.text[done:at], piece)
            done = at
        pieces.append(self.text[done:])
        return "".join(pieces)


def parse(text: str) -> Module:
    """Read a text. Raises ImageRefused."""
    if len(text) > config.PTX_BYTES_MAX:
        raise ImageRefused(f"PTX of {len(text)} bytes: {config.PTX_BYTES_MAX} is the most")
    reader = Reader(text)
    module = Module(text)
    while reader.token.kind is not Kind.END:
        if reader.token.kind is Kind.DOT:
            _outer(reader, module)
        elif reader.token.text == ";":
            reader.take()
        else:
            raise reader.refused("a directive expected")
    if not module.version or not module.target:
        raise ImageRefused("PTX without .version and .target")
    return module


def _outer(reader: Reader, module: Module) -> None:
    """One directive outside of functions, or a whole function."""
    start, name = reader.token.start, reader.token.text
    if name in _PLAIN:
        reader.take()
        _PLAIN[name](reader, module)
        module.directives.append(Statement(Shape.DIRECTIVE, start, reader.end, name))
        return
    taken, has_body = reader.declaration()
    kinds = {token.text for token in taken if token.kind is Kind.DOT}
    if not kinds & {".entry", ".func"}:
        head = next((t.text for t in taken if t.text not in _LINKAGE), "")
        module.directives.append(Statement(Shape.DIRECTIVE, start, reader.end, head))
        return
    function = Function(
        _function_name(reader, taken),
        ".entry" in kinds,
        start,
        reader.token.start if has_body else reader.end,
    )
    if has_body:
        _body(reader, function)
    function.end = reader.end
    module.functions.append(function)


def _function_name(reader: Reader, taken: list[Token]) -> str:
    depth = 0
    is_behind = False
    for token in taken:
        if token.kind is Kind.MARK:
            depth += (token.text == "(") - (token.text == ")")
        elif token.kind is Kind.DOT:
            is_behind = is_behind or token.text in {".entry", ".func"}
        elif token.kind is Kind.WORD and is_behind and depth == 0:
            return token.text
    raise reader.refused("a function has a name")


def _version(reader: Reader, module: Module) -> None:
    module.version = reader.take_kind(Kind.NUMBER).text


def _target(reader: Reader, module: Module) -> None:
    names = [reader.take_kind(Kind.WORD).text]
    while reader.take_mark(","):
        names.append(reader.take_kind(Kind.WORD).text)
    module.target = tuple(names)


def _address_size(reader: Reader, module: Module) -> None:
    size = reader.take_kind(Kind.NUMBER).text
    if size not in {"32", "64"}:
        raise reader.refused("addresses of 32 or 64 bits")
    module.address_bits = int(size)


def _file(reader: Reader, _: Module) -> None:
    reader.take_kind(Kind.NUMBER)
    reader.take_kind(Kind.STRING)
    while reader.take_mark(","):
        reader.take_kind(Kind.NUMBER)


def _section(reader: Reader, _: Module) -> None:
    """Debugging data: lines without semicolons between two braces."""
    if reader.take().kind not in {Kind.DOT, Kind.WORD} or not reader.take_mark("{"):
        raise reader.refused("a section has a name and braces")
    while not reader.take_mark("}"):
        if reader.token.text == "{" and reader.token.kind is Kind.MARK:
            raise reader.refused("no braces in a section")
        reader.take()


def _pragma(reader: Reader, _: Module) -> None:
    reader.pass_rest()


def _location(reader: Reader, _: Module) -> None:
    """`.loc file line column`, and which call it was inlined at."""
    for _place in range(3):
        reader.take_kind(Kind.NUMBER)
    while reader.take_mark(","):
        word = reader.take_kind(Kind.WORD).text
        if word == "function_name":
            reader.take_kind(Kind.WORD)
            if reader.take_mark("+"):
                reader.take_kind(Kind.NUMBER)
        elif word == "inlined_at":
            for _place in range(3):
                reader.take_kind(Kind.NUMBER)
        else:
            raise reader.refused("function_name or inlined_at expected")


# Directives that end without a semicolon, or with one of their own.
_PLAIN: Final = {
    ".version": _version,
    ".target": _target,
    ".address_size": _address_size,
    ".file": _file,
    ".section": _section,
    ".pragma": _pragma,
    ".loc": _location,
}


def _body(reader: Reader, function: Function) -> None:
    """All statements from a brace to the one that closes it."""
    unused = Module("")
    depth = 0
    while True:
        token = reader.token
        start = token.start
        if token.kind is Kind.MARK and token.text in "{}":
            reader.take()
            depth += 1 if token.text == "{" else -1
            if depth > config.PTX_NESTING_MAX:
                raise reader.refused(f"more than {config.PTX_NESTING_MAX} scopes in scopes")
            shape = Shape.OPEN if token.text == "{" else Shape.CLOSE
            function.statements.append(Statement(shape, start, reader.end))
            if depth == 0:
                return
        elif token.kind is Kind.DOT:
            reader.take()
            if token.text in {".loc", ".file"}:
                _PLAIN[token.text](reader, unused)
            else:
                reader.pass_rest()
            function.statements.append(
                Statement(Shape.DIRECTIVE, start, reader.end, token.text, body=token.end)
            )
        elif token.text == ";":
            reader.take()
        else:
            function.statements.append(_instruction(reader))


def _instruction(reader: Reader) -> Statement:
    """An instruction with its guard, or a label."""
    start = reader.token.start
    guard = ""
    if reader.take_mark("@"):
        guard = "!" if reader.take_mark("!") else ""
        guard += reader.take_kind(Kind.WORD).text
    head = reader.take_kind(Kind.WORD).text
    if not guard and reader.take_mark(":"):
        return Statement(Shape.LABEL, start, reader.end, head)
    while reader.token.kind is Kind.DOT:  # modifiers may stand apart
        head += reader.take().text
    body = reader.end
    reader.pass_rest()
    return Statement(Shape.INSTRUCTION, start, reader.end, head, guard, body)
