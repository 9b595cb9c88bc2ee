"""Invariants: a journal's pages lie where it was promised, or it is refused with the reason, by its owner and by a writer that has
registered it; a wish for nodes shares the segments out, and writers get the near ones; on one node nothing happens, and that is said;
memory that is there for the journal alone may be taken whole."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.device import numa
from concordia.errors import EnvironmentRefused, JournalRefused
from concordia.journal import place as place_room
from concordia.journal.client import JournalClient
from concordia.journal.folder import fit_size
from concordia.journal.owner import spawn_owner
from concordia.journal.place import Place
from concordia.journal.segment import Pool
from concordia.testing.journal import SmallJournal

SEGMENT = 1 << 20
SIZE = 8 * SEGMENT


@pytest.fixture
def journal() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder) / "journal"


def tree(root: Path, **files: str) -> Path:
    """A piece of sysfs."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_nodes_are_read_as_the_kernel_names_them(tmp_path: Path) -> None:
    tree(tmp_path, devices__system__node__has_memory="0-1,4")
    (tmp_path / "bus/pci/devices/0000:1b:00.0").mkdir(parents=True)
    (tmp_path / "bus/pci/devices/0000:1b:00.0/numa_node").write_text("1\n")
    (tmp_path / "bus/pci/devices/0001:00:00.0").mkdir(parents=True)
    (tmp_path / "bus/pci/devices/0001:00:00.0/numa_node").write_text("-1\n")
    assert numa.find_nodes(tmp_path) == (0, 1, 4)
    assert numa.find_nodes(tmp_path / "nowhere") == ()
    assert numa.find_pci_node("00000000:1B:00.0", tmp_path) == 1
    assert numa.find_pci_node("0:1b:00.0", tmp_path) == 1
    assert numa.find_pci_node("00000001:00:00.0", tmp_path) is None, "-1: the firmware does not say"
    assert numa.find_pci_node("[N/A]", tmp_path) is None
    device = tmp_path / "dev/char/1:5"  # of /dev/zero, which stands in for a devdax device
    tree(device, target_node="2", numa_node="0", size=str(SIZE))
    assert numa.find_device_node(Path("/dev/zero"), tmp_path) == 2
    assert numa.device_bytes(Path("/dev/zero"), tmp_path) == SIZE
    (device / "target_node").unlink()
    assert numa.find_device_node(Path("/dev/zero"), tmp_path) == 0
    assert numa.find_device_node(tmp_path / "dev", tmp_path) is None


def test_pages_are_found_where_they_lie(tmp_path: Path) -> None:
    pool = Pool.create(Path("/dev/shm") / f"{tmp_path.name}.pool", size=SIZE, segment_bytes=SEGMENT)
    try:
        here = numa.find_page_nodes([pool.mapping.address])[0]
        assert here in numa.find_nodes()
        numa.check_node(pool.mapping.address, SIZE, here)
        with pytest.raises(EnvironmentRefused, match=f"2048 of 2048 sampled pages .* node {here + 1} .*2048 on node {here}"):
            numa.check_node(pool.mapping.address, SIZE, here + 1)
    finally:
        pool.close()
        (Path("/dev/shm") / f"{tmp_path.name}.pool").unlink()


def test_journal_is_refused_when_its_pages_moved_as_a_writer_registered_them(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = journal.parent / "device"  # a file stands in for it
    spawn_owner(journal, size_bytes=SIZE, segment_bytes=SEGMENT, linger_s=60.0, place=Place(device, node=0))
    with JournalClient.connect(journal) as client:
        try:
            opened = client.open_stream(writer_kind=abi.WRITER_RANK, rank=0, world=1, replica=1, layout_hash=1, label="rank", node=0)
            assert opened.target.node == 0, "a writer knows what was promised"
            Checkpointer.open("host", opened.target).close()
            lying = numa.find_page_nodes
            monkeypatch.setattr(numa, "find_page_nodes", lambda places: [1, *lying(places)[1:]])
            with pytest.raises(EnvironmentRefused, match=r"1 of 2048 sampled pages .*1 on node 1.*moved when they were registered"):
                Checkpointer.open("host", opened.target)
            Checkpointer.open("host", replace(opened.target, node=None)).close()
            monkeypatch.setattr(numa, "find_page_nodes", lambda places: [-errno.ENOENT for _ in places])
            Checkpointer.open("host", opened.target).close()  # a devdax device's own pages never move
        finally:
            client.shutdown()


def test_journal_is_refused_when_its_node_has_no_memory(journal: Path) -> None:
    with pytest.raises(JournalRefused, match="no memory on node 63"):
        spawn_owner(journal, size_bytes=SIZE, segment_bytes=SEGMENT, place=Place(node=63))
    assert not (journal / "pool").exists()


def test_segments_are_shared_out_to_the_nodes_when_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    wished: list[tuple[int, int, int, bool]] = []

    def wish(address: int, size: int, node: int, *, is_bound: bool) -> bool:
        wished.append((address, size, node, is_bound))
        return node != 9

    monkeypatch.setattr(numa, "place", wish)
    near = Place(near=(0, 1))
    monkeypatch.setattr(numa, "find_nodes", lambda: (0,))
    assert near.put(0, 9 * SEGMENT, unit=SEGMENT) == "this machine has one memory node"
    assert wished == []
    monkeypatch.setattr(numa, "find_nodes", lambda: (0, 1, 9))
    assert "(0, 1)" in near.put(0, 9 * SEGMENT, unit=SEGMENT)
    assert wished == [(0, 5 * SEGMENT, 0, False), (5 * SEGMENT, 4 * SEGMENT, 1, False)]
    assert "CAP_SYS_NICE" in Place(near=(9,)).put(0, SIZE, unit=SEGMENT), "a wish may be refused"
    with pytest.raises(EnvironmentRefused, match="CAP_SYS_NICE"):
        Place(node=9).put(0, SIZE, unit=SEGMENT)


def test_writer_is_lent_near_segments_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "find_nodes", lambda pool: [segment % 2 for segment in range(pool.segment_count)])
    with SmallJournal(tmp_path / "journal", segments=16) as journal:
        identity = journal.open()[0].identity
        opened = [journal.streams.open(identity._replace(rank=rank), "rank", node=node) for rank, node in ((1, 1), (2, 0), (3, None))]
        assert all(segment % 2 == 1 for segment in opened[0].segments.values())
        assert next(iter(opened[1].segments.values())) % 2 == 0
        assert all(stream.control.lent_count > 0 for stream in opened), "far ones are better than none"


def test_memory_set_aside_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Place().own_bytes() is None
    assert Place(tmp_path / "pool").own_bytes() is None
    monkeypatch.setattr(numa, "device_bytes", lambda _: SIZE)
    assert Place(Path("/dev/zero")).own_bytes() == SIZE
    monkeypatch.setattr(place_room, "_file_system", lambda folder: "hugetlbfs" if folder == tmp_path else "")
    page = os.statvfs(tmp_path).f_bsize
    monkeypatch.setattr(place_room, "_HUGE_PAGES", tree(tmp_path / "huge", **{f"hugepages-{page >> 10}kB__free_hugepages": "7"}))
    assert Place(tmp_path / "pool").own_bytes() == 7 * page
    assert fit_size(tmp_path, SIZE, SEGMENT, own_bytes=SIZE) == SIZE
    with pytest.raises(JournalRefused, match="at least"):
        fit_size(tmp_path, SIZE, SEGMENT, own_bytes=SIZE - 1)
