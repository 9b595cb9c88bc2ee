"""Checkpoints of page regions: of each series the newest complete one, floor 3.

Owns: `CheckpointTable`: by key and rank, which records hold the pages and the host state that the
newest marker counts, and those that wait for the next. Promises: a checkpoint is of one incarnation
and one step, never half of it: the pages of a step that has no marker change nothing, and the
records below the newest marker stay in use until the next one; a marker that lacks a page or a byte
raises Corruption and counts for nothing, and one closes its step for whatever comes later. Called
by the replay index. It checks no payload: recovery/pages does.

    life:  pages of steps <= marker | marker | pages since (open)  ->  next marker takes them in
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from concordia import abi
from concordia.errors import Corruption
from concordia.journal.coverage import Piece, piece_of
from concordia.journal.ledger import Held, Ledger, Source
from concordia.journal.marker import Marker, RegionMark, marker_of
from concordia.journal.pages import page_numbers
from concordia.journal.record import Record, request_key

_Pages = dict[int, Held]  # by page


def series_key(name: str) -> int:
    """The key of a series' records, which no request shares."""
    return request_key(f"checkpoints of {name}")


def superseded_markers(found: Iterable[tuple[Record, Source]]) -> set[int]:
    """Where the markers lie that a newer one of their series and rank has taken the place of:
    pages of theirs were let go of since.
    """
    markers: dict[tuple[int, int], list[Record]] = {}
    for record, source in found:
        if record.kind == abi.KIND_CHECKPOINT:
            markers.setdefault((record.key, source.rank), []).append(record)
    old: set[int] = set()
    for series in markers.values():
        newest = max((record.incarnation, record.step) for record in series)
        old |= {r.offset for r in series if (r.incarnation, r.step) < newest}
    return old


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A consistent cut of page regions and host state: every page as it was at this step.

    Apply the pieces of each rank in their order, later ones win: pages by their region, state by
    its bytes. Incarnation 0: there is none. `newest` is the incarnation that wrote last, and
    `is_final` says that none of them can write any more.
    """

    step: int = 0
    incarnation: int = 0
    regions: dict[str, RegionMark] = field(default_factory=dict)
    state_bytes: int = 0
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    newest: int = 0
    is_final: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values for the owner's socket."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Checkpoint:
        """The inverse of to_json."""
        regions = {name: RegionMark(**mark) for name, mark in value["regions"].items()}
        pieces = {int(rank): [Piece(**p) for p in found] for rank, found in value["pieces"].items()}
        return Checkpoint(**(value | {"regions": regions, "pieces": pieces}))


class Life:
    """What one incarnation has appended: below its newest marker, and since."""

    def __init__(self, ledger: Ledger) -> None:
        self.sources: dict[int, Source] = {}
        self.marker: Marker | None = None
        self.step = -1  # of the marker
        self._ledger = ledger
        self._held: list[Held] = []  # the marker and its state
        self._pages: dict[int, _Pages] = {}
        self._open: dict[int, _Pages] = {}
        self._states: dict[int, dict[int, Held]] = {}  # by step and first byte

    def add_pages(self, held: Held, view: memoryview) -> None:
        """A record of pages; a marker has closed its step and all before."""
        record = held.record
        if record.step > self.step:
            pages = self._open.setdefault(record.region, {})
            for page in page_numbers(record, view):
                self._put(pages, page, held)

    def add_state(self, held: Held) -> None:
        """A part of the host state; likewise."""
        record = held.record
        if record.step > self.step:
            parts = self._states.setdefault(record.step, {})
            self._put(parts, record.token_start, held)

    def mark(self, held: Held, view: memoryview) -> bool:
        """A marker: everything of its step counts from now on. False when a newer one is known."""
        step, marker = held.record.step, marker_of(held.record, view)
        if step <= self.step:
            return False
        merged = {
            mark.region: self._merged(name, mark, step) for name, mark in marker.regions.items()
        }
        state = self._whole_state(step, marker.state_bytes)
        before = [page for pages in self._pages.values() for page in pages.values()]
        before += [*self._held, *self._taken(step)]
        for kept in [held, *state, *(page for pages in merged.values() for page in pages.values())]:
            self._ledger.use(kept)
        for old in before:
            self._ledger.release(old)
        self.marker, self.step = marker, step
        self._held, self._pages = [held, *state], merged
        return True

    def drop(self) -> None:
        """Nothing of this life is wanted any more."""
        tables = [*self._pages.values(), *self._open.values(), *self._states.values()]
        for held in [*self._held, *(held for table in tables for held in table.values())]:
            self._ledger.release(held)

    def pieces(self, rank: int) -> list[Piece]:
        """Every record of the checkpoint, oldest first."""
        pages = {id(held): held for found in self._pages.values() for held in found.values()}
        # Records with one stamp are of one task, which has each page once.
        order = sorted(pages.values(), key=lambda held: (held.record.step, held.record.stamp_ns))
        return [piece_of(held, rank=rank) for held in [*order, *self._held[1:]]]

    def _put(self, table: dict[int, Held], place: int, held: Held) -> None:
        old = table.get(place)
        if old is not None and old.record.step > held.record.step:
            return  # a copy of what has been written again
        self._ledger.use(held)
        table[place] = held
        if old is not None:
            self._ledger.release(old)

    def _merged(self, name: str, mark: RegionMark, step: int) -> _Pages:
        found = dict(self._pages.get(mark.region, {}))
        opened = self._open.get(mark.region, {})
        found |= {page: held for page, held in opened.items() if held.record.step <= step}
        if len(found) != mark.pages or max(found) >= mark.pages:
            raise Corruption(
                f"the marker of step {step} counts {mark.pages} pages of {name}, "
                f"the journal has {len(found)}"
            )
        return found

    def _whole_state(self, step: int, size: int) -> list[Held]:
        at, found = 0, []
        parts = self._states.get(step, {})
        while (held := parts.get(at)) is not None and held.record.token_end > at:
            found.append(held)
            at = held.record.token_end
        if at != size:
            raise Corruption(
                f"the marker of step {step} counts {size} bytes of state, the journal has {at}"
            )
        return found

    def _taken(self, step: int) -> list[Held]:
        """What was open up to this step, taken out of there."""
        taken = []
        for pages in self._open.values():
            for page in [page for page, held in pages.items() if held.record.step <= step]:
                taken.append(pages.pop(page))
        for old in [old for old in self._states if old <= step]:
            taken += self._states.pop(old).values()
        return taken


class CheckpointTable:
    """All series: at most two lives of each, the one with the newest marker and the newest one."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._series: dict[tuple[int, int], dict[int, Life]] = {}

    def ingest(self, held: Held, view: memoryview) -> None:
        """Take in a record of pages, state or a marker; raises Corruption when it cannot count."""
        record = held.record
        lives = self._series.setdefault((record.key, held.source.rank), {})
        life = self._life(lives, record.incarnation)
        if life is None:
            return
        life.sources[held.source.stream] = held.source
        if record.kind == abi.KIND_PAGE:
            life.add_pages(held, view)
        elif record.kind == abi.KIND_STATE:
            life.add_state(held)
        elif life.mark(held, view):
            self._drop(lives, [old for old in lives if old < record.incarnation])

    def newest(self, key: int, rank: int = 0) -> Checkpoint:
        """The newest complete checkpoint of a series."""
        lives = self._series.get((key, rank), {})
        is_final = all(s.is_final for life in lives.values() for s in life.sources.values())
        newest = max(lives, default=0)
        for incarnation in sorted(lives, reverse=True):
            life = lives[incarnation]
            if life.marker is not None:
                return Checkpoint(
                    life.step, incarnation, dict(life.marker.regions), life.marker.state_bytes,
                    {rank: life.pieces(rank)}, newest, is_final,
                )  # fmt: skip
        return Checkpoint(newest=newest, is_final=is_final)

    def forget(self, key: int) -> bool:
        """The series has ended; False when there is none."""
        names = [name for name in self._series if name[0] == key]
        for name in names:
            lives = self._series.pop(name)
            self._drop(lives, list(lives))
        return bool(names)

    def _life(self, lives: dict[int, Life], incarnation: int) -> Life | None:
        """The life of a record, begun by its first; None when a newer one has begun or a marker."""
        life = lives.get(incarnation)
        if life is None and incarnation > max(lives, default=-1):
            self._drop(lives, [old for old, life in lives.items() if life.marker is None])
            life = lives[incarnation] = Life(self._ledger)
        return life

    @staticmethod
    def _drop(lives: dict[int, Life], incarnations: Iterable[int]) -> None:
        for incarnation in incarnations:
            lives.pop(incarnation).drop()
