"""What a name in a PTX function stands for, floor 3.

Owns: `Names`: the registers and variables of the scopes that are open at a statement. Promises: a
name that was never declared is None, never a guess. Called by ptx_stores for the address of a
store; whoever walks a function tells it of every statement on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from concordia.instrument.ptx_tokens import Kind, Token, data_end, number, token_at, tokens
from concordia.instrument.ptx_tree import Function, Module, Shape, Statement

_REGISTER: Final = ".reg"
_DIGITS_MAX: Final = 10  # of a register's number: no compiler counts further
_WIDTHS: Final = frozenset({"8", "16", "32", "64", "128"})
_SPACES: Final = frozenset({_REGISTER, ".local", ".shared", ".param", ".global", ".const", ".tex"})


@dataclass(frozen=True, slots=True)
class Named:
    """A register of so many bits, or a variable in a state space."""

    space: str
    bits: int

    @property
    def is_register(self) -> bool:
        """Whether its value is at hand; a variable's address is."""
        return self.space == _REGISTER


@dataclass(slots=True)
class _Scope:
    exact: dict[str, Named] = field(default_factory=dict)
    numbered: dict[str, tuple[int, Named]] = field(default_factory=dict)  # `%r<10>`


class Names:
    """The scopes around a statement, innermost last."""

    def __init__(self, module: Module) -> None:
        self._scopes = [_Scope()]
        for statement in module.directives:
            if statement.head in _SPACES:
                self._declare(_declared(module.text, statement))
        self._text = module.text

    def enter(self, function: Function) -> None:
        """Begin a function: its parameters are known in all of it."""
        del self._scopes[1:]
        self._scopes.append(_Scope())
        space, bits = "", 0
        for token in tokens(self._text, function.start, function.head_end):
            if token.kind is Kind.DOT:
                space = token.text if token.text in _SPACES else space
                bits = _bits(token.text) or bits
            elif token.kind is Kind.WORD and space:
                self._scopes[-1].exact[token.text] = Named(space, bits)
            elif token.text == ")":
                space = ""

    def pass_by(self, statement: Statement) -> None:
        """Go on behind a statement."""
        if statement.shape is Shape.OPEN:
            self._scopes.append(_Scope())
        elif statement.shape is Shape.CLOSE:
            self._scopes.pop()
        elif statement.shape is Shape.DIRECTIVE and statement.head in _SPACES:
            self._declare(_declared(self._text, statement))

    def find(self, name: str) -> Named | None:
        """What the name stands for here."""
        for scope in reversed(self._scopes):
            if found := scope.exact.get(name) or (scope.numbered and _numbered(scope, name)):
                return found
        return None

    def _declare(self, words: Iterable[Token]) -> None:
        space, bits, depth = "", 0, 0
        is_value = False  # behind a "=" until the next name
        last = ""
        for token in words:
            if token.kind is Kind.MARK:
                depth += (token.text in "([{<") - (token.text in ")]}>")
                is_value = (depth > 0 and is_value) or token.text == "="
                is_value = is_value and not (depth == 0 and token.text == ",")
            elif token.kind is Kind.DOT and depth == 0:
                space = space or (token.text if token.text in _SPACES else "")
                bits = _bits(token.text) or bits
            elif token.kind is Kind.WORD and depth == 0 and not is_value and space:
                last = token.text
                self._scopes[-1].exact[last] = Named(space, bits)
            elif token.kind is Kind.NUMBER and depth == 1 and space == _REGISTER and last:
                self._scopes[-1].exact.pop(last, None)
                count = number(token.text) or 0
                self._scopes[-1].numbered[last] = (count, Named(space, bits))


def _declared(text: str, statement: Statement) -> Iterator[Token]:
    """The tokens of a declaration, without plain values."""
    last, at = "", statement.start
    while (token := token_at(text, at, statement.end)).kind is not Kind.END:
        values = data_end(text, last, token, statement.end)
        if values is None:
            yield token
        last, at = token.text, values or token.end


def _numbered(scope: _Scope, name: str) -> Named | None:
    """`%r7` where `%r<10>` was declared."""
    stem = name.rstrip("0123456789")
    if len(name) - len(stem) > _DIGITS_MAX:
        stem = name[:-_DIGITS_MAX]
    for length in range(len(stem), len(name)):
        family = scope.numbered.get(name[:length])
        digits = name[length:]
        if family and (digits == "0" or digits[0] != "0") and int(digits) < family[0]:
            return family[1]
    return None


def _bits(kind: str) -> int:
    """Of a type such as `.b64`; 0 for any other word, a predicate too."""
    width = kind[2:]
    return int(width) if kind[1:2] in {"b", "u", "s", "f"} and width in _WIDTHS else 0
