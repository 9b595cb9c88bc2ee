"""How many tokens a block has, by layout, floor 3.

Owns: what records say or show of it. Promises: a size comes from a record's flags, or from two
blocks that follow each other; never from a guess, and it does not change once it is known. Called
by replay for every block record. It does not keep records.
"""

from __future__ import annotations

from concordia.journal.coverage import Coverage
from concordia.journal.record import Record


class BlockSizes:
    """Tokens per block."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}  # by layout

    def of(self, layout_hash: int) -> int:
        """Tokens per block of a layout, 0 while nobody has said or shown it."""
        return self.known.get(layout_hash, 0)

    def learn(self, layout_hash: int, record: Record, covered: Coverage) -> bool:
        """Take a new block record in; whether the size has just become known."""
        if layout_hash in self.known:
            return False
        size = record.flags
        for start, end in ((record.token_start, record.token_end), *_neighbours(record, covered)):
            if not size and end in covered.blocks:
                size = end - start  # a block begins where this one ends, so this one is whole
        if size:
            self.known[layout_hash] = size
        return bool(size)


def _neighbours(record: Record, covered: Coverage) -> list[tuple[int, int]]:
    """Blocks that end where this one starts."""
    return [
        (span.start, span.end) for span in covered.blocks.values() if span.end == record.token_start
    ]
