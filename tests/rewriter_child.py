"""A rewriter whose rewrite does what the image says: the desk and its children are the real ones.

Images: b"upper..." comes back changed, b"crash" ends in a segmentation fault, b"loop" never ends, b"raise" and b"mistake" raise, b"eat" takes all memory,
b"wait PATH" waits for that file.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

from concordia import config
from concordia.instrument.cache import ImageCache
from concordia.instrument.options import Options
from concordia.instrument.report import Hook, KernelReport, Rewritten
from concordia.instrument.rewrite_desk import RewriteDesk


def rewrite(image: bytes, options: Options) -> Rewritten:
    """What the image says."""
    word, _, rest = image.partition(b" ")
    with Path(os.environ["REWRITES"]).open("ab") as log:
        log.write(word + b"\n")
    if word == b"crash":
        ctypes.string_at(0)
    while word == b"loop":
        pass
    if word == b"raise":
        raise ValueError("as asked")
    if word == b"mistake":
        raise TypeError("as asked")
    if word == b"die":
        raise SystemExit(0)
    if word == b"eat":
        bytearray(config.REWRITE_MEMORY_BYTES)
    if word == b"wait":
        end = time.monotonic() + 60
        while not Path(os.fsdecode(rest.split(b"\0")[0])).exists() and time.monotonic() < end:
            time.sleep(0.001)
    return Rewritten(image.upper(), (), (KernelReport(word.decode(), Hook.ENTRY, options.arch),), is_changed=True)


if __name__ == "__main__":
    run, root, workers, answer_s, rewrite_s, jobs_max, clients_max = sys.argv[1:]
    config.REWRITE_S = float(rewrite_s)  # type: ignore[misc]
    config.REWRITE_JOBS_MAX = int(jobs_max)  # type: ignore[misc]
    config.REWRITE_CLIENTS_MAX = int(clients_max)  # type: ignore[misc]
    options = Options()
    desk = RewriteDesk(
        Path(run), ImageCache(Path(root), options.key()), options, rewrite=rewrite, workers=int(workers), answer_s=float(answer_s)
    )
    desk.stop_when_readable(sys.stdin.fileno())
    desk.serve()
    desk.close()
