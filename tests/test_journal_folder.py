"""journal/folder.py, place.py: where a journal and its pool lie, and who may be there.

Invariants: wrong permissions, links, sizes and places are refused with the cure, and what is there is left as it is; a size that nobody named is
chosen whole; a pool lies where its maker says, on a device too, and goes with its journal.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from concordia import abi, config
from concordia.errors import JournalRefused
from concordia.journal import folder, segment
from concordia.journal.client import JournalClient
from concordia.journal.folder import Folder, fit_size, free_bytes
from concordia.journal.inspection import inspect, verify
from concordia.journal.owner import spawn_owner
from concordia.journal.place import Place
from concordia.journal.writer import Entry
from journal_ground import SEGMENT, SIZE, await_true, open_rank, start

pytest_plugins = ["journal_fixtures"]


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o707])
def test_journal_is_refused_when_others_may_touch_it(journal: Path, mode: int) -> None:
    journal.mkdir(mode=0o700)
    journal.chmod(mode)
    with pytest.raises(JournalRefused, match="mode"):
        start(journal)
    with pytest.raises(JournalRefused, match="mode"):
        JournalClient.connect(journal)
    with pytest.raises(JournalRefused, match="mode"):
        inspect(journal)
    assert list(journal.iterdir()) == []


def test_journal_is_refused_when_a_file_in_it_became_readable_to_others(journal: Path) -> None:
    start(journal)
    for name in ("pool", "board"):
        (journal / name).chmod(0o640)
        with pytest.raises(JournalRefused, match="0640"):
            segment.attach(Folder(journal))
        (journal / name).chmod(0o600)


def test_journal_is_refused_when_it_is_a_link_or_belongs_to_another(
    journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(JournalRefused, match="symbolic"):
        start(link)
    Folder(journal).make()
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(JournalRefused, match="belongs"):
        Folder(journal).check()


def test_journal_is_refused_with_the_cure_when_it_does_not_fit(journal: Path) -> None:
    with pytest.raises(JournalRefused, match="--journal-size"):
        start(journal, size=SEGMENT)
    assert not (journal / "pool").exists()
    with pytest.raises(JournalRefused, match="multiple of 4096"):
        spawn_owner(journal, size_bytes=SIZE, segment_bytes=SEGMENT + 1)
    assert fit_size(journal, 1 << 60, SEGMENT) <= free_bytes(journal) // 2 + SEGMENT
    assert fit_size(journal, None, SEGMENT) <= config.JOURNAL_BYTES_DEFAULT


def test_size_is_whole_segments_of_its_own_choice_when_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(2000):
        free, wanted = int(2 ** rng.uniform(24, 42)), int(2 ** rng.uniform(23, 40))
        monkeypatch.setattr(folder, "free_bytes", lambda _, free=free: free)
        room = min(wanted, free // 2)
        size = fit_size(tmp_path, wanted, None)
        segment_bytes = folder.choose_segment_bytes(size)
        assert segment_bytes == folder.choose_segment_bytes(room), (free, wanted)
        assert size % segment_bytes == 0, (free, wanted)
        assert room - segment_bytes < size <= room, (free, wanted)


def test_pool_lies_elsewhere_and_is_removed_when_another_place_is_named(journal: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    spawn_owner(journal, size_bytes=SIZE, segment_bytes=SEGMENT, linger_s=60.0, place=Place(place))
    assert place.stat().st_size == SIZE
    assert place.stat().st_mode & 0o777 == 0o600
    with JournalClient.connect(journal) as client:
        _, writer = open_rank(client)
        writer.append(Entry(abi.KIND_KV_TAIL, 1, 1, 0, 1), b"token")
        assert client.committed(1) == 1
        assert verify(journal).records == 1
        client.shutdown()
    await_true(lambda: not journal.exists() and not place.exists(), "both are removed")


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_file_that_is_there_is_left_as_it_is_when_a_pool_shall_lie_there(journal: Path, tmp_path: Path, mode: int) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"precious" * (SIZE // 8))
    theirs.chmod(mode)
    with pytest.raises(JournalRefused, match="theirs is there already, and is left as it is"):
        spawn_owner(journal, size_bytes=SIZE, segment_bytes=SEGMENT, linger_s=60.0, place=Place(theirs))
    assert theirs.read_bytes() == b"precious" * (SIZE // 8)
    with pytest.raises(JournalRefused, match="cannot allocate"):  # put there a moment after it was looked for
        segment.Pool.create(tmp_path / "pool", size=SIZE, segment_bytes=SEGMENT, at=theirs)
    Folder(tmp_path).clear()
    (tmp_path / "pool").symlink_to(theirs)  # in the place of one that an owner made
    Folder(tmp_path).clear()
    assert theirs.exists() == (mode == 0o644)


def test_pool_is_refused_in_one_line_when_it_cannot_lie_there(journal: Path, tmp_path: Path) -> None:
    for wrong, words in (
        (Path("/dev/null"), "no devdax device"),
        (tmp_path, "is there already"),
        (tmp_path / "none" / "pool", "there is no folder"),
    ):
        with pytest.raises(JournalRefused, match=words):
            spawn_owner(journal, size_bytes=SIZE, segment_bytes=SEGMENT, place=Place(wrong))
        assert not (journal / "pool").is_symlink()
    with pytest.raises(JournalRefused, match="cannot map"):  # a device that mmap does not take
        segment.Pool.create(tmp_path / "pool", size=SIZE, segment_bytes=SEGMENT, at=Path("/dev/null"))


def test_journal_and_pool_lie_where_their_maker_says_when_their_names_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spawn_owner(Path("journal"), size_bytes=SIZE, segment_bytes=SEGMENT, linger_s=60.0, place=Place(Path("records")))
    with JournalClient.connect(Path("journal")) as client:
        assert (tmp_path / "records").stat().st_size == SIZE
        client.shutdown()
    await_true(lambda: not (tmp_path / "journal").exists() and not (tmp_path / "records").exists(), "both are removed")


def test_pool_on_a_device_is_mapped_when_mmap_takes_it(tmp_path: Path) -> None:
    device = Path("/dev/zero")  # a character device, as devdax is
    pool = segment.Pool.create(tmp_path / "pool", size=4 * SEGMENT, segment_bytes=SEGMENT, at=device)
    pool.view[5 * 1000] = 7
    assert (pool.segment_count, pool.view[5 * 1000], pool.is_marked_free(3)) == (4, 7, True)
    pool.close()
