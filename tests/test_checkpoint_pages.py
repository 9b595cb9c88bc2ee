"""Page regions there and back: checkpoint/cut.py, journal/checkpoints.py, recovery/pages.py.

Invariants: what comes back is the newest complete checkpoint, all of its regions and state of one step and one life, whatever was appended
behind it; a page that is written during a scan is in the journal with the hash of what was taken, and is found again; one flipped bit
anywhere is found before a region is touched; records below the newest marker stay wanted until the next one.
"""

from __future__ import annotations

import importlib
import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.cut import CutWriter, joined
from concordia.device.host import HostDevice
from concordia.device.memory import Buffer, JournalTarget
from concordia.errors import Corruption, JournalFull, LayoutMismatch, RecoveryError, UsageError
from concordia.journal.coverage import Piece
from concordia.journal.replay import ReplayIndex
from concordia.journal.survey import survey
from concordia.recovery.pages import read_checkpoint, restore_checkpoint
from concordia.runtime.ring import Task
from concordia.testing.journal import SmallJournal
from scratch_stream import ScratchStream
from trainer import KEY, SIZES, Trainer, found_in, newest, owned


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SmallJournal]:
    with SmallJournal(tmp_path / "journal", segments=32, segment_bytes=1 << 17) as small:
        yield small


def test_newest_step_comes_back_when_every_step_changed_some_pages(device: HostDevice, journal: SmallJournal) -> None:
    trainer = Trainer(device, journal, incarnation=1)
    pages = []
    for step in range(1, 6):
        trainer.step(step, share=0.2)
        pages.append(trainer.save(step, bytes([step]) * step))
        assert found_in(journal) == (step, trainer.content(), bytes([step]) * step)
    assert pages[0] == 30
    assert min(pages) > 0
    assert sum(count < 30 for count in pages[1:]) >= 3
    trainer.die()
    assert newest(journal).is_final


