"""What of a request may be restored, floor 3.

Owns: `Cuts`. Promises: a cut never mixes incarnations except through block keys, which name bytes
by their tokens; it ends where every rank has committed, and below the last token, which has to be
computed; an incarnation that was superseded counts up to what its client knew. Called by the owner
for engines, by its pins and by the replay index, whose tables it reads; of these it changes only
how long ago somebody asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from concordia.journal.block_sizes import BlockSizes
from concordia.journal.coverage import Cut, pieces_of
from concordia.journal.keys import Group, KeyTable
from concordia.journal.ledger import Held
from concordia.journal.life import Incarnation, Request


class Cuts:
    """Of one index: `requests` are its, the coldest first."""

    def __init__(
        self, requests: OrderedDict[int, Request], keys: KeyTable, sizes: BlockSizes
    ) -> None:
        self._requests = requests
        self._keys = keys
        self._sizes = sizes

    def longest(
        self,
        key: int,
        *,
        tokens_known: int,
        layout_hash: int,
        world: int,
        bounds: Mapping[int, int] | None = None,
    ) -> Cut:
        """The longest prefix that every rank of one incarnation has committed, below the last
        token.

        An incarnation that was superseded may have computed tokens that nobody received, and its
        successor may have emitted others in their place. So `bounds` says, by router incarnation,
        how many tokens were known when it was superseded (when the next one was submitted), and a
        life of router incarnation i counts up to the smallest bounds[j], j >= i, before the best is
        chosen. Where bounds[i] is not given, a life of i counts only up to where every newer router
        incarnation in the journal wrote its first record itself, if nothing before that record was
        lost (else not at all): it resumed there, from tokens that both have. Such a guard sees only
        incarnations that left records; bounds see all.
        """
        request = self._requests.get(key)
        if request is None:
            return Cut()
        self._requests.move_to_end(key)
        group, size = (layout_hash, world), self._sizes.of(layout_hash)
        limits = request.limits(group, self._keys, size, bounds or {})
        cuts = (
            life.cut(number, group, self._keys, size).clamped(limits[number], block_tokens=size)
            for number, life in request.incarnations.items()
        )
        best = max(cuts, key=lambda cut: (cut.tokens, cut.incarnation), default=Cut())
        return best.clamped(max(0, tokens_known - 1), block_tokens=size)

    def match_prefix(self, keys: Sequence[int], *, layout_hash: int, world: int) -> Cut:
        """The longest run of these block keys that every rank has."""
        group = layout_hash, world
        at = 0
        pieces: dict[int, list[Held]] = {rank: [] for rank in range(world)}
        matched = []
        for key in keys:
            found = self._keys.complete(group, key)
            if found is None or any(h.record.token_start != at for h in found):
                break
            ends = {held.record.token_end for held in found}
            if len(ends) != 1:
                break
            at = ends.pop()
            self._keys.touch(group, key)
            matched.append(key)
            for rank, held in enumerate(found):
                pieces[rank].append(held)
        cut = {rank: pieces_of(found, rank=rank, tokens=at) for rank, found in pieces.items()}
        return Cut(at, 0, cut, matched) if at else Cut()

    def newest(self, key: int) -> int:
        """The latest incarnation of a request that has records, 0 without any."""
        request = self._requests.get(key)
        return max(request.incarnations, default=0) if request is not None else 0

    def has_gone_on(self, key: int, incarnation: int, group: Group) -> bool:
        """Whether every rank has written KV of a later life of this request."""
        request = self._requests.get(key)
        return request is not None and any(
            number > incarnation and len(life.covered.get(group, ())) >= group[1]
            for number, life in request.incarnations.items()
        )

    def committed(self, key: int) -> int:
        """Tokens that every rank of the newest incarnation has committed."""
        request = self._requests.get(key)
        if request is None or not request.incarnations:
            return 0
        newest = request.incarnations[max(request.incarnations)]
        return max((self.reach(newest, group) for group in newest.covered), default=0)

    def reach(self, life: Incarnation, group: Group) -> int:
        """Tokens of this life that every rank has committed."""
        return life.reach(group, self._keys, self._sizes.of(group[0]))
