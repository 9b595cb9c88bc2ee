"""Taking the tokens of a PTX text one by one, floor 3.

Owns: `Reader`: one token in hand, brackets in balance. Promises: it never goes behind the end, and
brackets in brackets are bounded. Called by ptx_tree, whose grammar it serves; it knows only where a
declaration and a statement end.
"""

from __future__ import annotations

import re
from typing import Final

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument.ptx_tokens import Kind, Token, data_end, refused, token_at

_OPEN: Final = {"{": "}", "[": "]", "(": ")"}
_CLOSE: Final = frozenset(_OPEN.values())
# Most operands: names, numbers and addresses in a line, to their semicolon. No comment, string or
# brace is in it, and no bracket in a bracket, so it ends where the tokens would.
_WORDS: Final = r"[A-Za-z0-9_$%.,+\-|!\x20\t]*+"
_SIMPLE: Final = re.compile(rf"{_WORDS}(?:\[{_WORDS}\]{_WORDS})*+;", re.ASCII)


class Reader:
    """The tokens of a text, one in hand."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._stop = len(text)
        self.end = 0  # of the token taken last
        self.token = token_at(text, 0, self._stop)

    def take(self) -> Token:
        """The token in hand; at the end there is none."""
        taken = self.token
        if taken.kind is Kind.END:
            raise self.refused("it ends here")
        self.end = taken.end
        self.token = token_at(self.text, self.end, self._stop)
        return taken

    def take_kind(self, kind: Kind) -> Token:
        """The token in hand, which must be of this kind."""
        if self.token.kind is not kind:
            raise self.refused(f"a {kind.name.lower()} expected")
        return self.take()

    def take_mark(self, mark: str) -> bool:
        """Whether it was there, and taken."""
        if self.token.text == mark and self.token.kind is Kind.MARK:
            self.take()
            return True
        return False

    def refused(self, what: str) -> ImageRefused:
        """The error for what is in hand."""
        found = self.token.text[:24] or "the end"
        return refused(self.text, self.token.start, f"{what}, found {found!r}")

    def pass_rest(self) -> None:
        """Go on behind the semicolon outside of all brackets."""
        if self.token.kind is not Kind.END and (
            found := _SIMPLE.match(self.text, self.token.start, self._stop)
        ):
            self.end = found.end()
            self.token = token_at(self.text, self.end, self._stop)
            return
        open_: list[str] = []
        while open_ or not self.take_mark(";"):
            self._bracketed(open_)

    def _bracketed(self, open_: list[str]) -> Token:
        """One token; `open_` are the brackets that are to be closed."""
        token = self.token
        if token.kind is Kind.MARK:
            if token.text in _OPEN:
                open_.append(_OPEN[token.text])
                if len(open_) > config.PTX_NESTING_MAX:
                    raise self.refused(f"more than {config.PTX_NESTING_MAX} brackets in brackets")
            elif token.text in _CLOSE and (not open_ or open_.pop() != token.text):
                raise self.refused("a bracket that was not opened")
        return self.take()

    def declaration(self) -> tuple[list[Token], bool]:
        """A declaration's tokens without plain values, and whether a body follows."""
        taken: list[Token] = []
        open_: list[str] = []
        is_function, last = False, ""
        pragma = False  # one between a kernel's head and its body has a semicolon of its own
        while True:
            text, kind = self.token.text, self.token.kind
            if not open_ and kind is Kind.MARK:
                if text == "{" and is_function:
                    return taken, True
                if text == ";" and not pragma:
                    self.take()
                    return taken, False
                pragma = pragma and text != ";"
            if kind is Kind.DOT and text in {".entry", ".func"}:
                is_function = True
            if kind is Kind.DOT and text == ".pragma":
                pragma = True
            values = None if open_ else data_end(self.text, last, self.token, self._stop)
            if values is not None:
                self.end = values
                self.token = token_at(self.text, self.end, self._stop)
            else:
                taken.append(self._bracketed(open_))
            last = text
