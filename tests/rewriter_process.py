"""A rewriter process for tests, whose images say what a rewrite of them does (rewriter_child.py)."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

from concordia.instrument.cache import ImageCache
from concordia.instrument.options import Options
from concordia.instrument.request import Status, ask
from waiting import until

ROOT = pathlib.Path(__file__).parents[1]
CHILD = ROOT / "tests" / "rewriter_child.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}


class Served:
    """A rewriter process and its folders."""

    def __init__(
        self, folder: pathlib.Path, *, answer_s: float, rewrite_s: float, jobs_max: int = 256, clients_max: int = 1024
    ) -> None:
        self.run, self.root, self.log = folder / "run", folder / "images", folder / "rewrites"
        self.run.mkdir(mode=0o700)
        self.log.touch()
        self.socket = self.run / "rewriter.sock"
        arguments = [str(self.run), str(self.root), "2", str(answer_s), str(rewrite_s), str(jobs_max), str(clients_max)]
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), *arguments], stdin=subprocess.PIPE, env=ENVIRONMENT | {"REWRITES": str(self.log)}
        )
        until(self.socket.exists, 30)

    def ask(self, image: bytes) -> Status:
        return ask(self.socket, image, timeout_s=30)

    @property
    def cache(self) -> ImageCache:
        return ImageCache(self.root, Options().key())

    def rewrites(self, word: str) -> int:
        return self.log.read_text().split().count(word)

    def children(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            return [int(pid) for pid in pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]
        return []

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=30)


@contextlib.contextmanager
def served(folder: pathlib.Path, *, answer_s: float = 20.0, rewrite_s: float = 60.0, **bounds: int) -> Iterator[Served]:
    one = Served(folder, answer_s=answer_s, rewrite_s=rewrite_s, **bounds)
    try:
        yield one
        assert one.process.poll() is None, "it still serves"
        assert one.ask(b"alive at the end") is Status.READY
    finally:
        one.close()
