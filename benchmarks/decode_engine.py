"""A vLLM engine of a program that knows nothing of Concordia, hooked or plain.

Owns: one process of decode_program.py, and the command line of a Python program under `concordia
run`. Promises: every answer is waited for within a bound; nothing is left behind. Called by
program_cost.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any, Final

from concordia.errors import ConcordiaError

ROOT: Final = pathlib.Path(__file__).resolve().parent.parent
PROGRAM_S: Final = 180.0  # that one program, or one answer, may take
CLOSE_S: Final = 20.0  # that an engine may take to end


def command(
    words: list[str], *, hooks: str | None, gpu: int, cache: pathlib.Path
) -> tuple[list[str], dict[str, str]]:
    """Of a Python program, hooked or plain, on one GPU; and its environment."""
    front = [sys.executable]
    if hooks is not None:
        front = [*front, "-m", "concordia.cli", "run", "--hooks", hooks, "--", sys.executable]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    more = {
        "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": str(gpu), "CONCORDIA_CACHE": str(cache),
    }  # fmt: skip
    return [*front, *words], os.environ | more


class DecodeEngine:
    """An engine of decode_program.py that decodes when it is asked to."""

    def __init__(
        self, words: list[str], *, hooks: str | None, gpu: int, cache: pathlib.Path
    ) -> None:
        line, environment = command(words, hooks=hooks, gpu=gpu, cache=cache)
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115  # a pipe would fill
        self._child = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, text=True,
            env=environment, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith("{"):
                self._lines.put(line)
        self._lines.put("")

    def answer(self) -> dict[str, Any]:
        """The next; raises ConcordiaError when the engine has ended, or none comes."""
        try:
            line = self._lines.get(timeout=PROGRAM_S)
        except queue.Empty:
            raise ConcordiaError(f"an engine said nothing for {PROGRAM_S:.0f} s") from None
        if not line:
            self._complaints.seek(0)
            tail = " | ".join(self._complaints.read().strip().splitlines()[-5:])
            raise ConcordiaError(f"an engine ended with {self._child.wait(10)}: {tail}")
        found: dict[str, Any] = json.loads(line)
        return found

    def window(self) -> dict[str, Any]:
        """It decodes."""
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        try:
            self._child.wait(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait(timeout=CLOSE_S)
        self._complaints.close()
