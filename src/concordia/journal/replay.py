"""Index of what a journal holds, by request and by block key, floor 3.

Owns: `ReplayIndex`. Promises: it grows record by record, so that a failover never waits for a scan;
a request that is not finished keeps its records until it loses protection by name. Called by the
owner's only thread; the cleaner asks it what to drop. It does not read streams or check payloads of
KV: who restores checks those. What of it may be restored says cuts.py.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

from concordia import abi, config
from concordia.errors import Corruption
from concordia.journal.block_sizes import BlockSizes
from concordia.journal.checkpoints import CheckpointTable
from concordia.journal.cuts import Cuts
from concordia.journal.events import Events
from concordia.journal.keys import Group, KeyTable
from concordia.journal.ledger import Held, Ledger, Source
from concordia.journal.life import Incarnation, Request
from concordia.journal.record import Record
from concordia.journal.request_table import RequestTable
from concordia.journal.successions import Successions

_KEY_ENTRY: Final = struct.Struct("<IIQQ")  # block index, 0, key low, key high
_KV: Final = (abi.KIND_KV_TAIL, abi.KIND_KV_BLOCK)
_CHECKPOINT: Final = (abi.KIND_PAGE, abi.KIND_STATE, abi.KIND_CHECKPOINT)


class ReplayIndex:
    """What is in the journal, and what of it is wanted."""

    def __init__(self, segment_bytes: int) -> None:
        self.ledger = Ledger(segment_bytes)
        self.keys = KeyTable(self.ledger)
        self.events = Events()
        self.sizes = BlockSizes()
        self.table = RequestTable(self.ledger, segment_bytes)
        self.requests = self.table.requests  # the coldest first
        self.checkpoints = CheckpointTable(self.ledger)
        self._latest: dict[tuple[int, int], Held] = {}  # memberships
        self.cuts = Cuts(self.requests, self.keys, self.sizes)
        self.successions = Successions(
            self.requests, reach=self.cuts.reach, drop=self._drop_incarnations
        )
        self._finishing: deque[tuple[float, int]] = deque()

    # --- growing

    def ingest(
        self, record: Record, source: Source, view: memoryview, *, is_old: bool = False
    ) -> None:
        """Take in the next record of a stream; a marker that `is_old` may lack what it counts."""
        held = Held(record, source)
        if record.kind == abi.KIND_EVENT:
            event = self.events.take(record, source, view)
            if event.get("event") == "differs":
                self._withdraw(event)
            return
        if record.kind in _CHECKPOINT:
            self.table.touch(record)  # so that the end of the series outlives its records
            self._ingest_checkpoint(held, view, is_old)
            return
        if record.kind == abi.KIND_MEMBERSHIP:
            self._ingest_latest(held)
            return
        request = self.table.touch(record)
        if record.kind in _KV:
            request.replica = source.replica
            self._ingest_kv(request, held)
        elif record.kind == abi.KIND_BLOCK_KEY:
            self._ingest_keys(request, held, view)
        elif record.kind == abi.KIND_FINISH:
            self._ingest_finish(request, held)
        elif not request.is_finished:
            self.ledger.use(held)
            request.others.append(held)

    def finish(self, key: int, *, now: float) -> bool:
        """The request ended; a moment later (keys may still be on their way) its tails are dropped.

        A series of checkpoints is dropped at once. False when it is not known or has ended before.
        """
        is_series = self.checkpoints.forget(key)
        request = self.requests.get(key)
        if request is None or request.is_finished or request.is_finishing:
            return is_series
        request.is_finishing = True
        self._finishing.append((now + config.FINISH_GRACE_S, key))
        return True

    def abandon(self, replica: int, *, now: float) -> None:
        """The router of this replica is gone: nobody will resume its requests."""
        for key, request in self.requests.items():
            if request.replica == replica:
                self.finish(key, now=now)

    def settle(self, now: float) -> None:
        """Drop what finished requests do not need any more; cheap when nothing finished."""
        while self._finishing and self._finishing[0][0] <= now:
            key = self._finishing.popleft()[1]
            request = self.requests.get(key)
            if request is not None and not request.is_finished:
                request.is_finished = True
                self._drop_incarnations(request, list(request.incarnations))
                for held in request.others:
                    self.ledger.release(held)
                request.others.clear()
                self.table.forget_if_gone(key, request)

    # --- giving up

    def drop_coldest(self, reason: str) -> int | None:
        """The request that was touched longest ago loses protection, by name; its key or None."""
        for key, request in self.requests.items():
            if not request.is_finished and request.incarnations:
                self._drop_incarnations(request, list(request.incarnations))
                self.requests.move_to_end(key)
                self.events.note({"event": "unprotected", "key": f"{key:032x}", "reason": reason})
                return key
        return None

    def give_up_superseded(self, reason: str) -> bool:
        """The older life of a request goes before the newer has caught up, by name; False without
        any.
        """
        found = self.successions.give_one_up()
        if found is not None:
            event = {"event": "shortened", "key": f"{found[0]:032x}", "tokens": found[1]}
            self.events.note({**event, "reason": reason})
        return found is not None

    def moved(self, held: Held, record: Record, source: Source) -> None:
        """The cleaner has copied a live record."""
        self.ledger.move(held, record, source)
        self.table.moved(record)

    # --- helpers

    def _life(self, request: Request, held: Held) -> Incarnation:
        record = held.record
        life = request.incarnations.get(record.incarnation)
        if life is None:
            life = request.incarnations[record.incarnation] = Incarnation(held.replica)
            if len(request.incarnations) > 1:
                self.successions.note(record.key)
        return life

    def _ingest_checkpoint(self, held: Held, view: memoryview, is_old: bool) -> None:
        try:
            self.checkpoints.ingest(held, view)
        except Corruption as error:
            if not is_old:
                self.events.note({"event": "malformed", "reason": str(error)})

    def _ingest_latest(self, held: Held) -> None:
        """Only the newest record is wanted."""
        name = held.record.key, held.source.rank
        self.ledger.use(held)
        old = self._latest.get(name)
        self._latest[name] = held
        if old is not None:
            self.ledger.release(old)

    def _ingest_finish(self, request: Request, held: Held) -> None:
        old, request.finish = request.finish, held
        self.ledger.use(held)
        if old is not None:  # the name of a series was used again
            self.ledger.release(old)
        self.finish(held.record.key, now=time.monotonic())

    def _ingest_kv(self, request: Request, held: Held) -> None:
        record = held.record
        if request.is_finished:
            return
        life = self._life(request, held)
        covered = life.rank(held.group, held.source.rank)
        self.ledger.use(held)
        for dropped in covered.add(held):
            self.keys.replace(dropped, held)
            self.ledger.release(dropped)
        if record.kind == abi.KIND_KV_BLOCK:
            layout_hash = held.group[0]
            if self.sizes.learn(layout_hash, record, covered):
                self._name_all(held.group)
            else:
                life.name(
                    held.group, covered, record.token_start, self.keys, self.sizes.of(layout_hash)
                )

    def _name_all(self, group: Group) -> None:
        size = self.sizes.of(group[0])
        for request in self.requests.values():
            for life in request.incarnations.values():
                for covered in life.covered.get(group, {}).values():
                    for start in list(covered.blocks):
                        life.name(group, covered, start, self.keys, size)

    def _ingest_keys(self, request: Request, held: Held, view: memoryview) -> None:
        record = held.record
        if request.is_finished or record.payload_bytes % _KEY_ENTRY.size:
            return
        life = self._life(request, held)
        self.ledger.use(held)
        life.records.append(held)
        raw = bytes(view[record.payload_offset : record.payload_offset + record.payload_bytes])
        for index, _, low, high in _KEY_ENTRY.iter_unpack(raw):
            key = high << 64 | low
            old = life.keys.get(index)
            if old is not None:
                life.unname(index, self.keys, self.sizes.known)
                self.keys.unrefer(old[0])
            life.keys[index] = key, held
            self.keys.refer(key)
            for group, ranks in life.covered.items():
                size = self.sizes.of(group[0])
                for covered in ranks.values():
                    life.name(group, covered, index * size, self.keys, size)

    def _withdraw(self, event: Mapping[str, Any]) -> None:
        """An engine's memory and a record of it differ: that block and that life of its request are
        promised to nobody.
        """
        try:
            key, incarnation, start = (
                int(event["key"], 16),
                int(event["incarnation"]),
                int(event["token_start"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            reason = f"an event of a difference names no block: {error!r}"
            self.events.note({"event": "malformed", "reason": reason})
            return
        self.keys.withdraw_of(key, incarnation=incarnation, token_start=start)
        request = self.requests.get(key)
        if request is not None and incarnation in request.incarnations:
            self._drop_incarnations(request, [incarnation])
            reason = str(event.get("reason"))
            self.events.note(
                {
                    "event": "unprotected",
                    "key": f"{key:032x}",
                    "request": event.get("request"),
                    "reason": reason,
                }
            )

    def _drop_incarnations(self, request: Request, numbers: Iterable[int]) -> None:
        for number in numbers:
            request.incarnations.pop(number).drop(self.ledger, self.keys)