def test_checkpoint_is_whole_when_its_answers_are_no_longer_kept(device: HostDevice, journal: SmallJournal) -> None:
    trainer = Trainer(device, journal, incarnation=1)
    trainer.step(1, share=1.0)
    with owned(journal):
        trainer.writer.begin(1, b"state")
        trainer.checkpointer.runtime.drain()
        for _ in range(config.RING_SLOTS * config.COMPLETION_LAPS // 1024 + 1):
            trainer.checkpointer.wait(trainer.checkpointer.submit_many([Task()] * 1024)[-1])
        trainer.writer.commit()
    assert found_in(journal) == (1, trainer.content(), b"state")
    trainer.die()


def test_step_without_a_marker_changes_nothing(device: HostDevice, journal: SmallJournal) -> None:
    """Dead between two scans, between scan and state, between state and marker: always the step before."""
    trainer = Trainer(device, journal, incarnation=1)
    trainer.step(1, share=1.0)
    trainer.save(1, b"one")
    kept = trainer.content()
    trainer.step(2)
    trainer.writer._step = 2
    trainer.checkpointer.wait(trainer.writer.scan("weights"))
    assert found_in(journal) == (1, kept, b"one")
    trainer.writer.begin(3, b"two")
    trainer.checkpointer.runtime.drain()
    trainer.die()
    assert found_in(journal) == (1, kept, b"one")


def test_life_that_follows_begins_with_all_pages_and_an_older_one_counts_no_more(device: HostDevice, journal: SmallJournal) -> None:
    first = Trainer(device, journal, incarnation=1)
    first.step(1)
    first.save(4, b"first")
    kept = first.content()
    first.die()
    second = Trainer(device, journal, incarnation=2)
    checkpoint = newest(journal)
    assert restore_checkpoint(second.checkpointer, second.regions, checkpoint, journal.pool.view) == b"first"
    assert second.content() == kept
    scans = [second.checkpointer.wait(second.checkpointer.scan_pages(region)).result for region in second.regions.values()]
    assert scans == [0, 0]
    second.step(2)
    second.writer.begin(5)
    second.checkpointer.runtime.drain()
    assert found_in(journal)[0] == 4, "a life counts from its first marker on"
    assert second.writer.commit().pages == 30
    assert found_in(journal) == (5, second.content(), b"")
    zombie = Trainer(device, journal, incarnation=1)
    zombie.save(9)
    assert found_in(journal)[0] == 5
    assert journal.streams.index.ledger.live_bytes() < 400_000


@pytest.mark.parametrize("page_bytes", [4096, 16384])
def test_region_is_clean_when_it_was_restored(shape: tuple[HostDevice, int], tmp_path: Path, page_bytes: int) -> None:
    with SmallJournal(tmp_path / "journal", segments=32, segment_bytes=1 << 17) as journal:
        trainer = Trainer(shape[0], journal, incarnation=1, lanes=shape[1])
        trainer.step(3, share=1.0)
        trainer.save(1, random.Random(1).randbytes(700_00))
        kept = trainer.content()
        trainer.step(4)
        restore_checkpoint(trainer.checkpointer, trainer.regions, newest(journal), journal.pool.view)
        assert trainer.content() == kept
        name = "weights" if page_bytes == 4096 else "moments"
        trainer.buffers[name].view[page_bytes * 2 + 5] ^= 1
        done = trainer.checkpointer.wait(trainer.checkpointer.scan_pages(trainer.regions[name]))
        assert done.result == 1
        trainer.checkpointer.close()


def test_flipped_bit_is_found_before_a_region_is_touched(device: HostDevice, journal: SmallJournal) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    trainer = Trainer(device, journal, incarnation=1)
    trainer.step(1, share=1.0)
    trainer.save(1, b"s" * 5000)
    checkpoint = newest(journal)
    trainer.step(2, share=1.0)
    before = trainer.content()
    for _ in range(10):
        piece = rng.choice(checkpoint.pieces[0])
        at, bit = piece.pool_offset + rng.randrange(piece.payload_bytes), 1 << rng.randrange(8)
        journal.pool.view[at] ^= bit
        with pytest.raises(Corruption, match=f"record {piece.sequence} .* committed"):
            restore_checkpoint(trainer.checkpointer, trainer.regions, checkpoint, journal.pool.view)
        journal.pool.view[at] ^= bit
    assert trainer.content() == before
    restore_checkpoint(trainer.checkpointer, trainer.regions, checkpoint, journal.pool.view)


def test_checkpoint_is_refused_when_it_does_not_fit(device: HostDevice, journal: SmallJournal) -> None:
    trainer = Trainer(device, journal, incarnation=1)
    with pytest.raises(RecoveryError, match="no complete checkpoint"):
        restore_checkpoint(trainer.checkpointer, trainer.regions, newest(journal), journal.pool.view)
    trainer.save(1, b"abc")
    checkpoint = newest(journal)
    pool = journal.pool.view
    one = {"weights": trainer.regions["weights"]}
    other = trainer.regions | {"weights": replace(trainer.regions["weights"], layout_hash=8)}
    for regions, words in ((one, "has regions"), (other, "layout 9; here")):
        with pytest.raises(LayoutMismatch, match=words):
            restore_checkpoint(trainer.checkpointer, regions, checkpoint, pool)
    pieces = checkpoint.pieces[0]
    pages = [piece for piece in pieces if piece.kind == abi.KIND_PAGE]
    for wrong, words in (
        ({0: pages}, "bytes of state"),
        ({0: pieces[1:]}, "in no record"),
        ({0: [replace(pieces[0], pool_offset=len(pool)), *pieces[1:]]}, "outside the pool"),
        ({0: [*pieces, replace(pieces[0], region=77)]}, "does not belong"),
        ({0: [replace(pieces[0], token_end=pieces[0].token_end + 1), *pieces[1:]]}, "pages in"),
    ):
        with pytest.raises(Corruption, match=words):
            read_checkpoint(replace(checkpoint, pieces=wrong), pool)
    trainer.buffers["weights"].view[0] ^= 1
    trainer.save(2, b"abc")
    (late,) = [piece for piece in newest(journal).pieces[0] if piece.kind == abi.KIND_PAGE and piece.token_end == 1]
    others = [piece for piece in pieces if piece.region != late.region]
    with pytest.raises(Corruption, match="page 1 of weights is in no record"):
        read_checkpoint(replace(checkpoint, pieces={0: [*[late] * 24, *others]}), pool)
    large = checkpoint.regions | {"weights": replace(checkpoint.regions["weights"], pages=1 << 16)}
    huge = checkpoint.regions | {"weights": replace(checkpoint.regions["weights"], pages=1 << 31, page_bytes=1 << 39)}
    for marks in (large, huge):
        with pytest.raises(Corruption, match=r"some of .* pages of weights"):
            read_checkpoint(replace(checkpoint, regions=marks), pool)


def test_checkpoint_of_mixed_steps_is_refused_when_a_record_went_with_its_owner(device: HostDevice, journal: SmallJournal) -> None:
    """An owner that adopts finds records that the one before had let go of: without the newest, an older one fills its page."""
    trainer = Trainer(device, journal, incarnation=1)
    for step in range(1, 4):
        trainer.buffers["weights"].view[5 * 4096] = step
        trainer.save(step)
    (found,) = survey(journal.pool, journal.board).streams
    pages = [record for record in found.records if record.kind == abi.KIND_PAGE and record.step < 4]
    for lost in (None, pages[-1]):
        index = ReplayIndex(journal.pool.segment_bytes)
        for record in found.records:
            if record is not lost:
                index.ingest(record, found.source, journal.pool.view)
        checkpoint = index.checkpoints.newest(KEY)
        assert checkpoint.step == 3
        if lost is None:
            read_checkpoint(checkpoint, journal.pool.view)
            continue
        with pytest.raises(Corruption, match="some page of weights is not as it was at step 3"):
            read_checkpoint(checkpoint, journal.pool.view)


def test_step_is_refused_when_steps_do_not_grow(device: HostDevice, journal: SmallJournal) -> None:
    trainer = Trainer(device, journal, incarnation=1)
    trainer.save(2)
    for step in (2, 1):
        with pytest.raises(UsageError, match="steps must grow"):
            trainer.writer.begin(step)
    with pytest.raises(UsageError, match="no checkpoint was begun"):
        trainer.writer.commit()
    with pytest.raises(UsageError, match="make the rest a region"):
        trainer.writer.begin(3, bytes((64 << 20) + 1))


def test_checkpoint_before_counts_when_the_journal_is_full(device: HostDevice, tmp_path: Path) -> None:
    with SmallJournal(tmp_path / "journal", segments=8, segment_bytes=1 << 17) as journal:
        trainer = Trainer(device, journal, incarnation=1)
        trainer.save(1, b"kept")
        kept = trainer.content()
        # nobody lends from now on: one of these finds no room
        want, said = (1, kept, b"kept"), ""
        for step in range(2, 12):
            trainer.step(step, share=1.0)
            trainer.writer.begin(step, b"more")
            try:
                trainer.writer.commit(timeout_s=0.1)
            except JournalFull as error:
                said = str(error)
                break
            want = step, trainer.content(), b"more"
        assert "has no room left" in said
        assert found_in(journal) == want


def test_commit_goes_on_when_the_owner_lends_more(device: HostDevice, journal: SmallJournal) -> None:
    """More than one segment of dirty pages: the scan stops at the end of what is lent, and goes on."""
    trainer = Trainer(device, journal, incarnation=1)
    trainer.step(1, share=1.0)
    with owned(journal):
        trainer.writer.begin(1, bytes(300_00))
        assert trainer.writer.commit().pages == 30
    assert found_in(journal) == (1, trainer.content(), bytes(300_00))


def test_state_comes_back_when_it_is_larger_than_the_ring_s_arena(device: HostDevice, tmp_path: Path) -> None:
    state = np.random.default_rng(1).bytes(config.RING_ARENA_BYTES * 5 // 4)
    with SmallJournal(tmp_path / "journal", segments=48, segment_bytes=1 << 20) as journal:
        trainer = Trainer(device, journal, incarnation=1)
        with owned(journal):
            trainer.writer.begin(1, state)
            trainer.writer.commit()
        assert found_in(journal)[2] == state
        trainer.checkpointer.close()


def test_checkpoints_survive_the_cleaner_and_another_owner(device: HostDevice, journal: SmallJournal) -> None:
    """Many steps through a small journal: old pages are copied, segments reused, and an owner that adopts finds the same."""
    trainer = Trainer(device, journal, incarnation=1)
    trainer.step(0, share=1.0)
    for step in range(1, 200):
        trainer.step(step, share=0.1)
        trainer.save(step, step.to_bytes(4, "little"))
    assert journal.cleaner.copied_count > 0
    want = (199, trainer.content(), (199).to_bytes(4, "little"))
    assert found_in(journal) == want
    trainer.step(300)
    trainer.writer.begin(300, b"half")
    trainer.checkpointer.runtime.drain()
    trainer.die()
    assert found_in(journal) == want
    journal.adopted()
    assert found_in(journal) == want
    assert newest(journal).is_final


def test_journal_of_four_times_the_pages_is_enough_when_steps_change_random_pages(device: HostDevice, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    with SmallJournal(tmp_path / "journal", segments=64, segment_bytes=1 << 16) as journal:
        stream, _ = journal.open(layout_hash=0)
        buffer = Buffer(1 << 20)  # 256 pages
        pool = journal.pool
        target = JournalTarget(pool.mapping.address, pool.mapping.size, pool.segment_bytes, stream.control.address)
        with owned(journal), Checkpointer(device, target) as checkpointer:
            region = checkpointer.register_pages(buffer.address, size=buffer.size, page_bytes=4096)
            writer = CutWriter(checkpointer, {"a": region}, key=KEY, incarnation=1)
            appended = []
            for step in range(1, 301):
                for page in rng.choice(256, 4, replace=False):
                    buffer.view[4096 * int(page) + 9] = step % 251
                writer.begin(step)
                appended.append(writer.commit(timeout_s=5).pages)
        assert appended.count(256) > 1, "old records let go of by new ones of all pages"
        assert sum(appended) < 3 * 4 * 300, "and not more often than it pays"
        assert found_in(journal) == (300, {"a": bytes(buffer.view)}, b"")


def test_pages_are_appended_again_before_an_answer_about_them_is_too_long(
    device: HostDevice, journal: SmallJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(device, journal, incarnation=1)
    monkeypatch.setattr(config, "CHECKPOINT_RECORDS_MAX", 8)
    appended = []
    for step in range(1, 9):
        trainer.buffers["weights"].view[4096 * step] = 1
        appended.append(trainer.save(step))
    assert appended == [30, 1, 1, 1, 1, 30, 1, 1], "a marker, then a record of pages and a marker each"
    monkeypatch.undo()
    most = Piece(*[(1 << 64) - 1] * 13)
    assert len(json.dumps(asdict(replace(most, payload_hash=(1 << 128) - 1)))) * config.CHECKPOINT_RECORDS_MAX < config.SOCKET_MESSAGE_BYTES_MAX / 2


def test_records_equal_their_hash_when_a_thread_writes_during_the_scan(shape: tuple[HostDevice, int]) -> None:
    pages = 64
    memory = Buffer(pages * 4096)
    data = np.frombuffer(memory.view, np.uint64)
    stream = ScratchStream(segments=60, segment_bytes=1 << 20)
    stop = threading.Event()

    def write() -> None:
        value = 1
        while not stop.is_set():
            data[:] = value  # every word of every page, again and again
            value += 1

    with Checkpointer(shape[0], stream.target, lanes=shape[1]) as checkpointer:
        region = checkpointer.register_pages(memory.address, size=memory.size, page_bytes=4096)
        writer = threading.Thread(target=write)
        writer.start()
        found = []
        deadline = time.monotonic() + 60  # a busy machine lets the writer wait
        while len(found) < 100 or (sum(found) <= pages and time.monotonic() < deadline):
            found.append(checkpointer.wait(checkpointer.scan_pages(region), 60).result)
        stop.set()
        writer.join()
        assert sum(found) > pages, "the writer changed no page between two scans"
        checkpointer.wait(checkpointer.scan_pages(region), 60)
        assert checkpointer.wait(checkpointer.scan_pages(region), 60).result == 0
        latest: dict[int, bytes] = {}
        for record in stream.records():  # checks each payload against its hash
            numbers = np.frombuffer(record.payload, "<u4", int(record.header["token_end"]))
            for i, number in enumerate(numbers):
                latest[int(number)] = record.payload[4096 * (i + 1) : 4096 * (i + 2)]
    assert b"".join(latest[page] for page in range(pages)) == bytes(memory.view)
    stream.close()


def test_newest_step_is_restored_when_its_process_was_killed_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests/gpu does on a GPU, on this device: two processes and SIGKILL."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "gpu"))
    scenario = importlib.import_module("test_gpu_pages")
    monkeypatch.setattr(scenario, "DEVICE", "host")
    for lanes in (1, 4):
        scenario.test_newest_step_is_restored_when_the_writer_is_killed(lanes, tmp_path / "journal")


def test_only_marked_pages_are_read_when_a_step_says_which(device: HostDevice, journal: SmallJournal) -> None:
    trainer = Trainer(device, journal, incarnation=1)

    def save(step: int, marked: dict[str, list[range]] | None) -> int:
        trainer.writer.begin(step, b"", marked)
        journal.round()
        return trainer.writer.commit().pages

    def change(name: str, *pages: int) -> None:
        size = SIZES[name][1]
        for page in pages:
            trainer.buffers[name].view[page * size] ^= 1

    assert save(1, {"weights": [], "moments": []}) == 30, "a life's first has all pages, whatever is marked"
    change("weights", 2, 3, 9, 20)
    change("moments", 5)
    assert save(2, {"weights": [range(2, 4), range(8, 12)]}) == 4, "three that are marked and differ, and all of a region that is not named"
    assert save(3, {"weights": [], "moments": []}) == 0
    assert found_in(journal)[1] != trainer.content(), "the one that was not marked"
    assert save(4, {"weights": [range(24)], "moments": []}) == 1
    assert found_in(journal)[1] == trainer.content()
    trainer.die()


def test_ranges_hold_what_is_marked_and_are_few_when_there_are_many() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(200):
        pages = {rng.randrange(4000) for _ in range(rng.choice([0, 1, 5, 300]))}
        marked = [range(page, page + rng.randint(0, 3)) for page in pages]
        rng.shuffle(marked)
        found = joined(marked)
        wanted = {page for one in marked for page in one}
        covered = {page for one in found for page in one}
        assert wanted <= covered
        assert len(found) <= config.SCAN_RANGES_MAX
        assert all(a.stop < b.start for a, b in itertools.pairwise(found))
        if len(found) < config.SCAN_RANGES_MAX // 2:
            assert wanted == covered, "nothing more is read where there is no need"
