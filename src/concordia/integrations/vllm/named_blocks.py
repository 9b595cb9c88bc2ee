"""Which of the engine's blocks have a record in the journal, and under which key.

Owns: the key of each block, which keys this engine wrote first, and which the journal is known to
have. Promises: a key that the journal let go of, or never had, names nothing from that answer on;
what is newer than the answer is not judged by it; an answer costs as much as what changed since the
one before, and what it takes away leaves here in parts. Called by write_set.py. It knows no
requests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from concordia import config


@dataclass(slots=True)
class _Missing:
    """Keys that an answer does not have, and that are not taken away yet."""

    keys: set[int]
    before_step: int  # what was named from this step on is too new for that answer
    since: float = field(default_factory=time.monotonic)


class NamedBlocks:
    """The blocks of one engine."""

    def __init__(self) -> None:
        # block id -> (key of the record with its bytes, step it was named)
        self._keys: dict[int, tuple[int, int]] = {}
        self._holders: dict[int, list[int]] = {}  # key -> blocks
        self._authored: dict[int, int] = {}  # keys that this engine wrote first -> step
        self._told: set[int] = set()  # keys that the journal has, as far as it said
        # keys of blocks that were filled from a record, while the journal has not said so itself
        self._filled: set[int] = set()
        # by step, oldest first: keys named in it, and not looked for in the journal's answers yet
        self._unproven: deque[tuple[int, list[int]]] = deque()
        self._missing: deque[_Missing] = deque()  # oldest first, none of them empty

    def __contains__(self, block: int) -> bool:
        found = self._keys.get(block)
        return found is not None and not self._is_missing(*found)

    def key_of(self, block: int) -> int:
        """0 when no record is known to have its bytes."""
        found = self._keys.get(block)
        return 0 if found is None or self._is_missing(*found) else found[0]

    def _is_missing(self, key: int, step: int) -> bool:
        """Whether what was named so in this step is to be taken away."""
        return any(step < one.before_step and key in one.keys for one in self._missing)

    def _is_authored(self, key: int) -> bool:
        step = self._authored.get(key)
        return step is not None and not self._is_missing(key, step)

    def author(self, block: int, key: int, *, step: int, is_shared: bool) -> None:
        """The engine has appended this block; a shared key names these bytes from here on."""
        if is_shared:
            self._authored[key] = step
        self._put(block, key, step)

    def fill(self, block: int, key: int, *, step: int) -> None:
        """The block is filled from the record of this key. One that two engines gave to different
        bytes names ours only if we did not write it, too.
        """
        if not self._is_authored(key):
            self._filled.add(key)
            self._put(block, key, step)

    def _put(self, block: int, key: int, step: int) -> None:
        self.drop(block)
        self._keys[block] = key, step
        self._holders.setdefault(key, []).append(block)
        if not self._unproven or self._unproven[-1][0] != step:
            self._unproven.append((step, []))
        self._unproven[-1][1].append(key)

    def drop(self, block: int) -> bool:
        """No record has what this block will hold; whether one had what it held."""
        found = self._keys.pop(block, None)
        if found is None:
            return False
        blocks = self._holders[found[0]]
        blocks.remove(block)
        if not blocks:
            del self._holders[found[0]]
        return True

    def is_journaled(self, key: int) -> bool:
        """Whether some record has this key."""
        return key in self._told or key in self._filled or self._is_authored(key)

    def is_from_journal(self, block: int, key: int) -> bool:
        """Whether the block was filled from a record of this key, and holds it still; what was
        computed here is not from there.
        """
        return bool(key) and not self._is_authored(key) and self.key_of(block) == key

    def learn_all(self, known: set[int], *, before_step: int) -> None:
        """The journal's own list of keys; what is missing there and was named before this step
        names nothing any more. No answer's step is lower than that of the answer before.
        """
        self._told = known
        self._judge({*self._authored, *self._holders}.difference(known), before_step)

    def learn(self, come: Iterable[int], gone: Iterable[int], *, before_step: int) -> None:
        """The same from what changed in that list."""
        self._told.update(come)
        left = self._told.intersection(gone)
        self._told -= left
        self._judge(left, before_step)

    def _judge(self, missing: set[int], before_step: int) -> None:
        """A key that is too new to be judged stays unproven, and is looked for the next time."""
        named: set[int] = set()
        while self._unproven and self._unproven[0][0] < before_step:
            named.update(self._unproven.popleft()[1])
        self._filled -= named
        missing |= named.difference(self._told)
        if missing:
            self._missing.append(_Missing(missing, before_step))

    @property
    def has_missing(self) -> bool:
        """Whether `take_away` has more to do."""
        return bool(self._missing)

    def take_away(self) -> list[int]:
        """Take missing keys away; the blocks that relied on them. Of many keys a part is taken, and
        the others by the next calls: a prefill's thousands would hold a step up for milliseconds.
        What has waited for KEYS_WAIT_S goes at once.
        """
        late = time.monotonic() - config.KEYS_WAIT_S
        waiting = sum(len(one.keys) for one in self._missing)
        left = max(config.KEYS_TAKEN, waiting // 16)
        lapsed: list[int] = []
        while self._missing and (left > 0 or self._missing[0].since <= late):
            one = self._missing[0]
            left -= 1
            key = one.keys.pop()
            if self._authored.get(key, one.before_step) < one.before_step:
                del self._authored[key]
            lapsed += [
                block
                for block in self._holders.get(key, ())
                if self._keys[block][1] < one.before_step
            ]
            if not one.keys:
                self._missing.popleft()
        return lapsed

    def clear(self) -> None:
        """Name nothing by what was computed so far."""
        for known in (self._keys, self._holders, self._authored):
            known.clear()
        self._told.clear()
        self._filled.clear()
        self._unproven.clear()
        self._missing.clear()
