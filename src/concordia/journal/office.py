"""What the owner answers to each request, floor 3.

Owns: the operations of the protocol and the check of their arguments. Promises: before it says what
is committed it reads what was committed since; a place it tells stays where it is until the restore
has had its time. Called by desk for every line. It keeps no state of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from concordia import abi
from concordia.errors import JournalError
from concordia.journal import fence
from concordia.journal.checkpoints import Checkpoint
from concordia.journal.control import Identity
from concordia.journal.coverage import Cut
from concordia.journal.pins import Told

if TYPE_CHECKING:
    from concordia.journal.desk import Peer
    from concordia.journal.owner import Owner
    from concordia.journal.stream_state import Stream

_U32 = 1 << 32
_U64 = 1 << 64
_U128 = 1 << 128
_NODES_MAX = 1 << 10  # MAX_NUMNODES of a usual kernel
_BOUNDS_MAX = 65_536  # a request is resumed a few times, and never that often


class Office:
    """One method per operation; the names are the protocol."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        # nonce: slot and stream, for a repeated request
        self._opened: dict[str, tuple[int, int]] = {}
        self._operations: dict[str, Callable[[Peer, dict[str, Any]], Any]] = {
            "hello": self._hello,
            "open_stream": self._open_stream,
            "close_stream": self._close_stream,
            "register_replica": self._register,
            "release_replica": self._release,
            "seal_replica": self._seal,
            "cut": self._cut,
            "checkpoint": self._checkpoint,
            "match_prefix": self._match_prefix,
            "key_news": self._key_news,
            "committed": self._committed,
            "committed_all": self._committed_all,
            "finish": self._finish,
            "events": self._events,
            "stats": self._stats,
            "shutdown": self._shutdown,
        }

    def answer(self, peer: Peer, operation: str, arguments: dict[str, Any]) -> Any:
        """Dispatch one request; raises ConcordiaError, KeyError, TypeError or ValueError."""
        found = self._operations.get(operation)
        if found is None:
            raise JournalError(f"there is no operation {operation!r}")
        return found(peer, arguments)

    def _hello(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, int]:
        board = self._owner.streams.board
        return {
            "pid": os.getpid(),
            "epoch": board.owner_epoch,
            "segment_bytes": board.segment_bytes,
            "segment_count": board.segment_count,
        }

    def _open_stream(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, int | None]:
        nonce = str(arguments["nonce"])
        if nonce in self._opened:
            slot, stream = self._opened[nonce]
            return {"slot": slot, "stream": stream, "node": self._owner.node}
        replica = _number(arguments, "replica", _U64)
        self._owner.replicas.check_may_write(replica)
        writer = fence.find_process(peer.pid)
        if writer is None:
            raise JournalError(
                f"writer {peer.pid} cannot be seen by the owner: another pid namespace?"
            )
        world = _number(arguments, "world", 1 << 16)
        rank = _number(arguments, "rank", 1 << 16)
        kind = _number(arguments, "writer_kind", _U32)
        if kind not in (abi.WRITER_RANK, abi.WRITER_SCHEDULER, abi.WRITER_ROUTER) or rank >= world:
            raise JournalError(f"writer kind {kind}, rank {rank} of {world}: no such writer")
        layout = _number(arguments, "layout_hash", _U64)
        label = str(arguments["label"])
        others = self._owner.streams.writers() if arguments.get("is_sole") else []
        if any(stream.control.label == label for stream in others):
            raise JournalError(
                f"another process still writes {label!r}: end it first, or use another name"
            )
        identity = Identity(0, kind, rank, world, peer.pid, writer.start, replica, layout)
        node = None if arguments.get("node") is None else _number(arguments, "node", _NODES_MAX)
        opened = self._owner.streams.open(identity, label, node=node)
        self._owner.watch(peer.pid, writer.start)
        by_slot = self._owner.streams.by_slot
        self._opened = {
            asked: (slot, stream)
            for asked, (slot, stream) in self._opened.items()
            if slot in by_slot and by_slot[slot].identity.stream == stream
        }
        self._opened[nonce] = opened.control.slot, opened.identity.stream
        return {
            "slot": opened.control.slot,
            "stream": opened.identity.stream,
            "node": self._owner.node,
        }

    def _close_stream(self, peer: Peer, arguments: dict[str, Any]) -> int:
        stream = self._stream(arguments)
        if stream is None:
            return 0
        if stream.identity.writer_pid != peer.pid:
            raise JournalError(f"process {peer.pid} is not the writer of {stream.control.label}")
        self._owner.streams.release(stream)
        return stream.reader.sequence

    def _register(self, peer: Peer, arguments: dict[str, Any]) -> bool:
        router = fence.find_process(peer.pid)
        if router is None:
            raise JournalError(f"router {peer.pid} cannot be seen by the owner")
        replica = _number(arguments, "replica", _U64)
        session = _number(arguments, "session_id", _U32)
        self._owner.replicas.register(replica, session=session, router_pid=peer.pid)
        self._owner.watch(peer.pid, router.start)
        return True

    def _release(self, peer: Peer, arguments: dict[str, Any]) -> bool:
        return self._owner.replicas.release(_number(arguments, "replica", _U64))

    def _seal(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, int]:
        sealed = self._owner.replicas.seal(_number(arguments, "replica", _U64))
        return {str(stream): count for stream, count in sealed.items()}

    def _cut(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, Any]:
        self._owner.streams.scan_all()
        key = _number(arguments, "key", _U128)
        layout_hash = _number(arguments, "layout_hash", _U64)
        world = _number(arguments, "world", 1 << 16)
        cut = self._owner.streams.index.cuts.longest(
            key,
            tokens_known=_number(arguments, "tokens_known", _U32),
            layout_hash=layout_hash,
            world=world,
            bounds=_bounds(arguments.get("bounds", {})),
        )
        newest = self._owner.streams.index.cuts.newest(key)
        return self._pinned(cut, Told(key, newest, (layout_hash, world)))

    def _checkpoint(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, Any]:
        self._owner.streams.scan_all()
        key, rank = _number(arguments, "key", _U128), _number(arguments, "rank", 1 << 16)
        return self._pinned(self._owner.streams.index.checkpoints.newest(key, rank), None)

    def _match_prefix(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, Any]:
        self._owner.streams.scan_all()
        cut = self._owner.streams.index.cuts.match_prefix(
            [int(key) for key in arguments["keys"]],
            layout_hash=_number(arguments, "layout_hash", _U64),
            world=_number(arguments, "world", 1 << 16),
        )
        return self._pinned(cut, None)

    def _key_news(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, Any]:
        self._owner.streams.scan_all()
        group = (
            _number(arguments, "layout_hash", _U64),
            _number(arguments, "world", 1 << 16),
        )
        epoch = self._owner.streams.board.owner_epoch << 32
        after = _number(arguments, "after", _U64)
        # a number of an owner before says nothing about this one's
        number = after - epoch if after >> 32 == epoch >> 32 else None
        found = self._owner.streams.index.keys.news(group, number)
        return replace(found, cursor=epoch + found.cursor).to_json()

    def _committed(self, peer: Peer, arguments: dict[str, Any]) -> int:
        self._owner.streams.scan_all()
        return self._owner.streams.index.cuts.committed(_number(arguments, "key", _U128))

    def _committed_all(self, peer: Peer, arguments: dict[str, Any]) -> list[int]:
        self._owner.streams.scan_all()
        committed = self._owner.streams.index.cuts.committed
        return [committed(int(key)) for key in arguments["keys"]]

    def _finish(self, peer: Peer, arguments: dict[str, Any]) -> bool:
        key = _number(arguments, "key", _U128)
        self._owner.streams.scan_all()  # what it wrote before its end is not news after it
        is_new = self._owner.streams.index.finish(key, now=time.monotonic())
        return is_new and self._owner.cleaner.write_finish(key)

    def _events(self, peer: Peer, arguments: dict[str, Any]) -> list[Any]:
        self._owner.streams.scan_all()
        index = self._owner.streams.index
        after = _number(arguments, "after", _U64)
        epoch = self._owner.streams.board.owner_epoch << 32
        if after >> 32 != epoch >> 32:
            after = epoch  # of an owner before: everything again, rather than anything never
        return [
            epoch + index.events.count,
            [event for number, event in index.events if epoch + number > after],
        ]

    def _stats(self, peer: Peer, arguments: dict[str, Any]) -> dict[str, Any]:
        owner = self._owner
        streams, cleaner = owner.streams, owner.cleaner
        return {
            "pid": os.getpid(),
            "epoch": streams.board.owner_epoch,
            "size_bytes": streams.pool.segment_bytes * streams.pool.segment_count,
            "segment_bytes": streams.pool.segment_bytes,
            "segments": streams.pool.segment_count,
            "segments_free": len(streams.free),
            "is_locked": owner.is_locked,
            "live_bytes": streams.index.ledger.live_bytes(),
            "requests": len(streams.index.requests),
            "peers": len(owner.desk.peers),
            "corruptions": streams.intake.corrupt_count,
            "copied_records": cleaner.copied_count,
            "copied_bytes": cleaner.copied_bytes,
            "evicted_blocks": cleaner.evicted_blocks,
            "withdrawn_keys": streams.index.keys.withdrawn_count,
            "unprotected_requests": cleaner.unprotected_requests,
            "events": streams.index.events.count,
            "streams": [_describe(stream) for stream in streams.by_slot.values()],
            **streams.index.keys.counts(),
        }

    def _shutdown(self, peer: Peer, arguments: dict[str, Any]) -> bool:
        self._owner.is_stopping = True
        return True

    def _stream(self, arguments: dict[str, Any]) -> Stream | None:
        found = self._owner.streams.by_slot.get(_number(arguments, "slot", abi.STREAM_CAPACITY))
        return found if found is not None and found.identity.stream == arguments["stream"] else None

    def _pinned(self, found: Cut | Checkpoint, told: Told | None) -> dict[str, Any]:
        self._owner.streams.pins.add(found.pieces, told)
        return found.to_json()


def _describe(stream: Stream) -> dict[str, Any]:
    control, identity = stream.control, stream.identity
    return {
        "slot": control.slot,
        "stream": identity.stream,
        "label": control.label,
        "writer_kind": identity.writer_kind,
        "rank": identity.rank,
        "world": identity.world,
        "replica": identity.replica,
        "is_sealed": stream.is_sealed,
        "end": stream.end.value,
        "records": stream.reader.sequence,
        "committed_bytes": control.word("committed_bytes"),
        "dropped_records": control.dropped_count,
        "unprotected": control.word("unprotected_count"),
        "segments": len(stream.segments),
    }


def _number(arguments: dict[str, Any], name: str, below: int) -> int:
    value = arguments[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
        raise JournalError(f"{name} is {value!r}, not an integer in [0, {below})")
    return value


def _bounds(value: Any) -> dict[int, int]:
    """Tokens by router incarnation; JSON has the incarnations as text."""
    if not isinstance(value, dict) or len(value) > _BOUNDS_MAX:
        raise JournalError(f"bounds must be an object of at most {_BOUNDS_MAX} entries")
    return {int(incarnation): _number(value, incarnation, _U64) for incarnation in value}
