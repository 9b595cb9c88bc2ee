"""Start the owner of a journal, or find the one that lives, floor 3.

Owns: the start of the owner process and the wait for it. Promises: many that start one at the same
time all get the same pid; the new process belongs to no parent, has a session of its own and keeps
no pipe or terminal of ours open; every wait has a bound. Called by the router and by tools. It does
not decide what happens to a journal that is there: owner.py does.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import concordia
from concordia import config
from concordia.errors import JournalError, JournalRefused, WaitTimeout
from concordia.journal.desk import Line
from concordia.journal.folder import Folder
from concordia.journal.place import Place


def spawn_owner(
    journal: Path,
    *,
    size_bytes: int | None,
    segment_bytes: int | None = None,
    linger_s: float = config.OWNER_LINGER_S,
    place: Place | None = None,
) -> int:
    """The pid of an owner that answers for this journal: the living one, or a new one.

    A new owner adopts what writers still use and removes what nobody does; `place` says where the
    pool shall lie when not in the journal's folder, and on which memory nodes. Raises
    JournalRefused or WaitTimeout.
    """
    home = Folder(journal := journal.absolute())  # the owner has another working folder
    home.make()
    found = _ask_pid(home)
    if found is not None:
        return found
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "concordia.journal.owner", str(journal), str(writer)]
    settings = {
        "size_bytes": size_bytes,
        "segment_bytes": segment_bytes,
        "linger_s": linger_s,
        **(place or Place()).to_settings(),
    }
    # The owner takes no part in the OpenMP and BLAS pools that its parent may have sized.
    paths = [str(Path(concordia.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    started = subprocess.Popen(
        [*command, json.dumps(settings)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[writer],
        start_new_session=True,
        env=environment,
        cwd="/",
    )
    os.close(writer)
    bound_s = config.OWNER_START_S + (size_bytes or 0) / config.OWNER_ALLOCATES
    try:
        return _await_ready(reader, home, bound_s)
    finally:
        os.close(reader)
        started.wait(timeout=config.OWNER_START_S)  # it has forked: the owner is nobody's child


def _ask_pid(home: Folder) -> int | None:
    try:
        line = Line(home.socket, config.OWNER_ANSWER_S)
    except OSError:
        return None
    try:
        return int(line.ask("hello", {})["pid"])
    except (OSError, ValueError):
        return None
    finally:
        line.close()


def _await_ready(reader: int, home: Folder, bound_s: float) -> int:
    """What the new owner says, or the pid of the one that was faster."""
    deadline = time.monotonic() + bound_s
    text = b""
    while not text.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            raise WaitTimeout(f"no owner of {home.path} after {bound_s:.0f} s")
        data = os.read(reader, 4096)
        if not data:
            raise JournalError(
                f"the owner of {home.path} ended before it was ready; see {home.log}"
            )
        text += data
    answer = json.loads(text)
    if "pid" in answer:
        return int(answer["pid"])
    while answer["error"] == "JournalError" and time.monotonic() < deadline:
        found = _ask_pid(home)  # another one has the lock and is about to answer
        if found is not None:
            return found
        select.select([], [], [], config.OWNER_POLL_S)
    raise (JournalRefused if answer["error"] == "JournalRefused" else JournalError)(
        answer["message"]
    )
