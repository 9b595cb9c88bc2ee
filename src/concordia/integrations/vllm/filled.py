"""Which of the engine's blocks were filled from the journal, and with which records.

Owns: by block, the payload hashes that its last load promised. Promises: blocks of the engine's own
prefix cache count as a request's only when they were filled with the very bytes that its records
have; what the engine computed itself never does, for nobody compared it. Called by the restorer. It
does not know when a block was given to somebody else: `is_kept` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from concordia.recovery.restore import RestorePlan


class Filled:
    """All blocks that were ever filled: as many as the engine has at most. `is_kept(block, key)`:
    nothing else was written there since.
    """

    def __init__(self, is_kept: Callable[[int, int], bool], *, block_tokens: int) -> None:
        self._is_kept = is_kept
        self._block_tokens = block_tokens
        self._hashes: dict[int, tuple[tuple[int, ...], ...]] = {}
        # noted for the step that is being put together: nobody else can have been given them
        self._fresh: set[int] = set()

    def note(self, plan: RestorePlan, blocks: Sequence[int], *, first: int, end: int) -> None:
        """Blocks [first, end) of a request are being filled from this plan."""
        for index in range(first, end):
            self._hashes[blocks[index]] = self._promised(plan, index)
            self._fresh.add(blocks[index])

    def settle(self) -> None:
        """The step is decided; from here `is_kept` knows its blocks."""
        self._fresh.clear()

    def covers(self, plan: RestorePlan, blocks: Sequence[int], *, end: int) -> bool:
        """Whether blocks [0, end) hold what the plan says."""
        if end > min(len(plan.block_keys), len(blocks)):
            return False
        return all(
            (blocks[index] in self._fresh or self._is_kept(blocks[index], plan.block_keys[index]))
            and self._hashes.get(blocks[index]) == self._promised(plan, index)
            for index in range(end)
        )

    def _promised(self, plan: RestorePlan, index: int) -> tuple[tuple[int, ...], ...]:
        size = self._block_tokens
        return tuple(
            tuple(p.payload_hash for p in plan.pieces[rank] if p.token_start // size == index)
            for rank in sorted(plan.pieces)
        )
