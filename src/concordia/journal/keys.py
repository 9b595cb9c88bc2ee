"""Blocks by the chained hash of their tokens, shared by every request with that prefix, floor 3.

Owns: `KeyTable`: for a layout and world, which records hold the block of a key; who refers to it;
in which order unreferenced blocks were used last. Promises: an entry has its block record and the
record that names it in use, and lets both go together; a block that a live request refers to is
never dropped by age, and before an unreferenced one goes, nobody has been told of it for a while.
Two engines may compute the same block with different bytes: pieces are kept per replica, and one
answer never mixes them. Called by replay and cleaner.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict

from concordia import config
from concordia.journal.key_changes import Group, KeyChanges, KeyNews
from concordia.journal.ledger import Held, Ledger

__all__ = ["Group", "KeyTable"]


class Keyed:
    """One block: per replica and rank, the record with its bytes and the record that gave it its
    key.
    """

    __slots__ = ("chosen", "pieces")

    def __init__(self) -> None:
        self.pieces: dict[int, dict[int, tuple[Held, Held]]] = {}
        self.chosen: int | None = None  # the replica whose bytes others were given

    def served_by(self, world: int) -> int | None:
        """The replica whose bytes everybody else gets: always the same one once it was told."""
        if self.chosen is None:
            self.chosen = next((r for r, ranks in self.pieces.items() if len(ranks) >= world), None)
        return self.chosen


class KeyTable:
    """All blocks that have a key."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._blocks: dict[Group, dict[int, Keyed]] = {}
        self._references: dict[int, int] = {}
        # used longest ago first, and when: a count that only grows
        self._idle: OrderedDict[tuple[Group, int], int] = OrderedDict()
        self._uses = itertools.count(1)
        # since when, and the bytes that go
        self._condemned: OrderedDict[tuple[Group, int], tuple[float, int]] = OrderedDict()
        self.condemned_bytes = 0  # what goes when the grace is over
        self.withdrawn_count = 0  # keys that were condemned, ever: engines look at this
        self._places: dict[Held, tuple[Group, int]] = {}
        self._told = KeyChanges()  # complete and not condemned

    def enter(self, group: Group, key: int, block: Held, naming: Held) -> None:
        """This record holds the block of this key for its rank; the first of a replica stays."""
        keyed = self._blocks.setdefault(group, {}).setdefault(key, Keyed())
        if block.source.rank in keyed.pieces.get(block.replica, {}) or block in self._places:
            return
        ranks = keyed.pieces.setdefault(block.replica, {})
        self._ledger.use(block)
        self._ledger.use(naming)
        ranks[block.source.rank] = block, naming
        self._places[block] = group, key
        if (group, key) in self._condemned:
            return
        if key not in self._references:
            self._idle[group, key] = next(self._uses)
            self._idle.move_to_end((group, key))
        self._tell(group, key)

    def replace(self, old: Held, new: Held) -> None:
        """A later record of the same block took the place of an earlier one."""
        place = self._places.get(old)
        if place is None:
            return
        is_same_range = (
            old.record.token_start == new.record.token_start
            and old.record.token_end == new.record.token_end
        )
        if not is_same_range:
            self.drop(*place)
            return
        ranks = self._blocks[place[0]][place[1]].pieces[old.replica]
        ranks[old.source.rank] = new, ranks[old.source.rank][1]
        self._places[new] = self._places.pop(old)
        self._ledger.use(new)
        self._ledger.release(old)

    def withdraw(self, block: Held) -> None:
        """What this record holds is not the block of that key after all."""
        place = self._places.get(block)
        if place is not None:
            self.drop(*place)

    def withdraw_of(self, key: int, *, incarnation: int, token_start: int) -> None:
        """The same for every record of a request's life that holds the block at this token. Looks
        at all blocks: it is for what never happens.
        """
        for block in list(self._places):
            r = block.record
            if (r.key, r.incarnation, r.token_start) == (key, incarnation, token_start):
                self.withdraw(block)

    def piece(self, group: Group, key: int, *, rank: int, replica: int) -> Held | None:
        """The record of one rank, as that replica had it: its own bytes, or those that all were
        given.
        """
        keyed = self._blocks.get(group, {}).get(key)
        if keyed is None:
            return None
        server = replica if replica in keyed.pieces else keyed.served_by(group[1])
        found = keyed.pieces[server].get(rank) if server is not None else None
        return found[0] if found else None

    def complete(self, group: Group, key: int) -> list[Held] | None:
        """The records of all ranks of one replica, in order, or None when some are missing."""
        keyed = self._blocks.get(group, {}).get(key)
        server = keyed.served_by(group[1]) if keyed is not None else None
        if keyed is None or server is None:
            return None
        ranks = keyed.pieces[server]
        found = [ranks[rank][0] for rank in range(group[1]) if rank in ranks]
        return found if len(found) == group[1] else None

    def known(self, group: Group) -> list[int]:
        """Keys of which every rank has the block, and which are not about to go."""
        return self._told.known(group)

    def news(self, group: Group, number: int | None) -> KeyNews:
        """The same for who knew them up to this number."""
        return self._told.since(group, number)

    def touch(self, group: Group, key: int) -> None:
        """The block was of use just now."""
        if self._pardon((group, key)):
            self._idle[group, key] = next(self._uses)
            self._tell(group, key)
        elif (group, key) in self._idle:
            self._idle[group, key] = next(self._uses)
            self._idle.move_to_end((group, key))

    def refer(self, key: int) -> None:
        """A live request has this block."""
        self._references[key] = self._references.get(key, 0) + 1
        if self._references[key] == 1:
            for group in self._blocks:
                self._idle.pop((group, key), None)
                if self._pardon((group, key)):
                    self._tell(group, key)

    def unrefer(self, key: int) -> None:
        """A live request less has it; without any it ages."""
        left = self._references[key] - 1
        if left:
            self._references[key] = left
            return
        del self._references[key]
        for group, blocks in self._blocks.items():
            if key in blocks:
                self._idle[group, key] = next(self._uses)

    def last_use(self, block: Held) -> int | None:
        """When the record's block was of use last, in uses of any block; 0 once it was named to go;
        None when a live request refers to it, or it is no block that has a key.
        """
        name = self._places.get(block)
        if name is None:
            return None
        return 0 if name in self._condemned else self._idle.get(name)

    @property
    def has_idle(self) -> bool:
        """Whether there is a block that might be named to go."""
        return bool(self._idle)

    def middle_use(self) -> int:
        """Between the last use of the block that nobody used for longest and of the latest."""
        if not self._idle:
            return 0
        oldest, newest = next(iter(self._idle.values())), next(reversed(self._idle.values()))
        return (oldest + newest) // 2

    def condemn(self, block: Held, now: float) -> int:
        """Name this unreferenced block to go, as condemn_oldest does; its bytes."""
        name = self._places[block]
        if self._idle.pop(name, None) is None:
            return 0
        return self._condemn(name, now)

    def condemn_oldest(self, now: float) -> int:
        """Name the unreferenced block used longest ago as the next to go; its bytes, 0 for none.

        It is not told to anybody from now on; an engine that was told before may still refer to it
        and save it, because it goes only after CONDEMN_GRACE_S.
        """
        if not self._idle:
            return 0
        return self._condemn(self._idle.popitem(last=False)[0], now)

    def _condemn(self, name: tuple[Group, int], now: float) -> int:
        size = self._size(name)
        self._condemned[name] = now, size
        self.condemned_bytes += size
        self.withdrawn_count += 1
        self._told.withdraw(*name)
        return size

    def _pardon(self, name: tuple[Group, int]) -> bool:
        """It need not go after all; whether it was to."""
        found = self._condemned.pop(name, None)
        if found is not None:
            self.condemned_bytes -= found[1]
        return found is not None

    def drop_condemned(self, now: float, *, is_urgent: bool, bytes_max: int | None = None) -> int:
        """Forget blocks that were named long enough ago, or when writers find nothing so many bytes
        of them, the first named first; how many.

        Why they may go: an engine reads at its next look, KNOWN_KEYS_REFRESH_S after they were
        named, that keys were withdrawn, and refers to none of them from its next step on; what it
        said before that is here before the grace is over. Without grace an engine may still name
        one that is gone: that request's cut ends before it until the engine has looked and appended
        the block anew, a second late. No byte is ever taken for another's.
        """
        count, left = 0, self.condemned_bytes if bytes_max is None else bytes_max
        while self._condemned:
            name, (since, size) = next(iter(self._condemned.items()))
            is_due = now - since >= config.CONDEMN_GRACE_S
            if not is_due and not (is_urgent and left > 0):
                break
            self.drop(*name)
            left -= size
            count += 1
        return count

    def drop(self, group: Group, key: int) -> None:
        """Forget one block."""
        keyed = self._blocks[group].pop(key)
        self._idle.pop((group, key), None)
        self._pardon((group, key))
        self._told.withdraw(group, key)
        for ranks in keyed.pieces.values():
            for block, naming in ranks.values():
                del self._places[block]
                self._ledger.release(block)
                self._ledger.release(naming)

    def counts(self) -> dict[str, int]:
        """Blocks with a key, and those that no live request refers to."""
        idle = len(self._idle) + len(self._condemned)
        return {"blocks": sum(map(len, self._blocks.values())), "idle_blocks": idle}

    def _tell(self, group: Group, key: int) -> None:
        """Let engines know of the block, if every rank has it."""
        if not self._told.is_told(group, key) and self.complete(group, key):
            self._told.tell(group, key)

    def _size(self, name: tuple[Group, int]) -> int:
        keyed = self._blocks[name[0]][name[1]]
        return sum(
            block.record.payload_bytes
            for ranks in keyed.pieces.values()
            for block, _ in ranks.values()
        )
