"""Which keys engines may be told of, and in which order they came and went, floor 3.

Owns: by group, the keys that are told now and the number of each key's last change. Promises: who
heard the answer for a number and then hears what changed since knows exactly what is told now; what
cannot be answered so any more, because it is too long ago, is answered in full. Called by keys.py.
It does not know blocks or records.

  numbers    1       2       3          4
  changes    A came  B came  A went     C came        since 1: B, C came, A went; known now: B, C
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from concordia import config

Group: TypeAlias = tuple[int, int]  # layout, world


@dataclass(frozen=True, slots=True)
class KeyNews:
    """What changed up to `cursor`; with `is_all`, `come` is everything that is told."""

    cursor: int
    is_all: bool
    come: list[int]
    gone: list[int]

    @property
    def is_nothing(self) -> bool:
        """Whether there is no news in it."""
        return not (self.is_all or self.come or self.gone)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the owner's socket."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> KeyNews:
        """The inverse of to_json."""
        return KeyNews(**value)


class KeyChanges:
    """Told keys in order of arrival, and their changes."""

    def __init__(self) -> None:
        self._known: dict[Group, dict[int, None]] = {}
        # key -> number of its last change, the latest last
        self._changed: dict[Group, OrderedDict[int, int]] = {}
        self._forgotten: dict[Group, int] = {}  # changes up to this number are no longer there
        self._count = 0

    def tell(self, group: Group, key: int) -> None:
        """Engines may be told of this key from now on."""
        known = self._known.setdefault(group, {})
        if key not in known:
            known[key] = None
            self._note(group, key)

    def withdraw(self, group: Group, key: int) -> None:
        """They may not any more."""
        known = self._known.get(group, {})
        if key in known:
            del known[key]
            self._note(group, key)

    def is_told(self, group: Group, key: int) -> bool:
        return key in self._known.get(group, ())

    def known(self, group: Group) -> list[int]:
        """All that are told now."""
        return list(self._known.get(group, ()))

    def since(self, group: Group, number: int | None) -> KeyNews:
        """What is new to who knows all up to this number; None: who knows nothing."""
        if number is None or not self._forgotten.get(group, 0) <= number <= self._count:
            return KeyNews(self._count, True, self.known(group), [])
        known = self._known.get(group, {})
        come: list[int] = []
        gone: list[int] = []
        for key, changed in reversed(self._changed.get(group, OrderedDict()).items()):
            if changed <= number:
                break
            (come if key in known else gone).append(key)
        return KeyNews(self._count, False, come, gone)

    def _note(self, group: Group, key: int) -> None:
        self._count += 1
        changed = self._changed.setdefault(group, OrderedDict())
        changed[key] = self._count
        changed.move_to_end(key)
        if len(changed) > config.KEY_CHANGES_MAX:
            self._forgotten[group] = changed.popitem(last=False)[1]
