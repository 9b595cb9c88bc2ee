"""What a program is resumed from, floor 7.

Owns: the files from which the shim brings a program forward: `restore`, `pages` and the log of
reads. Promises: every byte in them is verified against the journal's hashes before a program is
started; a checkpoint of another policy, or whose log is not there, is an error in one line, and
nothing is touched. Called by protection.py before the program starts. It restores nothing itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from concordia.errors import Corruption, LayoutMismatch, RecoveryError
from concordia.integrations.program.program_pages import Reads
from concordia.journal.client import JournalClient
from concordia.recovery.pages import read_checkpoint

REGION: Final = "stage"  # as agent.py names it


@dataclass(frozen=True, slots=True)
class Resumed:
    """The point from which a program goes on."""

    ordinal: int
    bytes: int
    reads_bytes: int  # of the log, verified


def write_restore(
    client: JournalClient, key: int, *, policy: str, reads: Path, folder: Path
) -> Resumed | None:
    """Put the newest checkpoint of a series into the folder; None where there is none. Raises
    Corruption, LayoutMismatch or RecoveryError.
    """
    checkpoint = client.checkpoint(key)
    if not checkpoint.incarnation:
        return None
    pool, _ = client.map()
    found, extra = read_checkpoint(checkpoint, pool.view)
    state = _state(extra)
    if state["policy"] != policy:
        raise LayoutMismatch(
            "the program was saved under another policy: use that one, or remove its journal"
        )
    if REGION not in found:
        raise Corruption(f"the checkpoint has regions {sorted(found)}, none of a program")
    _check_reads(reads, state["reads_bytes"], state["reads_crc"])
    pages = found[REGION].data.reshape(-1)
    lines = ["concordia-restore 1", f"ordinal {state['ordinal']}", f"reads {state['reads_bytes']}"]
    for name, size, offset, address in state["regions"]:
        if offset + size > len(pages):
            raise Corruption(f"region {name} is not in the checkpoint")
        lines.append(f"region {name} {size} {offset} {address}")
    (folder / "pages").write_bytes(pages.data)
    # the shim looks for this one: it comes last
    (folder / "restore").write_text("".join(line + "\n" for line in lines))
    return Resumed(state["ordinal"], len(pages), state["reads_bytes"])


def _state(extra: bytes) -> dict[str, Any]:
    try:
        state = json.loads(extra)
        numbers = [state[name] for name in ("ordinal", "reads_bytes", "reads_crc")]
        rows = [(str(name), *map(int, numbers)) for name, *numbers in state["regions"]]
        if any(len(row) != 4 for row in rows):
            raise ValueError("a region has three numbers")
    except (ValueError, KeyError, TypeError) as error:
        raise Corruption(f"a program's checkpoint cannot be read: {error!r}") from error
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise Corruption("a program's checkpoint says no point")
    return dict(state) | {"regions": rows}


def _check_reads(path: Path, end: int, crc: int) -> None:
    if not path.exists():
        raise RecoveryError(f"the log of reads {path} is gone: the program cannot be resumed")
    log = Reads(path)
    try:
        if log.crc_until(end) != crc:
            raise Corruption(f"the log of reads {path} is not as it was saved")
    finally:
        log.close()
