"""New inputs out of those that are there: for parsers of binary formats and of text.

Owns: the moves, and where in an input they hit. Promises: all chance comes from the generator that
is given, sizes stay within the bound. Called by fuzzing.py. It knows no format; what a format needs
(a checksum that is right) its target mends.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Sequence
from typing import Final

INPUT_BYTES_MAX: Final = 1 << 17
_NUMBERS: Final = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 24, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32 - 16, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 64),
)
_HEAD_BYTES: Final = 256  # headers lie at the beginning, tables of ELF files at the end
_WORD: Final = re.compile(rb"[.%@!\w$:]+|[^\s\w]")

Move = Callable[[bytearray, random.Random, Sequence[bytes]], bytearray]


def mutate(rng: random.Random, pool: Sequence[bytes]) -> bytes:
    """One input of the pool, changed in one to several places."""
    data = bytearray(rng.choice(pool))
    is_text = bool(data) and not any(byte > 126 for byte in data[:64])
    moves = (*_MOVES, *_TEXT_MOVES * 2) if is_text else _MOVES
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        data = rng.choice(moves)(data, rng, pool)
    return bytes(data[:INPUT_BYTES_MAX])


def _place(data: bytearray, rng: random.Random) -> int:
    """Where to change something: headers and tables as often as all the rest."""
    last = max(len(data) - 1, 0)
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randint(0, min(last, _HEAD_BYTES))
    if kind == 1:
        return rng.randint(max(0, last - 4 * _HEAD_BYTES), last)
    return rng.randint(0, last)


def _flip(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytearray:
    if data:
        data[_place(data, rng)] ^= 1 << rng.randrange(8)
    return data


def _set(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytearray:
    if data:
        data[_place(data, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return data


def _number(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytearray:
    """A field of 2, 4 or 8 bytes: a number at a limit, or one near to what it was."""
    size = rng.choice((2, 4, 4, 8, 8))
    at = _place(data, rng) & -size
    if at + size <= len(data):
        value = rng.choice((*_NUMBERS, len(data), len(data) - at))
        if rng.random() < 0.5:
            value = int.from_bytes(data[at : at + size], "little") + rng.choice((-8, -1, 1, 8, 16))
        data[at : at + size] = struct.pack("<Q", value % (1 << 64))[:size]
    return data


def _cut(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytearray:
    return data[: _place(data, rng)]


def _remove(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytearray:
    at = _place(data, rng)
    del data[at : at + rng.choice((1, 4, 8, 16, 64, 256, 4096))]
    return data


def _repeat(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytearray:
    at, size = _place(data, rng), rng.choice((1, 4, 8, 16, 24, 64, 256))
    return data[:at] + data[at : at + size] * rng.choice((2, 2, 3, 17)) + data[at + size :]


def _insert(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytearray:
    at = _place(data, rng)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 8, 16, 64))) + data[at:]


def _exchange(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytearray:
    """Two pieces of the same size, such as entries of a table."""
    size = rng.choice((4, 8, 16, 24, 64))
    one, two = (_place(data, rng) & -size for _ in range(2))
    if max(one, two) + size <= len(data):
        data[one : one + size], data[two : two + size] = (
            data[two : two + size],
            data[one : one + size],
        )
    return data


def _cross(data: bytearray, rng: random.Random, pool: Sequence[bytes]) -> bytearray:
    """The beginning of this and the end of another."""
    other = rng.choice(pool)
    at = _place(data, rng)
    return data[:at] + other[min(at, len(other)) if rng.random() < 0.5 else 0 :]


def _words(data: bytearray, rng: random.Random, pool: Sequence[bytes]) -> bytearray:
    """A word of the text becomes another one, of this text or of another, or goes."""
    mine = list(_WORD.finditer(data))
    if not mine:
        return data
    hit = rng.choice(mine)
    theirs = _WORD.findall(rng.choice(pool) if rng.random() < 0.3 else data) or [b";"]
    new = rng.choice((rng.choice(theirs), rng.choice(theirs), b"", hit[0] + b" " + hit[0]))
    return data[: hit.start()] + new + data[hit.end() :]


def _lines(data: bytearray, rng: random.Random, pool: Sequence[bytes]) -> bytearray:
    """A line comes twice, goes, or comes from elsewhere."""
    mine = data.split(b"\n")
    theirs = rng.choice(pool).split(b"\n")
    at = rng.randrange(len(mine))
    mine[at : at + rng.randrange(3)] = rng.choices((*mine, *theirs), k=rng.randrange(3))
    return bytearray(b"\n").join(mine)


_MOVES: Final[tuple[Move, ...]] = (
    *(_flip, _flip, _set, _number, _number, _number, _cut, _remove, _repeat, _insert, _exchange),
    _cross,
)
_TEXT_MOVES: Final[tuple[Move, ...]] = (_words, _words, _lines)
