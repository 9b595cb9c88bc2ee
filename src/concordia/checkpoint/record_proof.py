"""The self-tests of handlers that save what is not KV, floor 4.

Owns: the proofs of bytes_append and of page_scan for one page size. Promises: a handler whose
record differs in one byte, in its hash or in its names, that misses a page, appends a clean one or
takes a task that names what is not there, is refused with what it did. Called by checkpointer.py
before it installs one. Does not test bursts, which only note pages, nor install anything.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import closing

from concordia import abi
from concordia.checkpoint.expected import compare
from concordia.checkpoint.handler import bytes_source, page_source
from concordia.checkpoint.region import PageRegion, RegionEntry
from concordia.checkpoint.scratch_journal import ScratchJournal
from concordia.device.compiler import HandlerSource
from concordia.device.driver import Device, Image
from concordia.errors import HandlerRefused
from concordia.journal.record import payload_hash
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Completion, Task
from concordia.runtime.trial import TRIAL_SLOTS, Trial

# nothing, less than a word, odd, a byte into the second leaf, whole leaves
BYTES_SIZES = (0, 3, 129, abi.LEAF_BYTES + 1, 3 * abi.LEAF_BYTES)
PAGES = 3  # of the scratch region: two that are named in an order that is not theirs, and another


def proven_bytes(device: Device, *, lanes: int, source: HandlerSource | None = None) -> Image:
    """bytes_append, or another handler in its place, compiled and tested."""
    image = device.build(source or bytes_source())
    journal = ScratchJournal(BYTES_SIZES)
    with closing(_open_trial(device, journal, lanes)) as trial:
        trial.adopt("bytes_append", image)
        for index, size in enumerate(BYTES_SIZES):
            payload = secrets.token_bytes(size)
            task = Task(
                kind=abi.TASK_APPEND,
                record_kind=abi.KIND_EVENT,
                token_start=index,
                token_end=index + 1,
                payload=payload,
            )
            done = trial.run(task)
            _judge("bytes_append", done, journal, index, payload)
            _judge_names("bytes_append", journal, index, (abi.KIND_EVENT, index, index + 1))
        # bytes that did not come along with the task
        stray = Task(kind=abi.TASK_APPEND, source=journal.pool.address, source_bytes=64)
        _judge_refusal("bytes_append", trial.run(stray), journal, len(BYTES_SIZES))
    return image


def proven_pages(
    device: Device, page_bytes: int, *, lanes: int, source: HandlerSource | None = None
) -> Image:
    """page_scan for one page size, or another handler in its place, compiled and tested."""
    image = device.build(source or page_source(page_bytes))
    journal = ScratchJournal([abi.LEAF_BYTES + count * page_bytes for count in (PAGES, 1, 2)])
    with closing(_open_trial(device, journal, lanes)) as trial:
        PageProof(device, trial, journal, page_bytes).test(image)
    return image


def _open_trial(device: Device, journal: ScratchJournal, lanes: int) -> Trial:
    trial = Trial(Runtime(device, target=journal.target, lanes=lanes, slots=TRIAL_SLOTS))
    trial.hold(journal)
    return trial


class PageProof:
    """A scratch region of a few random pages, and what a scan must say of it."""

    def __init__(
        self, device: Device, trial: Trial, journal: ScratchJournal, page_bytes: int
    ) -> None:
        self._trial, self._journal = trial, journal
        self._pages = [secrets.token_bytes(page_bytes) for _ in range(PAGES)]
        # One page more than the region has: who takes it for one of the region's finds it there.
        self._base = trial.allocate((PAGES + 1) * page_bytes, b"".join(self._pages))
        hashes = trial.allocate(PageRegion.table_bytes(PAGES + 1))
        self._entry = RegionEntry(
            device, number=1, bases=[self._base], block_count=PAGES, page_hashes=hashes
        )
        trial.hold(self._entry)

    def test(self, image: Image) -> None:
        """Everything is dirty at first, then a page with another last byte; then pages are named;
        and what is not there is refused.
        """
        self._trial.adopt("page_scan", image, region_address=self._entry.address)
        self._expect(self._run(token_end=PAGES), 0, None)
        self._change(1, -1)
        self._expect(self._run(token_end=PAGES), 1, [1])
        self._expect_clean()
        self._change(2, 0)
        self._expect(self._run(blocks=[2, 0]), 2, [2, 0])
        self._expect_clean()
        for words in ({"blocks": [PAGES]}, {"token_end": PAGES + 1}, {}):
            _judge_refusal("page_scan", self._run(**words), self._journal, 3)

    def _run(self, *, token_end: int = 0, blocks: Sequence[int] = ()) -> Completion:
        return self._trial.run(
            Task(
                kind=abi.TASK_CHECKPOINT,
                region=1,
                record_kind=abi.KIND_PAGE,
                token_end=token_end,
                blocks=blocks,
            )
        )

    def _change(self, page: int, at: int) -> None:
        changed = bytearray(self._pages[page])
        changed[at] ^= 1
        self._pages[page] = bytes(changed)
        self._trial.write(self._base + page * len(changed), self._pages[page])

    def _expect(self, done: Completion, index: int, pages: Sequence[int] | None) -> None:
        """A record of these pages in this order; None: of all of them in any."""
        wanted = PAGES if pages is None else len(pages)
        if done.is_ok and done.result != wanted:
            raise HandlerRefused(f"page_scan: {done.result} pages, expected {wanted}")
        numbers = self._numbers(index) if pages is None and done.is_ok else list(pages or ())
        leaf = b"".join(page.to_bytes(4, "little") for page in numbers)
        expected = leaf.ljust(abi.LEAF_BYTES, b"\0") + b"".join(self._pages[p] for p in numbers)
        _judge("page_scan", done, self._journal, index, expected)
        _judge_names("page_scan", self._journal, index, (abi.KIND_PAGE, 0, wanted))

    def _expect_clean(self) -> None:
        done = self._run(token_end=PAGES)
        if not done.is_ok or done.result:
            raise HandlerRefused(
                f"page_scan: status {done.status}, {done.result} pages, where none has changed"
            )

    def _numbers(self, index: int) -> list[int]:
        leaf = self._journal.payload(index)
        found = [int.from_bytes(leaf[4 * i : 4 * i + 4], "little") for i in range(PAGES)]
        if sorted(found) != list(range(PAGES)):
            raise HandlerRefused(f"page_scan: found pages {found} where all {PAGES} are new")
        return found


def _judge(
    name: str, done: Completion, journal: ScratchJournal, index: int, expected: bytes
) -> None:
    if not done.is_ok:
        raise HandlerRefused(f"{name}: status {done.status} in its self-test")
    if done.sequence != index:
        raise HandlerRefused(f"{name}: answered with record {done.sequence}, expected {index}")
    compare(name, expected, journal.payload(index))
    low, high = journal.header(index)["payload_hash"]
    if int(high) << 64 | int(low) != payload_hash(expected):
        raise HandlerRefused(f"{name}: record {index} has another hash than its payload")


def _judge_names(
    name: str, journal: ScratchJournal, index: int, expected: tuple[int, int, int]
) -> None:
    header = journal.header(index)
    found = tuple(int(header[field]) for field in ("kind", "token_start", "token_end"))
    if found != expected:
        raise HandlerRefused(f"{name}: record {index} is called {found}, expected {expected}")


def _judge_refusal(name: str, done: Completion, journal: ScratchJournal, count: int) -> None:
    if done.status != abi.STATUS_BAD_TASK or journal.committed_count != count:
        raise HandlerRefused(
            f"{name}: status {done.status}, {journal.committed_count} records, for a task that "
            f"names what is not there; expected {abi.STATUS_BAD_TASK} and {count}"
        )
