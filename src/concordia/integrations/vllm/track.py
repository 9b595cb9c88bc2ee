"""One request that an engine holds, as its journal sees it.

Owns: its blocks, how much of it is in the journal, and which of its lives computes. Promises: a
record incarnation is of one life of one router incarnation; a life that has no number left is not
protected. Changed by write_set.py; read by the scheduler side and the restorer. Does nothing by
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from concordia.integrations.vllm.identity import INCARNATION_STRIDE, Identity, KeyChain


@dataclass(slots=True)
class Track:
    """One request that the engine holds."""

    identity: Identity
    # None: its tokens alone do not determine its KV, so its blocks are nobody else's
    chain: KeyChain | None
    tokens: Sequence[int]  # the engine's own list: grows as ids become known
    model_hash: int = 0  # what computes its KV, for its records and for whoever restores them
    lives: int = 0
    blocks: list[int] = field(default_factory=list)
    covered: int = 0
    named: int = 0  # blocks whose key has been noted
    late: list[int] = field(default_factory=list)  # full blocks that go out whole later, in order
    is_started: bool = False
    is_protected: bool = True
    is_resting: bool = False  # its appends failed a moment ago: try again a little later

    @property
    def incarnation(self) -> int:
        return self.identity.incarnation * INCARNATION_STRIDE + min(
            self.lives, INCARNATION_STRIDE - 1
        )

    def renew(self) -> None:
        """From here the request's KV is computed anew; nothing written before may be mixed with
        it.
        """
        self.lives += 1
        self.covered = 0
        self.named = 0
        self.late.clear()
        self.is_protected = self.is_protected and self.lives < INCARNATION_STRIDE
