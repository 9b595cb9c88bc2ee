"""A process of training as the journal sees it, for the tests of checkpoints of pages."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.cut import CutWriter
from concordia.checkpoint.region import PageRegion
from concordia.device.host import HostDevice
from concordia.device.memory import Buffer, JournalTarget
from concordia.journal.checkpoints import Checkpoint
from concordia.recovery.pages import read_checkpoint
from concordia.testing.journal import SmallJournal

KEY = (3 << 64) | 8
SIZES = {"weights": (24, 4096), "moments": (6, 16384)}  # pages, bytes of one


class Trainer:
    """A process of training as the journal sees it: weights and moments that a step changes, and one stream."""

    def __init__(self, device: HostDevice, journal: SmallJournal, *, incarnation: int, lanes: int = 1, layout: int = 9) -> None:
        self.journal = journal
        self.stream, _ = journal.open(layout_hash=0)
        self.buffers = {name: Buffer(count * size) for name, (count, size) in SIZES.items()}
        pool = journal.pool
        target = JournalTarget(pool.mapping.address, pool.mapping.size, pool.segment_bytes, self.stream.control.address)
        self.checkpointer = Checkpointer(device, target, lanes=lanes)
        self.regions: dict[str, PageRegion] = {
            name: self.checkpointer.register_pages(self.buffers[name].address, size=count * size, page_bytes=size, layout_hash=layout)
            for name, (count, size) in SIZES.items()
        }
        self.writer = CutWriter(self.checkpointer, self.regions, key=KEY, incarnation=incarnation)

    def step(self, seed: int, *, share: float = 0.3) -> None:
        rng = np.random.default_rng(seed)
        for buffer in self.buffers.values():
            data = np.frombuffer(buffer.view, np.uint8)
            changed = rng.random(data.size // 4096) < share
            for page in np.flatnonzero(changed):
                data[4096 * page : 4096 * (page + 1)] = rng.integers(0, 256, 4096, np.uint8)

    def save(self, step: int, state: bytes = b"") -> int:
        self.writer.begin(step, state)
        self.journal.round()
        return self.writer.commit().pages

    def content(self) -> dict[str, bytes]:
        return {name: bytes(buffer.view) for name, buffer in self.buffers.items()}

    def die(self) -> None:
        """Its stream is sealed where it is."""
        self.checkpointer.close()
        self.journal.streams.release(self.stream)


@contextmanager
def owned(journal: SmallJournal) -> Iterator[None]:
    """An owner that lends as it goes on."""
    stop = threading.Event()

    def own() -> None:
        while not stop.wait(0.005):
            journal.round()

    owner = threading.Thread(target=own)
    owner.start()
    try:
        yield
    finally:
        stop.set()
        owner.join()


def newest(journal: SmallJournal) -> Checkpoint:
    journal.round(clean=False)
    return journal.streams.index.checkpoints.newest(KEY)


def found_in(journal: SmallJournal) -> tuple[int, dict[str, bytes], bytes]:
    checkpoint = newest(journal)
    pages, state = read_checkpoint(checkpoint, journal.pool.view)
    return checkpoint.step, {name: found.data.tobytes() for name, found in pages.items()}, state
