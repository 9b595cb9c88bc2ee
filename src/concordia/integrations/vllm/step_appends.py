"""The tasks that append what a step wrote.

Owns: which records a write becomes. Promises: full blocks that follow each other are one task with
a record each; where a token is no row of its block, the whole block is appended for it. Called by
the worker side. It submits nothing.
"""

from __future__ import annotations

from typing import Any

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.integrations.vllm.appends import Append
from concordia.integrations.vllm.audit import Audit
from concordia.integrations.vllm.load import PieceRange
from concordia.integrations.vllm.step_writes import Write, runs_of


class StepAppends:
    """The appends of one rank."""

    def __init__(
        self, checkpointer: Checkpointer, region: Any, *, block_tokens: int, audit: Audit | None
    ) -> None:
        self._checkpointer, self._region = checkpointer, region
        self._block_tokens = block_tokens
        self._audit = audit

    def of(self, write: Write, step: int, *, has_rows: bool) -> list[Append]:
        """What one request appends in one step."""
        size = self._block_tokens
        found: list[Append] = []
        for first, blocks in runs_of(write.full):
            start, end = first * size, (first + len(blocks)) * size
            append = self._append(write, step, PieceRange(abi.KIND_KV_BLOCK, start, end, blocks))
            found.append(append)
            if self._audit is not None:
                self._audit.offer(append, write, token_start=end - size, token_end=end)
        if write.tail is not None:
            start, end, block = write.tail
            if has_rows:
                piece = PieceRange(abi.KIND_KV_TAIL, start, end, (block,))
            else:
                piece = PieceRange(abi.KIND_KV_BLOCK, start // size * size, end, (block,))
            found.append(self._append(write, step, piece))
        return found

    def _append(self, write: Write, step: int, piece: PieceRange) -> Append:
        task = self._checkpointer.kv_task(
            self._region,
            kind=piece.kind,
            key=write.key,
            incarnation=write.incarnation,
            token_start=piece.start,
            token_end=piece.end,
            blocks=piece.blocks,
            step=step,
            model_hash=write.model_hash,
            is_each=len(piece.blocks) > 1,
        )
        return Append(write.request, piece.start, piece.blocks, task, len(piece.blocks))
