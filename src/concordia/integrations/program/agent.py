"""The process that commits a program's checkpoints, floor 7.

Owns: one series in the journal, from the posts on a program's board. Promises: a post is answered
once everything of it is committed, so the stage holds one consistent cut as long as it is read;
only marked pages are read, and of them those are appended that differ; whatever fails here ends
protection, with its reason on the board, and never the program, which is another process. Ends with
its standard input: then what is posted is still committed. Started by protection.py.

Why a process of its own: the program may be no Python program, or one of another interpreter; its
interpreter's lock and its GPU context are left alone, and what it posted outlives it.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.cut import CutWriter
from concordia.checkpoint.region import PageRegion
from concordia.checkpoint.series import open_sole
from concordia.device.memory import Mapping
from concordia.errors import ConcordiaError
from concordia.integrations.program.program_pages import (
    MARK_BYTES,
    Board,
    Post,
    Reads,
    map_stage,
)
from concordia.journal.checkpoints import series_key
from concordia.journal.client import JournalClient

logger = logging.getLogger(__name__)

PAGE_BYTES: Final = abi.LEAF_BYTES
REGION: Final = "stage"
_PAGES_A_MARK: Final = MARK_BYTES // PAGE_BYTES
COUNTERS: Final = (
    *("points", "fired", "coalesced", "unjoined", "audits", "missed_pages"),
    *("swallowed", "answered"),
)
FINISH: Final = b"finish\n"  # the program has ended well: nothing is kept
LEAVE: Final = b"leave\n"  # it has ended otherwise; without a word the launcher was killed


class Life:
    """A stream, and the stage as one region of it, of one size."""

    def __init__(
        self, client: JournalClient, series: str, stage: Mapping, *, size: int, newest: int
    ) -> None:
        with ExitStack() as undo:
            stream = open_sole(client, series)
            undo.callback(stream.close)
            self.checkpointer = Checkpointer.open("host", stream.target)
            undo.callback(self.checkpointer.close)
            self.region: PageRegion = self.checkpointer.register_pages(
                stage.address, size=size, page_bytes=PAGE_BYTES
            )
            self.writer = CutWriter(
                self.checkpointer,
                {REGION: self.region},
                key=series_key(series),
                incarnation=max(newest + 1, time.time_ns()),  # later lives have larger numbers
            )
            self._held = undo.pop_all()

    def table(self) -> npt.NDArray[np.uint64]:
        """The hashes of all pages as they were appended last, [page, 2]."""
        size = 16 * self.region.page_count
        table = self.checkpointer.device.read(self.region.page_hashes, size)
        return np.frombuffer(table, np.uint64).reshape(-1, 2)

    def close(self) -> None:
        """What was committed stays."""
        self._held.close()


class Agent:
    """Commits post after post; `serve` until the end."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self._facts = facts
        self.board = Board(folder / "board", facts["stage_bytes"])
        self._stage = map_stage(folder / "stage", facts["stage_bytes"])
        self._reads = Reads(folder / "reads")
        self._report = folder / "report"
        self._client = JournalClient.connect(Path(facts["journal"]))
        _compile(self._stage)
        # asked once: what an answer names stays in the journal for a while
        self._newest = self._client.checkpoint(series_key(facts["series"])).newest
        self._life: Life | None = None
        self.changed: dict[str, int] = {}  # pages of MARK_BYTES by region, in all posts

    def serve(self, stdin: int) -> bool:
        """Until `stdin` ends; then what waits is committed, or the series is finished. False when
        the launcher left no word: it was killed.
        """
        said = b""
        while True:
            ready, _, _ = select.select([stdin], [], [], config.PROGRAM_POLL_S)
            text = os.read(stdin, 4096) if ready else None
            said += text or b""
            is_over = text == b""
            if is_over and said == FINISH:
                self._end_life()  # first: what the owner has not seen yet would come back
                self._client.finish(series_key(self._facts["series"]))
            else:
                self.look()
            if is_over:
                return said in (FINISH, LEAVE)

    def look(self) -> bool:
        """Commit what is posted; whether there was something. Failures go to the board."""
        try:
            post = self.board.post()
            if post is None or self.board.word("lost"):
                return False
            self._commit(post)
        except (ConcordiaError, OSError) as error:
            self.board.lose(str(error))  # first: whoever reads our stderr may not
            logger.error("unprotected from here on: %s", error)
            return False
        self.board.answer(post)
        return True

    def _commit(self, post: Post) -> None:
        life, is_new = self._life_for(post)
        before = None if is_new else life.table()
        marked = None if is_new else {REGION: marked_pages(self.board, post)}
        state = {
            "policy": self._facts["policy"],
            "ordinal": post.ordinal,
            "digest": post.digest,
            "reads_bytes": post.reads_bytes,
            "reads_crc": self._reads.crc_until(post.reads_bytes),
            "regions": [
                [one.name, one.bytes, one.stage_offset, one.address] for one in post.regions
            ],
        }
        life.writer.begin(post.ordinal, json.dumps(state).encode(), marked)
        life.writer.commit(self._facts["commit_s"])
        if before is not None:  # a life's first has all pages, whatever changed
            self._count((before != life.table()).any(axis=1), post)
        self._write_report(post)

    def _life_for(self, post: Post) -> tuple[Life, bool]:
        """A life has one size of stage, and begins with all pages: it is made larger than what is
        used, so that a program whose memory grows needs few of them.
        """
        used, room = post.used_bytes, self.board.stage_bytes
        is_new = self._life is None or self._life.region.size < used
        if is_new:
            self._end_life()
            step = max(MARK_BYTES, 1 << (used.bit_length() - 3))
            size = min(-(-used // step) * step, room // MARK_BYTES * MARK_BYTES)
            self._life = Life(
                self._client, self._facts["series"], self._stage, size=size, newest=self._newest
            )
        assert self._life is not None
        return self._life, is_new

    def _end_life(self) -> None:
        if self._life is not None:
            self._life.close()
            self._life = None

    def _count(self, differs: npt.NDArray[np.bool_], post: Post) -> None:
        for one in post.regions:
            first = one.stage_offset // PAGE_BYTES
            pages = differs[first : first + one.pages * _PAGES_A_MARK].reshape(-1, _PAGES_A_MARK)
            changed = int(pages.any(axis=1).sum())
            self.changed[one.name] = self.changed.get(one.name, 0) + changed

    def _write_report(self, post: Post) -> None:
        rows = [
            {"name": one.name, "bytes": one.bytes, "posts": one.posts, "pages": one.pages}
            | {"pages_marked": one.pages_marked, "pages_changed": self.changed.get(one.name, 0)}
            for one in post.regions
        ]
        report = {name: self.board.word(name) for name in COUNTERS}
        whole = report | {"ordinal": post.ordinal, "regions": rows}
        staged = self._report.with_suffix(".new")
        staged.write_text(json.dumps(whole))
        staged.replace(self._report)

    def close(self) -> None:
        """Hang up; what was committed stays."""
        self._end_life()
        self._client.close()
        self._reads.close()
        self._stage.close()
        self.board.close()


def _compile(stage: Mapping) -> None:
    """What lives need, into the cache. Where nothing is there it takes seconds, in which a program
    that ran already would have no checkpoint.
    """
    with closing(Checkpointer.open("host", None)) as checkpointer:
        checkpointer.register_pages(stage.address, size=MARK_BYTES, page_bytes=PAGE_BYTES)


def marked_pages(board: Board, post: Post) -> list[range]:
    """Pages of PAGE_BYTES of the stage that may have changed, as runs."""
    found: list[range] = []
    for one in post.regions:
        first = one.stage_offset // MARK_BYTES
        marks = board.marks[first : first + one.pages] != 0
        edges = np.flatnonzero(np.diff(np.concatenate(([0], marks.view(np.int8), [0]))))
        found += [
            range((first + int(start)) * _PAGES_A_MARK, (first + int(end)) * _PAGES_A_MARK)
            for start, end in edges.reshape(-1, 2)
        ]
    return found


def main() -> None:
    """The folder, and what protection.py wrote about the journal."""
    folder = Path(sys.argv[1])
    facts = json.loads((folder / "facts").read_text())
    logging.basicConfig(stream=sys.stderr, format="concordia: %(message)s")
    try:
        agent = Agent(folder, facts)
    except ConcordiaError as error:
        logger.error("%s", error)
        sys.exit(error.exit_code)
    is_launcher_there = True  # an agent that fails leaves what it said
    try:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        is_launcher_there = agent.serve(0)
    finally:
        agent.close()
        if not is_launcher_there:  # nobody else removes what is in memory
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
