"""What the journal knows of one request: its incarnations and what every rank has of each, floor 3.

Owns: `Incarnation` and `Request`. Promises: an answer about an incarnation uses its own records,
and of others only blocks that its keys name; each record that is held here is in use in the ledger
until it is dropped. Called by replay. It does not know which request a record belongs to, nor when
one ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from concordia.journal.coverage import Coverage, Cut, pieces_of
from concordia.journal.keys import Group, KeyTable
from concordia.journal.ledger import Held, Ledger

# A record's incarnation is the router's times this, plus lives within the engine
# (integrations/vllm/identity.py).
INCARNATION_STRIDE: Final = 1000


class Incarnation:
    """One life of a request's KV: what each rank has, and the keys of its blocks."""

    __slots__ = ("covered", "keys", "records", "replica")

    def __init__(self, replica: int) -> None:
        self.covered: dict[Group, dict[int, Coverage]] = {}
        self.keys: dict[int, tuple[int, Held]] = {}  # block index: key, and the record that says so
        self.replica = replica  # where this life was
        self.records: list[Held] = []  # the KIND_BLOCK_KEY records

    def rank(self, group: Group, rank: int) -> Coverage:
        """What one rank has; made when it is not there yet."""
        return self.covered.setdefault(group, {}).setdefault(rank, Coverage())

    def reach(self, group: Group, table: KeyTable, size: int) -> int:
        """Tokens that every rank has committed; `size` is tokens per block, 0 if not known yet."""
        ranks = self.covered.get(group, {})
        return min(
            (
                (ranks.get(rank) or Coverage()).reach(self._shared(group, rank, table, size))
                for rank in range(group[1])
            ),
            default=0,
        )

    def first_own(self) -> int | None:
        """The first token that this life wrote itself, on any rank; None when it wrote none."""
        starts = (covered.first() for ranks in self.covered.values() for covered in ranks.values())
        return min((start for start in starts if start is not None), default=None)

    def cut(self, number: int, group: Group, table: KeyTable, size: int) -> Cut:
        """What may be restored of this life: from streams that are final, and of others by key."""
        ranks = self.covered.get(group, {})
        walked = {
            rank: (ranks.get(rank) or Coverage()).walk(
                self._shared(group, rank, table, size),
                is_readable=lambda held: held.source.is_final,
            )
            for rank in range(group[1])
        }
        tokens = min((end for end, _ in walked.values()), default=0)
        if not tokens:
            return Cut()
        count = tokens // size if size else 0
        names = [self.keys[index][0] if index in self.keys else 0 for index in range(count)]
        for name in names:
            table.touch(group, name)
        pieces = {
            rank: pieces_of(used, rank=rank, tokens=tokens) for rank, (_, used) in walked.items()
        }
        return Cut(tokens, number, pieces, names)

    def name(self, group: Group, covered: Coverage, start: int, table: KeyTable, size: int) -> None:
        """Enter the whole block at `start` under its key, when both are known."""
        span = covered.blocks.get(start)
        if not size or span is None or span.end != start + size or start % size:
            return
        named = self.keys.get(start // size)
        if named is not None:
            table.enter(group, named[0], span.held, named[1])

    def unname(self, index: int, table: KeyTable, sizes: dict[int, int]) -> None:
        """The block at this index gets another key: under its old one nobody may find it any
        more.
        """
        for group, ranks in self.covered.items():
            for covered in ranks.values():
                span = covered.blocks.get(index * sizes.get(group[0], 0))
                if span is not None:
                    table.withdraw(span.held)

    def drop(self, ledger: Ledger, table: KeyTable) -> None:
        """Let everything go."""
        for ranks in self.covered.values():
            for covered in ranks.values():
                for held in covered.held():
                    ledger.release(held)
        for key, _ in self.keys.values():
            table.unrefer(key)
        for held in self.records:
            ledger.release(held)

    def _shared(
        self, group: Group, rank: int, table: KeyTable, size: int
    ) -> Callable[[int], Held | None]:
        def find(start: int) -> Held | None:
            if start and (not size or start % size):
                return None
            named = self.keys.get(start // size if start else 0)
            if named is None:
                return None
            held = table.piece(group, named[0], rank=rank, replica=self.replica)
            return held if held is not None and held.record.token_start == start else None

        return find


class Request:
    """Everything that the journal knows of one request."""

    __slots__ = (
        "finish",
        "incarnations",
        "is_finished",
        "is_finishing",
        "others",
        "replica",
        "segments",
    )

    def __init__(self) -> None:
        self.incarnations: dict[int, Incarnation] = {}
        self.others: list[Held] = []  # parameters and tokens, as the router wrote them
        self.is_finishing = False
        self.is_finished = False
        self.finish: Held | None = None
        self.replica = 0  # the last that wrote for it
        self.segments: set[int] = set()  # where records of it lie, wanted or not

    def limits(
        self, group: Group, table: KeyTable, size: int, bounds: Mapping[int, int]
    ) -> dict[int, int | None]:
        """Up to where each life's tokens are the request's tokens; None for no limit. See
        Cuts.longest.
        """
        homes = {number: number // INCARNATION_STRIDE for number in self.incarnations}
        found: dict[int, int | None] = {}
        for number, home in homes.items():
            told = [bound for other, bound in bounds.items() if other >= home]
            if home not in bounds:
                newer = (life for other, life in self.incarnations.items() if homes[other] > home)
                told += [_resumed_at(life, group, table, size) for life in newer]
            found[number] = min(told, default=None)
        return found


def _resumed_at(life: Incarnation, group: Group, table: KeyTable, size: int) -> int:
    """Where a life went on from others' tokens, as far as its own records show it; 0 when they do
    not.

    It computed from a token that was known. Where keys do not reach its first record, one before
    that was lost, and the place of the first that is left proves nothing.
    """
    first = life.first_own()
    if first is None or life.reach(group, table, size) < first:
        return 0
    return first
