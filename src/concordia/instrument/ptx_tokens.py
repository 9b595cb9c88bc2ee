"""The words of a PTX text, floor 3.

Owns: `Token` and the one place that knows how PTX is spelled: both kinds of comment, strings,
numbers, names with their `.modifier` and `::` parts, marks. Promises: every character is in a
token, a comment or white space, or it is ImageRefused with its line; time is linear in the text.
Called by ptx_tree for a whole text and by whoever looks into one statement. It knows no grammar.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from concordia.errors import ImageRefused


class Kind(enum.IntEnum):
    """What a token is."""

    WORD = 1  # a name, a register, or an instruction with its modifiers: `st.global.v2.b32`
    DOT = 2  # a word of the language: `.reg`, `.b32`
    NUMBER = 3
    STRING = 4
    MARK = 5  # one character
    END = 6  # behind the last one


class Token(NamedTuple):
    """One word and where it lies."""

    kind: Kind
    text: str
    start: int

    @property
    def end(self) -> int:
        """The index behind it."""
        return self.start + len(self.text)


# Each alternative begins with characters of its own and takes as much as it can: nothing is tried
# twice. A number is taken whole with letters that do not belong to it; whoever reads it finds out.
_PIECE: Final = re.compile(
    r"""
    (?P<space>[\x20\t\r\n\f\v]+|//[^\n]*)
    |(?P<comment>/\*)
    |(?P<word>[A-Za-z_$%][A-Za-z0-9_$]*(?:\.[A-Za-z0-9_$]+(?:::[A-Za-z0-9_$]+)*)*)
    |(?P<dot>\.[A-Za-z0-9_$]+(?:::[A-Za-z0-9_$]+)*)
    |(?P<number>[0-9][A-Za-z0-9_]*(?:\.[0-9]*(?:[eE][+-]?[0-9]+)?)?)
    |(?P<string>"(?:[^"\\\n]|\\[^\n])*")
    |(?P<mark>[{}\[\]()<>,;:=@!|+\-*/&^~?%])
    """,
    re.VERBOSE | re.ASCII,
)
# Without whatever could hide its end: comments, strings, braces
_VALUES: Final = re.compile(r"\{[A-Za-z0-9_$%.,+\-\s]*+\}", re.ASCII)
_KINDS: Final = {
    "word": Kind.WORD,
    "dot": Kind.DOT,
    "number": Kind.NUMBER,
    "string": Kind.STRING,
    "mark": Kind.MARK,
}
_SHOWN: Final = 24  # characters of a text that a refusal quotes


def tokens(text: str, start: int = 0, end: int | None = None) -> Iterator[Token]:
    """The tokens between two indices, then one of kind END. Raises ImageRefused."""
    stop = len(text) if end is None else end
    token = token_at(text, start, stop)
    while token.kind is not Kind.END:
        yield token
        token = token_at(text, token.start + len(token.text), stop)
    yield token


def token_at(text: str, at: int, stop: int) -> Token:
    """The first token from an index on; of kind END when there is none. Raises ImageRefused."""
    match = _PIECE.match
    while at < stop:
        found = match(text, at, stop)
        if found is None:
            raise refused(text, at, f"no PTX: {text[at : at + _SHOWN]!r}")
        name = found.lastgroup
        if name == "space":
            at = found.end()
        elif name == "comment":
            closed = text.find("*/", at + 2, stop)
            if closed < 0:
                raise refused(text, at, "a comment that does not end")
            at = closed + 2
        else:
            assert name is not None
            return Token(_KINDS[name], found[0], at)
    return Token(Kind.END, "", stop)


def data_end(text: str, last: str, token: Token, stop: int) -> int | None:
    """Where the values end that this token begins, when they are plain ones behind a "=": there may
    be megabytes, and nobody wants to know them.
    """
    if last != "=" or token.text != "{":
        return None
    found = _VALUES.match(text, token.start, stop)
    return found.end() if found else None


def number(text: str) -> int | None:
    """The whole number that a token of kind NUMBER spells; None for a fraction or for no number."""
    digits = text.rstrip("Uu") if text[:2] not in {"0f", "0F", "0d", "0D"} else ""
    if len(digits) > 70:  # 64 binary digits and their sign of base
        return None
    try:
        if len(digits) > 1 and digits[0] == "0" and digits[1] in "01234567":
            return int(digits, 8)
        return int(digits, 0)
    except ValueError:
        return None


def refused(text: str, at: int, what: str) -> ImageRefused:
    """The error that names a place in a text."""
    return ImageRefused(f"PTX line {text.count(chr(10), 0, at) + 1}: {what}")
