"""journal/checkpoints.py, marker.py: checkpoints in the owner's index.

Invariants: the newest marker counts only where what it counts is there, and none of a series that was let go; whatever lives, steps and owners
end, the index equals a model of the same records.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from concordia import abi, config
from concordia.device.host import HostDevice
from concordia.journal.marker import Marker, RegionMark, table_digest
from concordia.journal.record import leaf_digests
from concordia.journal.writer import Entry, StreamWriter
from concordia.recovery.pages import read_checkpoint
from concordia.testing.journal import SmallJournal
from trainer import KEY, Trainer, newest


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SmallJournal]:
    with SmallJournal(tmp_path / "journal", segments=32, segment_bytes=1 << 17) as small:
        yield small


def test_series_is_let_go_when_it_is_finished(device: HostDevice, journal: SmallJournal) -> None:
    trainer = Trainer(device, journal, incarnation=1)
    trainer.save(1)
    assert newest(journal).incarnation == 1
    assert journal.streams.index.finish(KEY, now=0.0)
    assert newest(journal).incarnation == 0
    assert journal.streams.index.ledger.live_bytes() == 0
    assert journal.cleaner.write_finish(KEY)
    for _ in range(2):
        journal.streams.index.settle(time.monotonic() + 2 * config.FINISH_GRACE_S)
        assert journal.streams.index.ledger.live_bytes() > 0, "its end is known as long as its records lie there"
        journal.adopted()
        assert newest(journal).incarnation == 0
    journal.streams.index.settle(time.monotonic() + 2 * config.FINISH_GRACE_S)
    for stream in list(journal.streams.by_slot.values()):
        journal.streams.release(stream)
    for _ in range(2):  # its records go, then the one of its end
        journal.streams.give_back_empty()
    assert journal.streams.index.ledger.live_bytes() == 0


def test_end_of_a_series_counts_when_its_name_was_used_again(journal: SmallJournal) -> None:
    _, writer = journal.open()
    index = journal.streams.index
    for step in (1, 2):
        put(writer, abi.KIND_PAGE, bytes(8192), step=step, end=1, region=1)
        put(writer, abi.KIND_CHECKPOINT, Marker({"a": RegionMark(1, 1, 4096, 0)}, 0).pack(), step=step)
        assert newest(journal).step == step
        assert index.finish(KEY, now=0.0)
        assert journal.cleaner.write_finish(KEY)
        index.settle(time.monotonic() + 2 * config.FINISH_GRACE_S)
    (end,) = [held for segment in range(32) for held in index.ledger.live(segment)]
    assert end.record.sequence == 1, "the second one"


def put(writer: StreamWriter, kind: int, payload: bytes, *, step: int = 1, start: int = 0, end: int = 0, region: int = 0) -> None:
    writer.append(Entry(kind, KEY, 1, start, end, step=step, region=region), payload)


def test_adoption_says_nothing_of_markers_that_were_superseded(journal: SmallJournal) -> None:
    """The pages of the first step are gone with their segment; its marker lies beside what is wanted."""
    _, writer = journal.open()
    for step, state in ((1, bytes(journal.pool.segment_bytes - (4 << 12))), (2, b"")):  # the first fills a segment
        put(writer, abi.KIND_PAGE, bytes(8192), step=step, end=1, region=1)
        put(writer, abi.KIND_STATE, state, step=step, end=len(state))
        put(writer, abi.KIND_CHECKPOINT, Marker({"a": RegionMark(1, 1, 4096, 0)}, len(state)).pack().ljust(9000), step=step)
    assert newest(journal).step == 2
    assert journal.streams.give_back_empty() == 1
    journal.adopted()
    assert newest(journal).step == 2
    assert list(journal.streams.index.events) == []


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"no json", "cannot be read"),
        (b"[]", "cannot be read"),
        (b'{"regions": {"a": {"region": 0, "pages": 1, "page_bytes": 4096}}, "state_bytes": 0}', "cannot be read"),
        (b'{"regions": {}, "state_bytes": -1}', "cannot be read"),
        (Marker({"a": RegionMark(1, 1, 4096 + 64, 0)}, 4).pack(), "no multiple of 4096"),
        (Marker({"a": RegionMark(1, 2, 4096, 0)}, 0).pack(), "counts 2 pages of a, the journal has 1"),
        (Marker({"a": RegionMark(1, 1, 4096, 0)}, 9).pack(), "counts 9 bytes of state, the journal has 4"),
    ],
)
def test_marker_counts_for_nothing_when_it_is_not_what_is_there(journal: SmallJournal, payload: bytes, words: str) -> None:
    _, writer = journal.open()
    put(writer, abi.KIND_PAGE, bytes(8192), end=1, region=1)
    put(writer, abi.KIND_STATE, b"four", end=4)
    put(writer, abi.KIND_CHECKPOINT, payload)
    assert newest(journal).incarnation == 0
    (event,) = [event for _, event in journal.streams.index.events if event["event"] == "malformed"]
    assert words in event["reason"]
    put(writer, abi.KIND_CHECKPOINT, Marker({"a": RegionMark(1, 1, 4096, 0)}, 4).pack())
    assert newest(journal).step == 1


def test_index_equals_a_model_when_lives_steps_and_owners_end_at_random(journal: SmallJournal) -> None:
    """Pages, states and markers at random; writers that die anywhere; rounds with a cleaner; owners that adopt."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    count = 12
    want: tuple[int, dict[int, bytes], bytes] = (0, {}, b"")
    incarnation, step, pages, refused = 1, 1, dict[int, bytes](), 0
    stream, writer = journal.open()

    def put_pages(numbers: list[int]) -> None:
        found = {number: rng.randbytes(4096) for number in numbers}
        leaf = np.array(numbers, "<u4").tobytes().ljust(4096, b"\0")
        writer.append(Entry(abi.KIND_PAGE, KEY, incarnation, 0, len(numbers), step=step, region=3), leaf + b"".join(found.values()))
        pages.update(found)

    def mark() -> RegionMark:
        return RegionMark(3, count, 4096, table_digest(leaf_digests(b"".join(pages[page] for page in sorted(pages)))))

    def make_room() -> None:
        """Rounds of the owner until the new stream has a segment; a journal that lets go of too little never gets there."""
        for _ in range(50):
            if stream.control.lent_count:
                return
            journal.round()

    for _ in range(600):
        action = rng.randrange(100)
        if action < 50:
            put_pages(rng.sample(range(count), rng.randrange(1, 4)))
        elif action < 85:
            state = rng.randbytes(rng.randrange(0, 300))
            for at in range(0, len(state), 128):
                part = state[at : at + 128]
                writer.append(Entry(abi.KIND_STATE, KEY, incarnation, at, at + len(part), step=step), part)
            if rng.random() < 0.7:
                writer.append(Entry(abi.KIND_CHECKPOINT, KEY, incarnation, step=step), Marker({"a": mark()}, len(state)).pack())
                refused += len(pages) < count
                want = (step, dict(pages), state) if len(pages) == count else want
            step += 1
        elif action < 92:
            journal.streams.scan_all()
            journal.streams.release(stream)
            incarnation, pages = incarnation + rng.randrange(1, 3), {}
            stream, writer = journal.open()
            make_room()
            if rng.random() < 0.8:
                put_pages(list(range(count)))
        elif action < 94:
            journal.streams.scan_all()
            journal.streams.release(stream)
            journal.adopted()
            for dead in list(journal.streams.by_slot.values()):  # as an owner does once it sees that their writers are gone
                journal.streams.release(dead)
            incarnation, pages = incarnation + 1, {}
            stream, writer = journal.open()
            make_room()
        journal.round()
        checkpoint = newest(journal)
        assert checkpoint.step == want[0]
        if checkpoint.incarnation:
            found, state = read_checkpoint(checkpoint, journal.pool.view)
            assert {i: row.tobytes() for i, row in enumerate(found["a"].data)} == want[1]
            assert state == want[2]
    assert want[0] > 0
    assert refused < 200
    assert journal.streams.index.ledger.live_bytes() < 500_000, "what no checkpoint needs is let go of"
