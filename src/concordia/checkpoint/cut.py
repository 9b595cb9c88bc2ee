"""Checkpoints of page regions that are one consistent cut, floor 4.

Owns: `CutWriter`: the order of a checkpoint's records. Promises: the marker is handed in only once
every page that differs and all host state are committed, so a marker in the journal means a whole
step; one life of a writer begins with all pages, so a checkpoint never mixes incarnations; it
appends all again once it has appended as much as they are, so that no more than three times the
pages lie in the journal; a full one is waited for within a bound, then it is JournalFull and the
checkpoint before counts on. The regions must not change between `begin` and the end of `commit`.
Called by integrations. One thread at a time. It reads nothing back: recovery/pages does.

    begin:  scan region 1 | scan region 2 | ... | state      commit:  wait for them | marker
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import PageRegion
from concordia.errors import AnswerForgotten, DeviceError, JournalFull, UsageError
from concordia.journal.marker import Marker, RegionMark, table_digest
from concordia.runtime.ring import Completion, Ticket


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint that is in the journal."""

    step: int
    pages: int  # that were appended, as far as the answers were still kept
    sequence: int  # of the marker in its stream


def joined(marked: Iterable[range]) -> list[range]:
    """At most SCAN_RANGES_MAX ranges that hold these, in order: the narrowest gaps are closed."""
    found: list[range] = []
    for pages in sorted((one for one in marked if one), key=lambda one: one.start):
        if found and pages.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, pages.stop))
        else:
            found.append(pages)
    if len(found) <= config.SCAN_RANGES_MAX:
        return found
    gaps = sorted(b.start - a.stop for a, b in pairwise(found))
    # as many gaps stay as are wider than this one
    widest_closed = gaps[-config.SCAN_RANGES_MAX]
    merged = found[:1]
    for pages in found[1:]:
        if pages.start - merged[-1].stop <= widest_closed:
            merged[-1] = range(merged[-1].start, pages.stop)
        else:
            merged.append(pages)
    return merged


class _Part(NamedTuple):
    """One task of a checkpoint."""

    what: str
    again: Callable[[], Ticket]  # hands it in once more
    ticket: Ticket


