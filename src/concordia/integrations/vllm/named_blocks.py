"""Which of the engine's blocks have a record in the journal, and under which key.

Owns: the key of each block, which keys this engine wrote first, and which the journal is known to
have. Promises: a key that the journal let go of, or never had, leaves here together with the blocks
that relied on it, at once or, of many, some in each step; what is newer than the journal's answer
is not judged by it; an answer costs as much as what changed since the one before. Called by
write_set.py. It knows no requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from concordia import config


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
        # (step, key): named here, and not looked for in the journal's answers yet; oldest first
        self._unproven: deque[tuple[int, int]] = deque()
        self._looked_before = 0  # those of older steps are to be looked for
        # keys that the journal does not have, and are not judged yet, by answer: with the step from
        # which on one that is named is too new for it
        self._doubted: deque[tuple[set[int], int]] = deque()

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def key_of(self, block: int) -> int:
        """0 when no record is known to have its bytes."""
        return self._keys.get(block, (0, 0))[0]

    def author(self, block: int, key: int, *, step: int, is_shared: bool) -> None:
        """The engine has appended this block; a shared key names these bytes from here on."""
        if is_shared:
            self._authored[key] = step
        self._put(block, key, step)

    def fill(self, block: int, key: int, *, step: int) -> None:
        """The block is filled from the record of this key. One that two engines gave to different
        bytes names ours only if we did not write it, too.
        """
        if key not in self._authored:
            self._filled.add(key)
            self._put(block, key, step)

    def _put(self, block: int, key: int, step: int) -> None:
        self.drop(block)
        self._keys[block] = key, step
        self._holders.setdefault(key, []).append(block)
        self._unproven.append((step, key))

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
        """Whether some record has this key; one in doubt counts as it will be judged."""
        if key in self._told or key in self._filled:
            return True
        named_at = self._authored.get(key)
        return named_at is not None and not any(
            named_at < before_step and key in keys for keys, before_step in self._doubted
        )

    def is_from_journal(self, block: int, key: int) -> bool:
        """Whether the block was filled from a record of this key, and holds it still; what was
        computed here is not from there.
        """
        return bool(key) and key not in self._authored and self.key_of(block) == key

    def learn_all(self, known: set[int], *, before_step: int) -> list[int]:
        """The journal's own list of keys; returns what `judge` does. No answer's step is lower than
        that of the answer before.
        """
        self._told = known
        return self._doubt({*self._authored, *self._holders}.difference(known), before_step)

    def learn(self, come: Iterable[int], gone: Iterable[int], *, before_step: int) -> list[int]:
        """The same from what changed in that list."""
        self._told.update(come)
        left = self._told.intersection(gone)
        self._told -= left
        return self._doubt(left, before_step)

    def _doubt(self, missing: set[int], before_step: int) -> list[int]:
        self._doubted.append((missing, before_step))
        self._looked_before = before_step
        return self.judge()

    @property
    def is_in_doubt(self) -> bool:
        """Whether `judge` has more to look at."""
        is_looking = bool(self._unproven) and self._unproven[0][0] < self._looked_before
        return is_looking or bool(self._doubted)

    def judge(self) -> list[int]:
        """The blocks that relied on a key that is missing in the journal and was named before the
        step of its answer. Of many keys a part is looked at, and the others by the next calls: a
        prefill's thousands would hold a step up for milliseconds.
        """
        self._look_for_unproven()
        lapsed: list[int] = []
        for _ in range(_part(sum(len(keys) for keys, _ in self._doubted))):
            while not self._doubted[0][0]:
                self._doubted.popleft()
            keys, before_step = self._doubted[0]
            key = keys.pop()
            if key in self._told:
                continue  # it has come again
            if self._authored.get(key, before_step) < before_step:
                del self._authored[key]
            lapsed += [
                block for block in self._holders.get(key, ()) if self._keys[block][1] < before_step
            ]
        while self._doubted and not self._doubted[0][0]:
            self._doubted.popleft()
        return lapsed

    def _look_for_unproven(self) -> None:
        """What the journal should have by now and has not is in doubt."""
        for _ in range(_part(len(self._unproven))):
            if self._unproven[0][0] >= self._looked_before:
                return
            key = self._unproven.popleft()[1]
            self._filled.discard(key)
            if key not in self._told:
                if not self._doubted or self._doubted[-1][1] != self._looked_before:
                    self._doubted.append((set(), self._looked_before))
                self._doubted[-1][0].add(key)

    def clear(self) -> None:
        """Name nothing by what was computed so far."""
        for known in (self._keys, self._holders, self._authored):
            known.clear()
        self._told.clear()
        self._filled.clear()
        self._unproven.clear()
        self._doubted.clear()


def _part(waiting: int) -> int:
    """Of so many a step looks at: all of few, else some, and more the more there are."""
    return min(waiting, max(config.KEYS_JUDGED, waiting // 8))
