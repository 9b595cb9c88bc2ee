"""Which requests a journal has records of, and in which segments, floor 3.

Owns: requests by key, the coldest first, and by segment. Promises: a request stays while a record
of it lies anywhere, wanted or not, so that its end is not forgotten before its records are; the
record of its end goes when nothing else is left that it would have to explain. Called by replay. It
does not know what a request has, nor decide when one ends.
"""

from __future__ import annotations

from collections import OrderedDict

from concordia.journal.ledger import Ledger
from concordia.journal.life import Request
from concordia.journal.record import Record


class RequestTable:
    """Every request of which something is there."""

    def __init__(self, ledger: Ledger, segment_bytes: int) -> None:
        self.requests: OrderedDict[int, Request] = OrderedDict()
        self._ledger = ledger
        self._segment_bytes = segment_bytes
        self._present: dict[int, set[int]] = {}  # request keys by segment

    def touch(self, record: Record) -> Request:
        """The request of a record that has come, made when it is new; it is the warmest now."""
        request = self.requests.get(record.key)
        if request is None:
            request = self.requests[record.key] = Request()
        else:
            self.requests.move_to_end(record.key)
        self._mark(record, request)
        return request

    def moved(self, record: Record) -> None:
        """A copy of one of its records lies elsewhere, too."""
        request = self.requests.get(record.key)
        if request is not None:
            self._mark(record, request)

    def forget_segment(self, segment: int) -> None:
        """The segment was given back: requests of which nothing is left are forgotten."""
        for key in self._present.pop(segment, ()):
            request = self.requests.get(key)
            if request is not None:
                request.segments.discard(segment)
                self.forget_if_gone(key, request)

    def forget_if_gone(self, key: int, request: Request) -> None:
        """Let a finished request go once nothing but its end is left."""
        if not request.is_finished:
            return
        finish = request.finish
        if finish is not None:
            home = finish.record.offset // self._segment_bytes
            if request.segments <= {home}:
                self._ledger.release(finish)
                request.finish = None
        if not request.segments:
            del self.requests[key]

    def _mark(self, record: Record, request: Request) -> None:
        segment = record.offset // self._segment_bytes
        if segment not in request.segments:
            request.segments.add(segment)
            self._present.setdefault(segment, set()).add(record.key)