class CutWriter:
    """Writes one series of checkpoints: of these regions, under this key, in this incarnation."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        regions: Mapping[str, PageRegion],
        *,
        key: int,
        incarnation: int,
    ) -> None:
        self._checkpointer = checkpointer
        self._regions = dict(regions)
        self._names: dict[str, Any] = {"key": key, "incarnation": incarnation}
        self._step = -1  # the newest that was begun
        self._is_begun = False
        self._parts: list[_Part] = []  # of the checkpoint that is open
        self._state_bytes = 0
        # of the stream when all pages were appended last
        self._fresh = self._checkpointer.stream_stats()

    def begin(
        self,
        step: int,
        state: bytes = b"",
        marked: Mapping[str, Sequence[range]] | None = None,
    ) -> None:
        """Enqueue every page that differs from what was appended last, and these bytes. Steps only
        grow; what was begun and not committed is given up.

        `marked`: only these pages of the regions that it names can have changed since the step
        before, and only they are read. It is not believed where all pages are appended.
        """
        if step <= self._step:
            raise UsageError(f"step {step} comes after step {self._step}: steps must grow")
        if len(state) > config.STATE_BYTES_MAX:
            raise UsageError(
                f"{len(state)} bytes of state: at most {config.STATE_BYTES_MAX}; "
                "make the rest a region"
            )
        if self._step < 0 or self._has_grown():
            self._forget_pages()
            marked = None
        self._step, self._state_bytes, self._parts = step, len(state), []
        self._is_begun = False
        for name, region in self._regions.items():
            whole = [range(region.page_count)]
            for pages in whole if marked is None else joined(marked.get(name, whole)):
                self._hand_in(f"region {name}", partial(self.scan, name, pages))
        for at in range(0, len(state), config.STATE_PART_BYTES):
            part = state[at : at + config.STATE_PART_BYTES]
            self._hand_in("host state", partial(self._append, part, abi.KIND_STATE, at))
            if len(self._parts) > config.STATE_PARTS_AHEAD:  # the ring's arena holds only so much
                self._checkpointer.runtime.finish(self._parts[-config.STATE_PARTS_AHEAD].ticket)
        self._is_begun = True  # all of it was handed in

    def commit(self, timeout_s: float = config.CHECKPOINT_WAIT_S) -> Committed:
        """Wait until all of it is committed, then for the marker. Raises JournalFull, WaitTimeout
        or DeviceError: then the checkpoint before is the newest.
        """
        if not self._is_begun:
            raise UsageError("no checkpoint was begun")
        self._is_begun = False
        deadline = time.monotonic() + timeout_s
        parts, self._parts = self._parts, []
        pages = sum(self._settle(part, deadline)[1] for part in parts)
        if pages == sum(region.page_count for region in self._regions.values()):
            self._fresh = self._checkpointer.stream_stats()
        marks = {
            name: RegionMark(
                region.number, region.page_count, region.page_bytes, self._digest(region)
            )
            for name, region in self._regions.items()
        }
        payload = Marker(marks, self._state_bytes).pack()
        again = partial(self._append, payload, abi.KIND_CHECKPOINT)
        done, _ = self._settle(_Part("the marker", again, again()), deadline)
        assert done.sequence is not None  # of a record that was committed
        return Committed(self._step, pages, done.sequence)

    def scan(self, name: str, pages: range | None = None) -> Ticket:
        """One region's part of `begin`: of these pages, else of all, those that differ."""
        region = self._regions[name]
        pages = range(region.page_count) if pages is None else pages
        return self._checkpointer.scan_pages(
            region, first=pages.start, count=len(pages), step=self._step, **self._names
        )

    def _hand_in(self, what: str, again: Callable[[], Ticket]) -> None:
        self._parts.append(_Part(what, again, again()))

    def _append(self, payload: bytes, kind: int, at: int = 0) -> Ticket:
        return self._checkpointer.append_bytes(
            payload, kind=kind, token_start=at, token_end=at + len(payload), step=self._step,
            **self._names,
        )  # fmt: skip

    def _settle(self, part: _Part, deadline: float) -> tuple[Completion, int]:
        """Its last answer, and the pages of all; what found the journal full is handed in again,
        and a scan goes on where it stopped.
        """
        pages = 0
        try:
            done = self._wait(part.ticket, deadline)
        except AnswerForgotten:
            # Other tasks went round the ring for laps since `begin`. What is there stays, or is
            # replaced by the same.
            done = self._wait(part.again(), deadline)
        while done.status == abi.STATUS_JOURNAL_FULL:
            pages += done.result
            if time.monotonic() >= deadline:
                raise JournalFull(f"{part.what}: the journal has no room left; make it larger")
            time.sleep(config.OWNER_POLL_S)
            done = self._wait(part.again(), deadline)
        if not done.is_ok:
            raise DeviceError(f"{part.what} could not be appended: status {done.status}")
        return done, pages + done.result

    def _forget_pages(self) -> None:
        """To the next scan every page is new."""
        self._fresh = self._checkpointer.stream_stats()
        for region in self._regions.values():
            self._checkpointer.device.write(region.page_hashes, bytes(16 * region.page_count))

    def _has_grown(self) -> bool:
        """Whether what was appended since is as much as all pages, or more records than an owner
        can name in one answer.
        """
        now, then = self._checkpointer.stream_stats(), self._fresh
        return (
            now.committed_bytes - then.committed_bytes
            > sum(region.size for region in self._regions.values())
            or now.committed_count - then.committed_count > config.CHECKPOINT_RECORDS_MAX
        )

    def _digest(self, region: PageRegion) -> int:
        """What names the version of every page."""
        table = self._checkpointer.device.read(region.page_hashes, 16 * region.page_count)
        return table_digest(table)

    def _wait(self, ticket: Ticket, deadline: float) -> Completion:
        left_s = deadline - time.monotonic()
        return self._checkpointer.wait(ticket, max(config.OWNER_POLL_S, left_s))
