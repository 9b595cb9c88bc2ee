"""Several ranks write one journal at once, one process each; shared by the tests that need GPUs and those that do not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from child import end, kill, start

from concordia.journal.client import JournalClient
from concordia.journal.inspection import verify
from concordia.journal.owner import spawn_owner

LAYOUT = 9


def check_ranks(journal: Path, devices: Sequence[str], *, count: int) -> None:
    """Each of these devices appends `count` records of one request as a rank of its own."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    world = len(devices)
    spawn_owner(journal, size_bytes=256 << 20, segment_bytes=1 << 20, linger_s=60.0)
    with JournalClient.connect(journal) as client:
        try:
            arguments = {"journal": str(journal), "world": world, "count": count, "seed": seed}
            children = [start("scenarios_kv:rank", device=device, rank=rank, **arguments) for rank, device in enumerate(devices)]
            try:
                for child in children:
                    ended = end(child)
                    assert ended.code == 0, ended.said
                    assert ended.answer == {"refused": 0}
            finally:
                for child in children:
                    if child.poll() is None:
                        kill(child)
            assert client.committed(77) == count
            cut = client.cut(77, tokens_known=count + 1, layout_hash=LAYOUT, world=world)
            assert cut.tokens == count
            pool, _ = client.map()
            places = {rank: [piece.pool_offset // pool.segment_bytes for piece in found] for rank, found in cut.pieces.items()}
            assert [len(found) for found in places.values()] == [count] * world
            shared = [set(places[0]) & set(places[rank]) for rank in range(1, world)]
            assert not any(shared), "two ranks wrote into one segment"
            report = verify(journal)
            assert (report.exit_code, report.torn) == (0, [])
            assert report.records >= world * count
        finally:
            client.shutdown()
