"""The stream of a series of checkpoints, floor 4.

Owns: the wait until nobody else writes it. Promises: a series has one writer; the wait for the end
of the one before is bounded by CHECKPOINT_FENCE_S. Called by integrations, before a CutWriter is
made.
"""

from __future__ import annotations

import time

from concordia import abi, config
from concordia.errors import JournalError
from concordia.journal.client import JournalClient, StreamAttachment


def open_sole(client: JournalClient, name: str) -> StreamAttachment:
    """The stream of this series, once nobody else can add to it; raises JournalError."""
    deadline = time.monotonic() + config.CHECKPOINT_FENCE_S
    while True:
        try:
            return client.open_stream(
                writer_kind=abi.WRITER_RANK, rank=0, world=1, replica=0, layout_hash=0,
                label=name, is_sole=True,
            )  # fmt: skip
        except JournalError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(config.OWNER_POLL_S)
