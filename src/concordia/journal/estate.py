"""What an owner starts with: a new journal, or what a dead owner left, floor 3.

Owns: the choice between the two. Promises: what a dead owner left is taken over while somebody
still writes there, else described and removed; where a new journal cannot be made as it was asked
for, none of its files is left. Called by the owner once, under its lock. It seals and lends
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from concordia.errors import ConcordiaError
from concordia.journal import fence, segment
from concordia.journal.folder import Folder, choose_segment_bytes, fit_size
from concordia.journal.owner_log import say
from concordia.journal.place import Place
from concordia.journal.segment import Board, Pool
from concordia.journal.survey import Survey, survey


@dataclass(frozen=True, slots=True)
class Estate:
    """The files of a journal. `found`: what lies in them, of a journal that goes on; `reclaimed`:
    the event that tells of leftovers that were removed.
    """

    pool: Pool
    board: Board
    found: Survey | None = None
    reclaimed: dict[str, Any] | None = None


def take(home: Folder, settings: Mapping[str, Any], place: Place) -> Estate:
    """A new journal, or the one that is there and still in use."""
    left = [path.name for path in (home.pool, home.board, home.socket) if path.exists()]
    reason = ""
    if home.board.exists() and home.pool.exists():
        try:
            pool, board = segment.attach(home, writable=True)
            found = survey(pool, board)
        except ConcordiaError as error:
            reason = f"what a dead owner left cannot be used: {error}"
        else:
            if _is_in_use(board, found):
                say(f"adopting {len(found.streams)} streams of owner {board.owner_pid}")
                return Estate(pool, board, found=found)
            reason = _describe_leftovers(home, found, board)
            pool.close()
            board.close()
    home.clear()
    estate = _make(home, settings, place)
    if not left:
        return estate
    event = {"event": "reclaimed", "files": left, "reason": reason}
    say(f"removed leftovers: {json.dumps(event)}")
    return replace(estate, reclaimed=event)


def _make(home: Folder, settings: Mapping[str, Any], place: Place) -> Estate:
    """A new journal."""
    place.check_pool(home.pool)
    own_bytes = place.own_bytes()
    folder = place.folder(home.path)
    size = fit_size(folder, settings["size_bytes"], settings["segment_bytes"], own_bytes=own_bytes)
    segment_bytes = settings["segment_bytes"] or choose_segment_bytes(size)
    try:
        pool = Pool.create(
            home.pool,
            size=size,
            segment_bytes=segment_bytes,
            at=place.pool,
            put=lambda address: say(place.put(address, size, unit=segment_bytes)),
        )
        place.check(pool.mapping.address, size)
        board = Board.create(
            home.board, segment_bytes=segment_bytes, segment_count=pool.segment_count
        )
    except ConcordiaError:
        home.clear()
        raise
    return Estate(pool, board)


def _is_in_use(board: Board, found: Survey) -> bool:
    """Whether a writer or a router of before still lives."""
    writers = [
        (old.identity.writer_pid, old.identity.writer_start)
        for old in found.streams
        if old.control.state == 1
    ]
    routers = [(r.router_pid, r.router_start) for r in board.registrations().values()]
    leaders = [(r.session, r.session_start) for r in board.registrations().values()]
    return any(fence.is_alive(pid, start) for pid, start in writers + routers + leaders)


def _describe_leftovers(home: Folder, found: Survey, board: Board) -> str:
    records = sum(len(old.records) for old in found.streams)
    return (
        f"owner {board.owner_pid} of {home.path} died and nobody writes there: "
        f"{len(found.streams)} streams, {records} records, {len(found.damage)} damaged places"
    )
