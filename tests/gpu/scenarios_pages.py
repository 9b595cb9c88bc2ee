"""Scenarios of page regions: a process that saves until it is killed, and the one that comes after it."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import numpy as np
from stage import STREAM, JournalFile, first_difference

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.cut import CutWriter
from concordia.checkpoint.region import PageRegion
from concordia.device.driver import Device, open_device
from concordia.journal.checkpoints import Checkpoint, CheckpointTable, series_key
from concordia.journal.ledger import Held, Ledger, Source
from concordia.recovery.pages import restore_checkpoint

KEY = 77
SEGMENT = 1 << 20
SIZES = {"weights": (320, 4096), "moments": (20, 16384)}  # pages, bytes of one


def page_of(name: str, page: int, step: int) -> bytes:
    """A page changes every third step."""
    count, size = SIZES[name]
    written = max(0, step - (step + page) % 3)
    return np.random.default_rng([count, page, written]).bytes(size)


def content(name: str, step: int) -> bytes:
    return b"".join(page_of(name, page, step) for page in range(SIZES[name][0]))


def registered(checkpointer: Checkpointer) -> dict[str, PageRegion]:
    device: Device = checkpointer.device
    return {
        name: checkpointer.register_pages(device.allocate(count * size), size=count * size, page_bytes=size, layout_hash=5)
        for name, (count, size) in SIZES.items()
    }


def saver(device: str, path: str, lanes: int) -> None:
    """Saves step after step until it is killed, and says which were acknowledged."""
    journal = JournalFile.create(pathlib.Path(path), segments=60, segment_bytes=SEGMENT)
    checkpointer = Checkpointer(open_device(device), journal.target(), lanes=lanes)
    regions = registered(checkpointer)
    for name, region in regions.items():
        checkpointer.device.write(region.address, content(name, 0))
    writer = CutWriter(checkpointer, regions, key=KEY, incarnation=1)
    for step in range(1, 40):
        for name, region in regions.items():
            for page in range(region.page_count):
                if (step + page) % 3 == 0:
                    checkpointer.device.write(region.address + page * region.page_bytes, page_of(name, page, step))
        writer.begin(step, step.to_bytes(4, "little"))
        print(f"ACK {writer.commit().step}", flush=True)
    while True:  # the journal is nearly full: wait to be killed
        time.sleep(0.01)


def newest(journal: JournalFile) -> tuple[Checkpoint, str]:
    """By the index, over what a dead writer left in the file."""
    records, end = journal.records()
    table = CheckpointTable(Ledger(SEGMENT))
    source = Source(STREAM, abi.WRITER_RANK, 0, 1, 0, 0, is_final=True)
    for record in records:
        table.ingest(Held(record, source), journal.pool.view)
    return table.newest(KEY), end.value


def successor(device: str, path: str, lanes: int) -> dict[str, Any]:
    """Restores into fresh memory, scans it, changes one page, scans again."""
    journal = JournalFile.open(pathlib.Path(path), segment_bytes=SEGMENT)
    checkpoint, end = newest(journal)
    checkpointer = Checkpointer(open_device(device), None, lanes=lanes)
    regions = registered(checkpointer)
    started = time.monotonic()
    state = restore_checkpoint(checkpointer, regions, checkpoint, journal.pool.view)
    spent_s = time.monotonic() - started
    wrong = []
    for name, region in regions.items():
        difference = first_difference(content(name, checkpoint.step), checkpointer.device.read(region.address, region.size))
        if difference:
            wrong.append(f"{name}: {difference}")
    checkpointer.close()
    return {"step": checkpoint.step, "state": int.from_bytes(state, "little"), "end": end, "wrong": wrong, "restore_s": spent_s}


def behind(device: str, path: str) -> dict[str, Any]:
    """Checkpoints in a stream of torch: each holds what its step wrote, which comes late, and nothing of the next."""
    import torch

    from concordia.integrations.torch_pages import TorchPages
    from concordia.journal.client import JournalClient
    from concordia.recovery.pages import read_checkpoint

    weight = torch.zeros(1 << 21, device=device)  # large enough for a burst
    journal = pathlib.Path(path)
    stream = torch.cuda.Stream()
    wrong, staged_s = [], []
    with TorchPages.open({"weight": weight}, name="behind", journal=journal, journal_bytes=128 << 20) as pages, JournalClient.connect(journal) as client:
        pool, _ = client.map()
        with torch.cuda.stream(stream):
            for step in range(1, 11):
                torch.cuda._sleep(20_000_000)  # some 10 ms of work before the step writes
                weight.fill_(step)
                started = time.monotonic()
                pages.stage(step)
                staged_s.append(time.monotonic() - started)
                weight.fill_(-step)  # the next step, at once
                pages.commit()
                found, _ = read_checkpoint(client.checkpoint(series_key("behind")), pool.view)
                values = np.unique(found["weight"].data.view("<f4"))
                if values.tolist() != [step]:
                    wrong.append([step, values.tolist()[:4]])
        changed = pages.save(11).pages
    with JournalClient.connect(journal) as client:
        client.shutdown()
    return {"wrong": wrong, "stage_ms_median": float(np.median(staged_s) * 1e3), "pages": changed}
