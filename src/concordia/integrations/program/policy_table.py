"""A TOML table of a policy and the checks of its values.

Owns: `Table`, whose keys are taken out one after another, and what a value may look like. Promises:
whatever does not fit is `WrongKey`, which names the key and says what to write; what is left over
is a mistake, too. Called by policy.py, which says where in the file the key stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from concordia import config

_SIZE: Final = re.compile(r"(\d+)\s*(B|KiB|MiB|GiB|TiB)?\Z")
_UNITS: Final = {None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,32}\Z")
_PATTERN: Final = re.compile(r"[^\s]{1,128}\Z")


class WrongKey(Exception):
    """A key and what is wrong with it."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(key)
        self.key, self.text = key, text


class Table:
    """A table whose keys are taken out one after another; what is left is a mistake."""

    def __init__(self, values: Any, path: str) -> None:
        if not isinstance(values, dict):
            raise WrongKey(path, "want a table")
        self._values, self.path = dict(values), path

    def key(self, name: str) -> str:
        """The whole name of a key."""
        return f"{self.path}.{name}" if self.path else name

    def take(self, name: str, otherwise: Any, check: Callable[[Any, str], Any]) -> Any:
        """The value of a key, checked, or `otherwise` where there is none."""
        if name not in self._values:
            return otherwise
        return check(self._values.pop(name), self.key(name))

    def table(self, name: str) -> Table:
        """The table of this name, empty where there is none."""
        return Table(self._values.pop(name, {}), self.key(name))

    def tables(self, name: str) -> list[Table]:
        """The tables [[name]], in their order."""
        found = self._values.pop(name, [])
        if not isinstance(found, list):
            raise WrongKey(self.key(name), f"write [[{name}]], once for each")
        return [Table(value, f"{self.key(name)}[{i}]") for i, value in enumerate(found)]

    def has(self, name: str) -> bool:
        """Whether a key was written."""
        return name in self._values

    def end(self, *known: str) -> None:
        """Refuse what nobody took."""
        for name in self._values:
            raise WrongKey(self.key(name), f"no such key; known are {', '.join(sorted(known))}")


def number(low: int, high: int) -> Callable[[Any, str], int]:
    def check(value: Any, key: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise WrongKey(key, f"{value!r}: want a whole number from {low} to {high}")
        return value

    return check


def switch(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise WrongKey(key, f"{value!r}: want true or false")
    return value


def name_of(value: Any, key: str) -> str:
    if not isinstance(value, str) or not _NAME.match(value):
        raise WrongKey(key, f"{value!r}: want 1 to 32 letters, digits, - and _")
    return value


def pattern(value: Any, key: str) -> str:
    if not isinstance(value, str) or not _PATTERN.match(value):
        raise WrongKey(key, f"{value!r}: want a name or pattern of 1 to 128 characters, no blanks")
    return value


def may_share(one: str, other: str) -> bool:
    """Whether some name may match both patterns of a shell. What is behind a [ or a backslash is
    taken to match anything, so a pair of which that is the difference may.
    """
    first, second = (re.sub(r"[\[\\].*", "*", found, flags=re.DOTALL) for found in (one, other))
    # Whether first[i:] and second[j:] may share one, for each i from its end: the row of all j.
    row = [all(character == "*" for character in second[j:]) for j in range(len(second) + 1)]
    for i in reversed(range(len(first))):
        below, row = row, [False] * (len(second) + 1)
        for j in reversed(range(len(second) + 1)):
            has = j < len(second)
            if first[i] == "*":
                row[j] = below[j] or (has and row[j + 1])
            elif has and second[j] == "*":
                row[j] = row[j + 1] or below[j]
            elif has:
                row[j] = below[j + 1] and (first[i] == second[j] or "?" in (first[i], second[j]))
    return row[0]


def patterns(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > config.PROGRAM_PATTERNS_MAX:
        raise WrongKey(key, f"want a list of at most {config.PROGRAM_PATTERNS_MAX} patterns")
    return tuple(pattern(one, key) for one in value)


def folder(value: Any, key: str) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\n" in value:
        raise WrongKey(key, f"{value!r}: want an absolute path")
    return Path(value)


def size_of(value: Any, key: str) -> int:
    found = _SIZE.match(value) if isinstance(value, str) else None
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif found:
        size = int(found[1]) * _UNITS[found[2]]
    else:
        raise WrongKey(key, f"{value!r}: want a size such as 2MiB, or a number of bytes")
    if not 0 < size <= 1 << 62:
        raise WrongKey(key, f"{value!r}: want 1 byte to 4 EiB")
    return size


def sizes_of(value: Any, key: str) -> tuple[int, int]:
    """One size, or the smallest and the largest."""
    found = [size_of(one, key) for one in (value if isinstance(value, list) else [value])]
    if len(found) not in (1, 2) or found[0] > found[-1]:
        raise WrongKey(key, f"{value!r}: want a size, or the smallest and the largest")
    return found[0], found[-1]


def line_of(text: str, key: str) -> int:
    """The line of a key such as region[1].size, as well as a search finds it; 1 where it does
    not.
    """
    lines = text.splitlines()
    head, _, last = key.rpartition(".")
    table, _, index = (head or last).partition("[")
    header, left = (f"[[{table}]]" if index else f"[{table}]"), int(index.rstrip("]") or 0)
    starts = [i for i, line in enumerate(lines) if line.strip().startswith(header)]
    if len(starts) <= left:
        return 1
    at = starts[left]
    for number in range(at + 1, len(lines)):
        if lines[number].lstrip().startswith("["):
            break
        if re.match(rf"\s*{re.escape(last)}\s*=", lines[number]):
            return number + 1
    return at + 1
