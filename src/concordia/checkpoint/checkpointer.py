"""What to save, with which code, when: the door that frameworks use, floor 4.

Owns: one writer's runtime, its registered regions and the host words of its stream. Promises: an
append only enqueues (microseconds, no wait); a region is served only by handlers that passed the
lint and a self-test on its own geometry; `apply_kv` writes nothing unless the payload has the
promised hash; a block id or address that does not exist is an answer, never a fault. Any thread may
call. Called by integrations/ and serving/. Does not decide what must be saved, and never reads the
journal.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from concordia import abi, config
from concordia.checkpoint.page_tasks import pages_task
from concordia.checkpoint.record_proof import proven_bytes
from concordia.checkpoint.region import KvGeometry, PageRegion, Region
from concordia.checkpoint.registry import Registry
from concordia.checkpoint.restore_tasks import KvPiece, restore_by_tasks
from concordia.checkpoint.stream_words import StreamStats, StreamWords
from concordia.device.compiler import HandlerSource
from concordia.device.driver import Device, open_device
from concordia.device.memory import JournalTarget
from concordia.device.numa import check_node
from concordia.device.policy import DEFAULT
from concordia.runtime.counters import RuntimeStats
from concordia.runtime.executor import Runtime
from concordia.runtime.op_table import Operator
from concordia.runtime.ring import Completion, Task, Ticket


class Checkpointer(StreamWords):
    """One writer: appends to one stream, applies and hashes what its regions hold."""

    def __init__(
        self,
        device: Device,
        target: JournalTarget | None,
        *,
        lanes: int = 1,
        owns_device: bool = False,
        residency: str = DEFAULT,
    ) -> None:
        super().__init__(device.library, target.control_address if target else 0)
        self.device = device
        self._owns_device = owns_device
        self._target = target
        self._lock = threading.Lock()
        self._is_open = True
        self.runtime = Runtime(device, target=target, lanes=lanes, residency=residency)
        self._registry = Registry(device, self.runtime, lanes=lanes)
        try:
            if target is not None and target.node is not None:
                # only now: registering the pool may have moved its pages
                check_node(target.pool_address, target.pool_bytes, target.node)
            self._bytes = self.runtime.adopt("bytes_append", proven_bytes(device, lanes=lanes))
        except BaseException:
            self.runtime.close()
            raise

    @classmethod
    def open(
        cls,
        device: str,
        target: JournalTarget | None,
        *,
        lanes: int = 1,
        residency: str = DEFAULT,
    ) -> Self:
        """Open "host", "cuda:<index>" or "auto" for one stream; without a target everything but
        appends works. `residency` is that of the runtime (docs/residency.md).
        """
        opened = open_device(device)
        try:
            return cls(opened, target, lanes=lanes, owns_device=True, residency=residency)
        except BaseException:
            opened.close()
            raise

    def register_kv(self, geometry: KvGeometry, layer_addresses: Sequence[int]) -> Region:
        """Make a paged KV cache known: compiles, proves and installs its handlers. Seconds at
        first, milliseconds from the cache.
        """
        return self._registry.add_kv(geometry, layer_addresses)

    def register_pages(
        self, address: int, *, size: int, page_bytes: int, layout_hash: int = 0
    ) -> PageRegion:
        """Make opaque memory known, to be found dirty by hash; at first all of it is. Its records
        carry `layout_hash`: what the bytes mean.
        """
        return self._registry.add_pages(
            address, size=size, page_bytes=page_bytes, layout_hash=layout_hash
        )

    def replace_append(self, region: Region, source: HandlerSource) -> Operator:
        """Hot swap of a region's append handler; raises HandlerRefused or CompileError and leaves
        the old one in place.
        """
        return self._registry.replace_append(region, source)

    def replace_scan(self, region: PageRegion, source: HandlerSource) -> Operator:
        """The same for the scan handler of an opaque region."""
        return self._registry.replace_scan(region, source)

    def order_after(self, stream: int) -> None:
        """What is handed in from now on sees what this stream of the framework (a handle, 0 for the
        default one) has been given so far.
        """
        self.runtime.order_after(stream)

    def parked(self) -> AbstractContextManager[None]:
        """Keep the executor off the device around calls that wait for all of it: Runtime.parked."""
        return self.runtime.parked()

    def kv_task(
        self,
        region: Region,
        *,
        kind: int,
        key: int,
        incarnation: int,
        token_start: int,
        token_end: int,
        blocks: Sequence[int],
        step: int,
        model_hash: int = 0,
        is_each: bool = False,
    ) -> Task:
        """The task that appends [token_start, token_end) as one record; the first block holds
        token_start. `is_each`: whole blocks, a record for each; the completion's result counts
        them, and its hash is the last one's.

        `model_hash` names what computed the bytes; who restores them must name the same.
        """
        return Task(
            opcode=region.append.opcode,
            kind=abi.TASK_APPEND,
            region=region.number,
            record_kind=kind,
            key=key,
            incarnation=incarnation,
            token_start=token_start,
            token_end=token_end,
            blocks=blocks,
            flags=region.geometry.block_tokens,
            step=step,
            arg=abi.APPEND_EACH if is_each else 0,
            model_hash=model_hash,
        )

    def append_kv(self, region: Region, **words: Any) -> Ticket:
        """Submit one `kv_task` of the same words. Only enqueues."""
        return self.runtime.submit(self.kv_task(region, **words))

    def submit_many(self, tasks: Sequence[Task]) -> list[Ticket]:
        """Enqueue in this order, as many as there is room for; raises RingFull when there is
        none.
        """
        return self.runtime.submit_many(tasks)

    def append_bytes(
        self,
        payload: bytes,
        *,
        kind: int,
        key: int,
        incarnation: int,
        token_start: int = 0,
        token_end: int = 0,
        step: int = 0,
    ) -> Ticket:
        """Append the caller's bytes as one record; they are copied before this returns."""
        return self.runtime.submit(
            Task(
                opcode=self._bytes.opcode,
                kind=abi.TASK_APPEND,
                record_kind=kind,
                key=key,
                incarnation=incarnation,
                token_start=token_start,
                token_end=token_end,
                payload=payload,
                step=step,
            )
        )

    def apply_kv(
        self,
        region: Region,
        *,
        kind: int,
        token_start: int,
        token_end: int,
        blocks: Sequence[int],
        payload_address: int,
        payload_bytes: int,
        payload_hash: int,
    ) -> Ticket:
        """Write a record's payload, which lies in the pool, back into the region;
        STATUS_HASH_MISMATCH and no write if it is not what was promised.
        """
        piece = KvPiece(
            kind, token_start, token_end, blocks, payload_address, payload_bytes, payload_hash
        )
        return self.runtime.submit(piece.task(region))

    def restore_kv(
        self, region: Region, pieces: Sequence[KvPiece], *, timeout_s: float
    ) -> list[bool]:
        """Write the pieces back in this order and read the region's bytes again: whether each is
        what its record promised. A piece that is not leaves its blocks without meaning.

        Where the device has bursts, all multiprocessors do it, and what is handed in meanwhile
        waits. Raises WaitTimeout or RingFull, and RestoreUnfinished when blocks may still be
        written: then nobody may compute into them.
        """
        burst, target = self._registry.restores.get(region.number), self._target
        if burst is None or target is None or not burst.takes(pieces):
            statuses = restore_by_tasks(self.runtime, region, pieces, timeout_s)
        else:
            statuses = burst.restore(self.runtime, target, pieces, timeout_s)
        return [status == abi.STATUS_OK for status in statuses]

    def hash_kv(
        self, region: Region, *, kind: int, token_start: int, token_end: int, blocks: Sequence[int]
    ) -> Ticket:
        """The completion's payload_hash is what append_kv would commit for the bytes that the
        region holds now.
        """
        place = KvPiece(kind, token_start, token_end, blocks, 0, 0, 0)
        return self.runtime.submit(place.look(region))

    def scan_pages(
        self,
        region: PageRegion,
        *,
        first: int = 0,
        count: int | None = None,
        key: int = 0,
        incarnation: int = 0,
        step: int = 0,
        is_burst: bool | None = None,
    ) -> Ticket:
        """Append the pages that changed since they were last appended; the completion's result is
        how many.

        A burst lets the whole device look for them. It must find the region's last page task done,
        and waits for it within WAIT_TASK_S. None: where there is one, and the range is large enough
        to be worth its launch.
        """
        end = region.page_count if count is None else first + count
        words = {"key": key, "incarnation": incarnation, "step": step}
        return self._registry.pages[region.number].scan(first, end, is_burst=is_burst, **words)

    def append_pages(
        self,
        region: PageRegion,
        pages: Sequence[int],
        *,
        key: int = 0,
        incarnation: int = 0,
        step: int = 0,
    ) -> Ticket:
        """Append just these pages, which the caller knows to have changed; nothing is scanned."""
        words = {"key": key, "incarnation": incarnation, "step": step}
        return self._registry.pages[region.number].append(pages, **words)

    def pages_task(self, region: PageRegion, **words: Any) -> Task:
        """What `append_pages` and `scan_pages` submit, for a producer that does so by itself; not
        beside a burst of the same region.
        """
        return pages_task(region, **words)

    def result(self, ticket: Ticket) -> Completion | None:
        """None while pending."""
        return self.runtime.result(ticket)

    def wait(self, ticket: Ticket, timeout_s: float = config.WAIT_TASK_S) -> Completion:
        """Wait for the answer, outside the interpreter's lock; raises WaitTimeout."""
        return self.runtime.wait(ticket, timeout_s)

    def stats(self) -> tuple[RuntimeStats, StreamStats]:
        """Counters for metrics."""
        return self.runtime.stats(), self.stream_stats()

    def close(self) -> None:
        """Run what was enqueued, then give everything back."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            self.runtime.close()
            self._registry.close()
            if self._owns_device:
                self.device.close()

    def retire(self) -> None:
        """Stop for good, but keep memory and code that graphs of the framework name:
        Runtime.retire.
        """
        with self._lock:
            self._is_open = False
            self.runtime.retire()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
