"""Look into a journal from outside: what is in it, is it sound, give it to me, floor 3.

Owns: the answers of `concordia journal inspect|verify|export`. Promises: works with and without an
owner, maps read-only and changes nothing; damage is reported with its place, torn tails apart from
it; what an owner changes while we look is looked at again before it counts as damage. Called by the
command line and by tests. It does not print.
"""

from __future__ import annotations

import base64
import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from concordia import abi
from concordia.journal import fence, segment
from concordia.journal.folder import Folder
from concordia.journal.record import Record
from concordia.journal.segment import Board, Pool
from concordia.journal.stream import End, has_sound_payload
from concordia.journal.survey import Found, Survey, survey

_LOOKS: Final = 3  # a living owner may give back a segment between two of our reads
_KINDS: Final = {
    v: n.removeprefix("KIND_").lower() for n, v in vars(abi).items() if n.startswith("KIND_")
}
_WRITERS: Final = {
    v: n.removeprefix("WRITER_").lower() for n, v in vars(abi).items() if n.startswith("WRITER_")
}
_STATES: Final = {abi.STREAM_OPEN: "open", abi.STREAM_SEALED: "sealed"}


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found: `exit_code` is 0 for a sound journal and 3 for a damaged one."""

    streams: int
    records: int
    payload_bytes: int
    torn: list[str] = field(default_factory=list)  # what a crash leaves; no damage
    damage: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 3 if self.damage else 0


def inspect(journal: Path) -> dict[str, Any]:
    """Plain values about a journal: owner, room, streams, and what they hold; `table` prints
    them.
    """
    with _open(journal) as (pool, board):
        found = _look(pool, board)
        return {
            "journal": str(journal),
            "owner_pid": board.owner_pid,
            "owner_alive": bool(board.owner_pid) and fence.is_alive(board.owner_pid),
            "epoch": board.owner_epoch,
            "size_bytes": pool.segment_count * pool.segment_bytes,
            "segment_bytes": pool.segment_bytes,
            "segments": pool.segment_count,
            "segments_free": len(found.free),
            "replicas": [
                {
                    "replica": r.replica,
                    "session": r.session,
                    "router_pid": r.router_pid,
                    "fenced": bool(r.fenced),
                }
                for r in board.registrations().values()
            ],
            "streams": [_describe(stream) for stream in found.streams],
            "damage": _damage(found),
        }


def table(facts: dict[str, Any]) -> str:
    """What `inspect` found, for people."""
    state = "alive" if facts["owner_alive"] else "dead"
    lines = [
        f"journal   {facts['journal']}",
        f"owner     pid {facts['owner_pid']} ({state}), epoch {facts['epoch']}",
        (
            f"segments  {facts['segments_free']} of {facts['segments']} free, "
            f"{facts['segment_bytes'] >> 20} MiB each"
        ),
        "",
        (
            f"{'stream':>16} {'writer':<10} {'rank':>5} {'state':<7} {'records':>8} {'MiB':>9} "
            f"{'lost':>5} {'end':<8} label"
        ),
    ]
    for s in facts["streams"]:
        rank = f"{s['rank']}/{s['world']}"
        lines.append(
            f"{s['stream']:>16x} {s['writer']:<10} {rank:>5} {s['state']:<7} {s['records']:>8} "
            f"{s['payload_bytes'] / (1 << 20):>9.2f} {s['dropped_records']:>5} {s['end']:<8} "
            f"{s['label']}"
        )
    lines += [f"DAMAGE    {text}" for text in facts["damage"]]
    return "\n".join(lines)


def verify(journal: Path) -> VerifyReport:
    """Check every header, chain and payload hash that can be read."""
    with _open(journal) as (pool, board):
        found = _look(pool, board)
        damage = _damage(found)
        torn = []
        records = payload_bytes = 0
        for stream in found.streams:
            name = f"stream {stream.identity.stream:#x} ({stream.control.label})"
            if stream.end is End.TORN:
                torn.append(f"{name}: record {stream.reader.sequence} was begun and not committed")
            for record in stream.records:
                records += 1
                payload_bytes += record.payload_bytes
                if not _is_sound(pool, stream, record):
                    damage.append(f"{name}: payload of record {record.sequence} is damaged")
        return VerifyReport(len(found.streams), records, payload_bytes, torn, damage)


def export(journal: Path, *, payloads: bool) -> Iterator[dict[str, Any]]:
    """Every record's header as plain values, stream by stream; payloads in base64 when wanted."""
    with _open(journal) as (pool, board):
        for stream in _look(pool, board).streams:
            for record in stream.records:
                yield _export(pool, stream, record, payloads=payloads)


@contextlib.contextmanager
def _open(journal: Path) -> Iterator[tuple[Pool, Board]]:
    pool, board = segment.attach(Folder(journal))
    try:
        yield pool, board
    finally:
        pool.close()
        board.close()


def _look(pool: Pool, board: Board) -> Survey:
    found = survey(pool, board)
    for _ in range(_LOOKS - 1):
        if not _damage(found):
            break
        found = survey(pool, board)
    return found


def _damage(found: Survey) -> list[str]:
    return found.damage + [text for stream in found.streams for text in stream.damage]


def _is_sound(pool: Pool, stream: Found, record: Record) -> bool:
    if has_sound_payload(pool.view, record):
        return True
    # An owner may have given the segment back since: then it has another salt by now, or none.
    start = pool.start(record.offset // pool.segment_bytes)
    return start is None or start.salt != record.salt


def _describe(stream: Found) -> dict[str, Any]:
    identity, control = stream.identity, stream.control
    kinds = Counter(_KINDS.get(record.kind, str(record.kind)) for record in stream.records)
    return {
        "slot": control.slot,
        "stream": identity.stream,
        "label": control.label,
        "writer": _WRITERS.get(identity.writer_kind, str(identity.writer_kind)),
        "rank": identity.rank,
        "world": identity.world,
        "writer_pid": identity.writer_pid,
        "replica": identity.replica,
        "layout_hash": f"{identity.layout_hash:016x}",
        "state": _STATES.get(control.state, str(control.state)),
        "end": stream.end.value,
        "records": len(stream.records),
        "kinds": dict(kinds),
        "requests": len({record.key for record in stream.records}),
        "payload_bytes": sum(record.payload_bytes for record in stream.records),
        "dropped_records": control.dropped_count,
        "segments_given_back": stream.reader.gaps,
    }


def _export(pool: Pool, stream: Found, record: Record, *, payloads: bool) -> dict[str, Any]:
    line: dict[str, Any] = {
        "stream": stream.identity.stream,
        "rank": stream.identity.rank,
        "replica": record.origin or stream.identity.replica,
        "sequence": record.sequence,
        "kind": _KINDS.get(record.kind, str(record.kind)),
        "key": f"{record.key:032x}",
        "incarnation": record.incarnation,
        "region": record.region,
        "token_start": record.token_start,
        "token_end": record.token_end,
        "payload_bytes": record.payload_bytes,
        "payload_hash": f"{record.payload_hash:032x}",
        "layout_hash": f"{record.layout_hash:016x}",
        "model_hash": f"{record.model_hash:016x}",
        "handler_hash": f"{record.handler_hash:016x}",
        "step": record.step,
        "stamp_ns": record.stamp_ns,
        "pool_offset": record.payload_offset,
    }
    if payloads:
        at = record.payload_offset
        line["payload"] = base64.b64encode(pool.view[at : at + record.payload_bytes]).decode(
            "ascii"
        )
    return line
