"""Places that a restore was told of and may still read, floor 3.

Owns: which segments must stay where they are for whom, and how long. Promises: a pin ends after
CUT_PIN_S, or at once when the request that it was told for has records of a newer incarnation from
every rank: each rank appends what a step computed after it has loaded what that step began with, so
its records say that nothing is read here any more. Called by streams. It does not free anything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from concordia import config
from concordia.journal.coverage import Piece
from concordia.journal.cuts import Cuts
from concordia.journal.keys import Group


class Told(NamedTuple):
    """A request whose cut was told: its life in the journal was at most `incarnation` by then."""

    key: int
    incarnation: int
    group: Group


class Pins:
    """Segments by who was told of them."""

    def __init__(self, cuts: Cuts, segment_bytes: int) -> None:
        self._cuts = cuts
        self._segment_bytes = segment_bytes
        self._pinned: list[tuple[float, Told | None, frozenset[int]]] = []  # until when

    def add(self, pieces: Mapping[int, Sequence[Piece]], told: Told | None) -> None:
        """These places were told: for a request, or for what is no request's own."""
        segments = frozenset(
            piece.pool_offset // self._segment_bytes for found in pieces.values() for piece in found
        )
        self._pinned.append((time.monotonic() + config.CUT_PIN_S, told, segments))

    def segments(self) -> set[int]:
        """What must stay now."""
        now = time.monotonic()
        self._pinned = [
            (until, told, segments)
            for until, told, segments in self._pinned
            if until > now and not (told and self._cuts.has_gone_on(*told))
        ]
        return {segment for _, _, segments in self._pinned for segment in segments}
