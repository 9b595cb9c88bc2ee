"""Blocks by the chained hash of their tokens, shared by every request with that prefix, floor 3.

Owns: `KeyTable`: for a layout and world, which record of which rank holds the block of a key; who refers to it; in which order
unreferenced blocks were used last. Promises: an entry has its block record and the record that names it in use, and lets both go
together; a key that a live request refers to is never dropped by age. Called by replay and, for room, by the cleaner.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

from concordia.journal.ledger import Held, Ledger

Group: TypeAlias = tuple[int, int]  # layout, world


class Keyed:
    """One block: per rank the record with its bytes and the record that gave it its key."""

    __slots__ = ("pieces",)

    def __init__(self) -> None:
        self.pieces: dict[int, tuple[Held, Held]] = {}


class KeyTable:
    """All blocks that have a key."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._blocks: dict[Group, dict[int, Keyed]] = {}
        self._references: dict[int, int] = {}
        self._idle: OrderedDict[tuple[Group, int], None] = OrderedDict()  # used longest ago first
        self._places: dict[Held, tuple[Group, int, int]] = {}

    def enter(self, group: Group, key: int, block: Held, naming: Held) -> None:
        """This record holds the block of this key for its rank; the first that says so stays."""
        rank = block.source.rank
        keyed = self._blocks.setdefault(group, {}).setdefault(key, Keyed())
        if rank in keyed.pieces or block in self._places:
            return
        self._ledger.use(block)
        self._ledger.use(naming)
        keyed.pieces[rank] = block, naming
        self._places[block] = group, key, rank
        if key not in self._references:
            self._idle[group, key] = None

    def replace(self, old: Held, new: Held) -> None:
        """A later record of the same block took the place of an earlier one."""
        place = self._places.get(old)
        if place is None:
            return
        group, key, rank = place
        is_same_range = (
            old.record.token_start == new.record.token_start
            and old.record.token_end == new.record.token_end
        )
        if is_same_range:
            del self._places[old]
            naming = self._blocks[group][key].pieces[rank][1]
            self._blocks[group][key].pieces[rank] = new, naming
            self._places[new] = place
            self._ledger.use(new)
            self._ledger.release(old)
        else:
            self.drop(group, key)

    def piece(self, group: Group, key: int, rank: int) -> Held | None:
        """The record of one rank."""
        keyed = self._blocks.get(group, {}).get(key)
        found = keyed.pieces.get(rank) if keyed else None
        return found[0] if found else None

    def complete(self, group: Group, key: int) -> list[Held] | None:
        """The records of all ranks, in order, or None when one is missing."""
        keyed = self._blocks.get(group, {}).get(key)
        if keyed is None or len(keyed.pieces) < group[1]:
            return None
        found = [keyed.pieces[rank][0] for rank in range(group[1]) if rank in keyed.pieces]
        return found if len(found) == group[1] else None

    def known(self, group: Group) -> list[int]:
        """Keys of which every rank has the block."""
        return [key for key in self._blocks.get(group, {}) if self.complete(group, key)]

    def touch(self, group: Group, key: int) -> None:
        """The block was of use just now."""
        if (group, key) in self._idle:
            self._idle.move_to_end((group, key))

    def refer(self, key: int) -> None:
        """A live request has this block."""
        self._references[key] = self._references.get(key, 0) + 1
        if self._references[key] == 1:
            for group in self._blocks:
                self._idle.pop((group, key), None)

    def unrefer(self, key: int) -> None:
        """A live request less has it; without any it ages."""
        left = self._references[key] - 1
        if left:
            self._references[key] = left
            return
        del self._references[key]
        for group, blocks in self._blocks.items():
            if key in blocks:
                self._idle[group, key] = None

    def drop_oldest(self) -> bool:
        """Forget the unreferenced block that was used longest ago; False when there is none."""
        if not self._idle:
            return False
        group, key = next(iter(self._idle))
        self.drop(group, key)
        return True

    def drop(self, group: Group, key: int) -> None:
        """Forget one block."""
        keyed = self._blocks[group].pop(key)
        self._idle.pop((group, key), None)
        for block, naming in keyed.pieces.values():
            del self._places[block]
            self._ledger.release(block)
            self._ledger.release(naming)

    def counts(self) -> dict[str, int]:
        """Blocks with a key, and those that no live request refers to."""
        return {"blocks": sum(map(len, self._blocks.values())), "idle_blocks": len(self._idle)}
