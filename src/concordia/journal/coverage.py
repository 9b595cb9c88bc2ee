"""What one rank has committed of one incarnation of a request, and the values of a cut, floor 3.

Owns: `Coverage` (spans of tokens by the records that hold them), `Piece` and `Cut`. Promises: a
later record of a token range replaces an earlier one, so that a walk never takes bytes that were
written over; a walk is contiguous from token 0. Called by replay, which knows keys and ranks. It
does not know segments, streams or liveness: it says which records it stopped wanting.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, Final

from concordia import abi
from concordia.journal.ledger import Held


@dataclass(frozen=True, slots=True)
class Piece:
    """One record to restore from; apply the pieces of a rank in their order, later ones win."""

    rank: int
    kind: int
    token_start: int
    token_end: int
    pool_offset: int  # of the payload
    payload_bytes: int
    payload_hash: int
    sequence: int
    stream: int
    layout_hash: int = 0  # as the record's header says
    step: int = 0
    model_hash: int = 0  # likewise
    region: int = 0  # likewise


_NAMES: Final = tuple(one.name for one in fields(Piece))
_values_of: Final = attrgetter(*_NAMES)


def _plain(piece: Piece) -> dict[str, int]:
    return dict(zip(_NAMES, _values_of(piece), strict=True))


@dataclass(frozen=True, slots=True)
class Cut:
    """What may be restored: tokens [0, tokens) of one incarnation, for every rank."""

    tokens: int = 0
    incarnation: int = 0
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    block_keys: list[int] = field(default_factory=list)  # by block index, 0 where no key is known

    def to_json(self) -> dict[str, Any]:
        """Plain values for the owner's socket; an engine's requests all ask at once, so the fields
        of their pieces are not looked up one by one.
        """
        pieces = {rank: [_plain(piece) for piece in found] for rank, found in self.pieces.items()}
        return {
            "tokens": self.tokens,
            "incarnation": self.incarnation,
            "pieces": pieces,
            "block_keys": list(self.block_keys),
        }

    def clamped(self, limit: int | None, *, block_tokens: int) -> Cut:
        """The part below `limit`; None for no limit."""
        if limit is None or self.tokens <= limit:
            return self
        if limit <= 0:
            return Cut()
        pieces = {
            rank: [piece for piece in found if piece.token_start < limit]
            for rank, found in self.pieces.items()
        }
        count = limit // block_tokens if block_tokens else 0
        return Cut(limit, self.incarnation, pieces, self.block_keys[:count])

    @staticmethod
    def from_json(value: dict[str, Any]) -> Cut:
        """The inverse of to_json."""
        pieces = {int(rank): [Piece(**p) for p in found] for rank, found in value["pieces"].items()}
        return Cut(value["tokens"], value["incarnation"], pieces, list(value["block_keys"]))


class Span:
    """Tokens [start, end) that a record still holds; end may be below what its header says."""

    __slots__ = ("end", "held", "start")

    def __init__(self, held: Held) -> None:
        self.held = held
        self.start = held.record.token_start
        self.end = held.record.token_end


class Coverage:
    """Spans of one rank; blocks by their start, tails in order of their starts without overlap."""

    def __init__(self) -> None:
        self.blocks: dict[int, Span] = {}
        self._tails: list[Span] = []
        self._starts: list[int] = []  # of _tails, for bisect
        self._blocks_end = 0
        self._reached = 0  # a walk got here through blocks: where the next one may begin

    def add(self, held: Held) -> list[Held]:
        """Take a record in; returns those that are not wanted any more."""
        found = held.record
        if found.token_start >= found.token_end:
            return [held]
        if found.kind == abi.KIND_KV_BLOCK:
            return self._add_block(Span(held))
        return self._add_tail(Span(held))

    def first(self) -> int | None:
        """The first token that a record here holds; None without any."""
        return min([*self.blocks, *self._starts[:1]], default=None)

    def held(self) -> list[Held]:
        """Every record that is wanted here."""
        return [span.held for span in self.blocks.values()] + [span.held for span in self._tails]

    def walk(
        self,
        shared: Callable[[int], Held | None],
        *,
        is_readable: Callable[[Held], bool],
        start: int = 0,
    ) -> tuple[int, list[Held]]:
        """The end of what is contiguous from `start`, and the records that hold it.

        `shared(token)` finds a block that starts at this token through its key.
        """
        at = start
        used: list[Held] = []
        while True:
            best, end = None, at
            block = self.blocks.get(at)
            if block is not None and is_readable(block.held):
                best, end = block.held, block.end
            other = shared(at)
            if other is not None and other.record.token_end > end:
                best, end = other, other.record.token_end
            if best is None:
                tail = self._tail_at(at)
                if tail is not None and is_readable(tail.held):
                    best, end = tail.held, tail.end
            if best is None:
                return at, used
            used.append(best)
            at = end

    def reach(self, shared: Callable[[int], Held | None]) -> int:
        """Like walk, for the number alone; remembers where the last block began."""
        end, used = self.walk(shared, is_readable=lambda _: True, start=self._reached)
        for held in used:
            if held.record.kind != abi.KIND_KV_BLOCK:
                break
            self._reached = held.record.token_start
        return end

    def _add_block(self, span: Span) -> list[Held]:
        if self._is_written_over(span):
            return [span.held]
        dropped = []
        old = self.blocks.get(span.start)
        if old is not None:
            dropped.append(old.held)
            self._reached = min(self._reached, span.start)
        self.blocks[span.start] = span
        self._blocks_end = max(self._blocks_end, span.end)
        first = bisect_left(self._starts, span.start)
        last = first
        while last < len(self._tails) and self._tails[last].end <= span.end:
            dropped.append(self._tails[last].held)
            last += 1
        del self._tails[first:last], self._starts[first:last]
        return dropped

    def _is_written_over(self, block: Span) -> bool:
        """Whether a record of a later step has some of its tokens: then it came late."""
        step = block.held.record.step
        old = self.blocks.get(block.start)
        if old is not None and old.held.record.step > step:
            return True
        at = max(0, bisect_left(self._starts, block.start) - 1)
        while at < len(self._tails) and self._tails[at].start < block.end:
            tail = self._tails[at]
            if tail.end > block.start and tail.held.record.step > step:
                return True
            at += 1
        return False

    def _add_tail(self, span: Span) -> list[Held]:
        """Tokens that are written again are of a later step, and make all beyond them stale. A
        record of an earlier step than its neighbours only came late: appends of one step may run in
        the engine's graph and those of the next outside of it.
        """
        step = span.held.record.step
        first = bisect_left(self._starts, span.start)
        beyond = self._tails[first:]
        newer = [tail for tail in beyond if tail.held.record.step > step]
        dropped = [tail.held for tail in reversed(beyond) if tail.held.record.step <= step]
        del self._tails[first:], self._starts[first:]
        if newer:
            span.end = min(span.end, newer[0].start)
        if first and self._tails[-1].end > span.start:
            if self._tails[-1].held.record.step > step:
                span.end = span.start  # bytes that were written over are never applied
            else:
                self._tails[-1].end = span.start  # written over from here on
        if span.start < self._blocks_end:
            dropped += self._rewind_blocks(span)
        if span.start < span.end:
            newer = [span, *newer]
        else:
            dropped.append(span.held)
        self._tails += newer
        self._starts += [tail.start for tail in newer]
        return dropped

    def _rewind_blocks(self, span: Span) -> list[Held]:
        """Tokens from the start of `span` on were written again: blocks beyond it are stale, one
        may be cut short. Blocks of later steps stay, and cut `span` short instead.
        """
        dropped = []
        at = span.start
        for start, block in list(self.blocks.items()):
            if block.end <= at:
                continue
            if block.held.record.step > span.held.record.step:
                span.end = min(span.end, max(at, start))
            elif start >= at:
                dropped.append(self.blocks.pop(start).held)
            else:
                block.end = at
        self._blocks_end = max((block.end for block in self.blocks.values()), default=0)
        self._reached = 0
        return dropped

    def _tail_at(self, start: int) -> Span | None:
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start:
            return self._tails[at]
        return None


def piece_of(held: Held, *, rank: int) -> Piece:
    """All of one record."""
    r = held.record
    return Piece(
        rank, r.kind, r.token_start, r.token_end, r.payload_offset, r.payload_bytes,
        r.payload_hash, r.sequence, held.source.stream, r.layout_hash, r.step, r.model_hash,
        r.region,
    )  # fmt: skip


def pieces_of(helds: Sequence[Held], *, rank: int, tokens: int) -> list[Piece]:
    """The pieces among these that hold tokens below `tokens`."""
    return [piece_of(held, rank=rank) for held in helds if held.record.token_start < tokens]
