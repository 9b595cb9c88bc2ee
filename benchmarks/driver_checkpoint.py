"""The driver's own checkpoint of a whole process: what restores a GPU process without Concordia.

Owns: cuCheckpointProcess{Lock,Checkpoint,Restore,Unlock} of a small process that holds so many GiB,
and the proof that its memory is what it was. Promises: bounded, and no process of it is left; a
driver that cannot do it ends with one line. Called by engine.py --only driver, which runs it as a
process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any, Final

HELD_GIB: Final = 16
ROUNDS: Final = 2
LOCK_MS: Final = 10_000
HOLDER: Final = """
import sys, torch
held = torch.empty(int(sys.argv[1]) << 30, dtype=torch.uint8, device="cuda").fill_(7)
torch.cuda.synchronize()
print("ready", flush=True)
for line in sys.stdin:
    print(sum(int((part == 7).sum().item()) for part in held.split(1 << 28)), flush=True)
"""


def measure(gib: int = HELD_GIB, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each checkpoint and of each restore, locks included."""
    from cuda.bindings import driver

    _checked(driver.cuInit(0), "initialise CUDA")
    command = [sys.executable, "-c", HOLDER, str(gib)]
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        if holder.stdout.readline().strip() != "ready":
            raise RuntimeError(f"no process with {gib} GiB of GPU memory could be started")
        found: dict[str, list[float]] = {"checkpoint": [], "restore": []}
        for _ in range(rounds):
            lock = driver.CUcheckpointLockArgs()
            lock.timeoutMs = LOCK_MS
            started = time.monotonic()
            _checked(driver.cuCheckpointProcessLock(holder.pid, lock), "lock the process")
            taken = driver.cuCheckpointProcessCheckpoint(holder.pid, None)
            _checked(taken, "checkpoint the process")
            found["checkpoint"].append(time.monotonic() - started)
            started = time.monotonic()
            _checked(driver.cuCheckpointProcessRestore(holder.pid, None), "restore the process")
            _checked(driver.cuCheckpointProcessUnlock(holder.pid, None), "unlock the process")
            found["restore"].append(time.monotonic() - started)
            holder.stdin.write("count\n")
            if int(holder.stdout.readline() or 0) != gib << 30:
                raise RuntimeError("the restored process holds other bytes")
        return found
    finally:
        holder.kill()
        holder.wait()


def _checked(result: tuple[Any, ...], doing: str) -> None:
    if int(result[0]):
        raise RuntimeError(f"{doing}: {result[0].name}")


if __name__ == "__main__":
    try:
        print(json.dumps(measure()))
    except (RuntimeError, ImportError) as error:
        print(f"driver_checkpoint: {error}", file=sys.stderr)
        sys.exit(1)
