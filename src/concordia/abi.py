"""Every byte layout that Python shares with device code or C, floor 1.

Owns: the structures below and `kernels/abi.h`, which `header()` generates from them. Promises: a structure has no hidden padding, its
size is a multiple of its alignment, and each word has exactly one writer (named beside it). A change of any layout raises ABI_VERSION,
and a reader refuses another version. Called by everything that reads or writes shared memory. Does not read or write any memory itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

ABI_VERSION: Final = 2

LINE_BYTES: Final = (
    128  # one cache line pair: what one side polls never shares it with what the other writes
)
LEAF_BYTES: Final = 4096  # unit of the payload hash
IDS_PER_LEAF: Final = 16  # block ids that an executor has room for, per leaf of its stage
ROOT_BYTES_MIN: Final = (
    256  # the leaf digests are zero-padded to this, so that one XXH3 path serves every length
)

SEGMENT_MAGIC: Final = 0x31474553_434E4F43  # "CONCSEG1"
RECORD_MAGIC: Final = 0x52434E43  # "CNCR"
BOARD_MAGIC: Final = 0x44524F42_434E4F43  # "CONCBORD"
COMMIT_MULTIPLIER: Final = (
    0x9E3779B97F4A7C15  # odd, so that every (salt, sequence) gives another commit word
)

LENT_CAPACITY: Final = 64  # segments that the owner may lend ahead to one stream
STREAM_CAPACITY: Final = 256  # streams of one journal
REPLICA_CAPACITY: Final = (
    64  # replicas registered at one time: active, standby and those being cleared away
)
NOT_SEALED: Final = 0xFFFFFFFFFFFFFFFF
OPERATOR_CAPACITY: Final = 1024  # operators of one executor: a handler of a region is one

# Streams
STREAM_FREE: Final = 0
STREAM_OPEN: Final = 1
STREAM_SEALED: Final = 2

WRITER_RANK: Final = 1
WRITER_SCHEDULER: Final = 2
WRITER_ROUTER: Final = 3
WRITER_CLEANER: Final = 4

# Record kinds
KIND_KV_TAIL: Final = 1  # tokens of a partial block, canonical order
KIND_KV_BLOCK: Final = 2  # a whole block, raw bytes, layer by layer
KIND_BLOCK_KEY: Final = 3  # which chained token hash a block of a request has
KIND_REQUEST: Final = 4  # parameters of a request (JSON)
KIND_TOKENS: Final = 5  # token ids received by the router (u32)
KIND_EVENT: Final = 6  # what happened to a request (JSON)
KIND_PAGE: Final = 7  # a dirty page of an opaque region
KIND_MEMBERSHIP: Final = 8  # communicator state (JSON)
KIND_FINISH: Final = 9  # the request ended; its tails are dead, its blocks age

# Tasks
TASK_NOOP: Final = 0
TASK_COMPUTE: Final = 1
TASK_CHECKPOINT: Final = 2
TASK_APPEND: Final = 3
TASK_RESTORE: Final = 4
TASK_PARITY: Final = 5
TASK_GATE: Final = 6  # no launch of the executor below `arg` passes it: launches can be put behind a framework's work

# Status of a completed task
STATUS_OK: Final = 1
STATUS_JOURNAL_FULL: Final = (
    2  # no segment lent: the record was not written, its region is unprotected
)
STATUS_TOO_LARGE: Final = 3  # the record does not fit a segment
STATUS_HASH_MISMATCH: Final = 4  # payload read for a restore is not what its record promised
STATUS_BAD_TASK: Final = 5  # the task names what does not exist

_DTYPES: Final = {"u8": "<u1", "u16": "<u2", "u32": "<u4", "u64": "<u8"}
_C_TYPES: Final = {"u8": "uint8_t", "u16": "uint16_t", "u32": "uint32_t", "u64": "uint64_t"}
_SIZES: Final = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}


@dataclass(frozen=True, slots=True)
class Field:
    """One member: name, element type, count (1 is a scalar) and who writes it."""

    name: str
    kind: str
    count: int = 1
    note: str = ""

    @property
    def size(self) -> int:
        return _SIZES[self.kind] * self.count


@dataclass(frozen=True, slots=True)
class Struct:
    """A shared structure of `size` bytes, laid out in the order of `fields`."""

    name: str
    size: int
    fields: tuple[Field, ...]

    def offsets(self) -> dict[str, int]:
        """Byte offset of each member; raises ValueError for hidden padding or a wrong size."""
        at = 0
        found: dict[str, int] = {}
        for field in self.fields:
            if at % _SIZES[field.kind]:
                raise ValueError(f"{self.name}.{field.name} at {at} is not aligned")
            found[field.name] = at
            at += field.size
        if at != self.size:
            raise ValueError(f"{self.name} is {at} bytes, not {self.size}")
        return found

    @property
    def dtype(self) -> np.dtype[np.void]:
        """The numpy record type over the same bytes."""
        return np.dtype(
            [
                (f.name, _DTYPES[f.kind]) if f.count == 1 else (f.name, _DTYPES[f.kind], (f.count,))
                for f in self.fields
            ]
        )


def _pad(size: int, name: str) -> Field:
    return Field(name, "u8", size)


RECORD_HEADER = Struct(
    "RecordHeader",
    256,
    (
        Field("magic", "u32"),
        Field("version", "u16"),
        Field("kind", "u16"),
        Field(
            "salt", "u64", note="of the segment's present life: an old lap can never pass as new"
        ),
        Field("sequence", "u64", note="per stream, from 0, without gaps"),
        Field(
            "previous_hash",
            "u64",
            2,
            "XXH3-128 (low, high) of the header before it in this segment",
        ),
        Field("key", "u64", 2, "request key: XXH3-128 of the request id"),
        Field("incarnation", "u64"),
        Field("region", "u32"),
        Field(
            "flags",
            "u32",
            note="KV records: tokens per block of the layout, 0 if the writer does not say",
        ),
        Field("token_start", "u32"),
        Field("token_end", "u32", note="exclusive"),
        Field("payload_bytes", "u64"),
        Field("payload_hash", "u64", 2, "tree hash, low and high"),
        Field("handler_hash", "u64"),
        Field("layout_hash", "u64"),
        Field("step", "u64", note="engine step that wrote these bytes"),
        Field("stamp_ns", "u64", note="writer's monotonic clock when the task was submitted"),
        Field("origin", "u64", note="copies only: replica in whose stream the original was"),
        Field(
            "model_hash",
            "u64",
            note="KV records: model, adapter and salt that computed the bytes, 0 if the writer does not say",
        ),
        _pad(100, "reserved"),
        Field("header_crc", "u32", note="CRC32C of the 252 bytes before it"),
    ),
)

SEGMENT_HEADER = Struct(
    "SegmentHeader",
    256,
    (
        Field("magic", "u64"),
        Field("version", "u32"),
        Field("segment", "u32", note="index in the pool"),
        Field("stream", "u64", note="unique id of the stream, never reused"),
        Field("ordinal", "u64", note="0 is the stream's first segment"),
        Field("salt", "u64"),
        Field("first_sequence", "u64"),
        Field(
            "predecessor_hash",
            "u64",
            2,
            "hash of the last header of the segment before, 0 for the first",
        ),
        Field("segment_bytes", "u64"),
        _pad(180, "reserved"),
        Field("header_crc", "u32"),
    ),
)

LENT_SEGMENT = Struct(
    "LentSegment",
    16,
    (Field("segment", "u32"), Field("ordinal", "u32"), Field("salt", "u64")),
)

STREAM_CONTROL = Struct(
    "StreamControl",
    4096,
    (
        # line 0: the owner writes
        Field("magic", "u64"),
        Field("version", "u32"),
        Field("state", "u32"),
        Field("stream", "u64"),
        Field("writer_kind", "u32"),
        Field("rank", "u32"),
        Field("world", "u32"),
        Field("writer_pid", "u32"),
        Field("replica", "u64", note="incarnation of the replica, 0 for none"),
        Field("layout_hash", "u64"),
        Field(
            "sealed_count",
            "u64",
            note="records below this sequence may be read; NOT_SEALED while open",
        ),
        Field(
            "writer_start",
            "u64",
            note="start time of writer_pid in clock ticks: a pid alone may be reused",
        ),
        Field(
            "seal_check", "u64", note="commit_word(stream, sealed_count): a flipped seal is noticed"
        ),
        Field(
            "identity_crc",
            "u64",
            note="CRC32C of this line without state, sealed_count and what follows writer_start",
        ),
        _pad(40, "owner_reserved"),
        # line 1: the owner writes
        Field(
            "lent_count", "u64", note="segments ever lent; entry i lies at lent[i % LENT_CAPACITY]"
        ),
        _pad(120, "lent_reserved"),
        # line 2: the executor writes
        Field("taken_count", "u64", note="segments ever taken"),
        Field(
            "committed_count", "u64", note="records committed: a hint for readers, never trusted"
        ),
        Field("committed_bytes", "u64"),
        Field("dropped_count", "u64", note="records lost for want of a segment"),
        Field("segment_offset", "u64", note="first free byte of the present segment"),
        _pad(88, "executor_reserved"),
        # line 3: the host thread of the writer writes (step announcements for the detector)
        Field("step_started", "u64", note="number of the step that started last, from 1"),
        Field("step_tokens", "u64", note="tokens of that step"),
        Field("step_started_ns", "u64", note="CLOCK_MONOTONIC"),
        Field("step_done", "u64", note="number of the step that ended last"),
        Field("step_done_ns", "u64"),
        Field("waiting_count", "u64", note="requests that wait to be scheduled"),
        Field("heartbeat_ns", "u64"),
        Field("unprotected_count", "u64", note="requests that lost protection in this writer"),
        _pad(64, "host_reserved"),
        # line 4: the owner writes
        Field("label", "u8", 128, "writer's name, UTF-8, zero-padded"),
        # lines 5..: the owner writes an entry before it raises lent_count
        Field("lent", "u64", 2 * LENT_CAPACITY, "LentSegment entries"),
        _pad(4096 - 5 * 128 - 16 * LENT_CAPACITY, "tail"),
    ),
)

BOARD_HEADER = Struct(
    "BoardHeader",
    4096,
    (
        Field("magic", "u64"),
        Field("version", "u32"),
        Field("stream_capacity", "u32"),
        Field("segment_bytes", "u64"),
        Field("segment_count", "u64"),
        Field("owner_pid", "u64"),
        Field("owner_epoch", "u64", note="raised by every owner that takes the journal"),
        Field("owner_heartbeat_ns", "u64"),
        Field("registered", "u64", 6 * REPLICA_CAPACITY, "Registration entries"),
        _pad(4096 - 56 - 48 * REPLICA_CAPACITY, "reserved"),
    ),
)

REGISTRATION = Struct(
    "Registration",
    48,
    (
        Field(
            "replica",
            "u64",
            note="incarnation of a replica, 0 for a free entry; the owner writes all of this",
        ),
        Field("session", "u64", note="session id of its process tree"),
        Field("session_start", "u64", note="start time of the session's leader"),
        Field("router_pid", "u64"),
        Field("router_start", "u64"),
        Field("fenced", "u64", note="1 once sealed: it may never open a stream again"),
    ),
)

TASK = Struct(
    "Task",
    128,
    (
        Field(
            "publish", "u64", note="position + 1 once the slot is valid: lap and index in one word"
        ),
        Field("opcode", "u32"),
        Field("kind", "u32"),
        Field("region", "u32"),
        Field("record_kind", "u32"),
        Field("key", "u64", 2),
        Field("incarnation", "u64"),
        Field("token_start", "u32"),
        Field("token_end", "u32"),
        Field("blocks", "u64", note="offset of u32 block ids in the ring's argument arena"),
        Field("block_count", "u32"),
        Field("flags", "u32"),
        Field(
            "source",
            "u64",
            note="address of payload bytes (restore: in the pool, bytes: in the arena)",
        ),
        Field("source_bytes", "u64"),
        Field("step", "u64"),
        Field("stamp_ns", "u64"),
        Field("arg", "u64", note="opcode's own"),
        Field(
            "span",
            "u32",
            note="positions that the task occupies: one, or more when its arguments need more arena",
        ),
        _pad(4, "reserved"),
        Field("model_hash", "u64", note="for the record"),
    ),
)

COMPLETION = Struct(
    "Completion",
    64,
    (
        Field("publish", "u64", note="position + 1 once the other words are valid"),
        Field("status", "u32"),
        Field("generation", "u32", note="of the operator table entry that ran"),
        Field("sequence", "u64", note="of the record that was committed"),
        Field("payload_hash", "u64", 2),
        Field("result", "u64"),
        _pad(16, "reserved"),
    ),
)

RING_HEADER = Struct(
    "RingHeader",
    1024,
    (
        # line 0: host producers
        Field(
            "tail",
            "u64",
            note="next position to claim; host threads only, so a locked add is allowed",
        ),
        _pad(120, "line0"),
        # line 1: the executor
        Field("head", "u64", note="positions below this are done"),
        _pad(120, "line1"),
        # line 2: the launcher
        Field("launched", "u64", note="how often the executor was sent in"),
        Field("lease_ns", "u64"),
        Field("idle_ns", "u64"),
        _pad(104, "line2"),
        # line 3: the executor
        Field("left", "u64", note="equals launched once that launch has left"),
        _pad(120, "line3"),
        # line 4: the host
        Field("stop", "u64", note="1 asks the executor to leave at the next task boundary"),
        Field("operators", "u64", note="address of the operator table"),
        Field("generation", "u64", note="of the operator table"),
        _pad(104, "line4"),
        # line 5: the executor
        Field("heartbeat", "u64", note="raised at every loop"),
        Field("generation_seen", "u64"),
        Field("done_count", "u64", note="tasks ever done"),
        Field("busy_ns", "u64", note="time spent in handlers"),
        Field("appended_bytes", "u64", note="bytes of records committed"),
        _pad(88, "line5"),
        # line 6: constant after creation
        Field("slot_count", "u64", note="a power of two"),
        Field("slots", "u64", note="address of the Task slots, as the executor sees it"),
        Field("completions", "u64"),
        Field("arena", "u64"),
        Field("arena_bytes", "u64"),
        Field("completion_count", "u64", note="a power of two, several laps of the slots"),
        _pad(80, "line6"),
        _pad(128, "line7"),
    ),
)

OPERATOR = Struct(
    "Operator",
    64,
    (
        # Immutable once its address is in the table: a new generation is a new Operator.
        Field("function", "u64", note="address of the handler's code"),
        Field("region", "u64", note="address of its Region, 0 for none"),
        Field("handler_hash", "u64", note="of source, constants and compiler"),
        Field("generation", "u64", note="of the table when this entry was published"),
        _pad(32, "reserved"),
    ),
)

REGION = Struct(
    "Region",
    64,
    (
        Field(
            "bases",
            "u64",
            note="address of base addresses: one per layer, or one of an opaque region",
        ),
        Field("base_count", "u32"),
        Field("region", "u32", note="number of the region, as records carry it"),
        Field("block_count", "u64", note="blocks of a layer, or pages of an opaque region"),
        Field("layout_hash", "u64"),
        Field(
            "page_hashes",
            "u64",
            note="opaque region: address of two u64 per page, the hash last committed",
        ),
        _pad(24, "reserved"),
    ),
)

STRUCTS: Final = (
    RECORD_HEADER,
    SEGMENT_HEADER,
    LENT_SEGMENT,
    STREAM_CONTROL,
    BOARD_HEADER,
    REGISTRATION,
    TASK,
    COMPLETION,
    RING_HEADER,
    OPERATOR,
    REGION,
)

_CONSTANT_PREFIXES: Final = ("KIND_", "TASK_", "STATUS_", "STREAM_", "WRITER_")
_CONSTANT_NAMES: Final = (
    "ABI_VERSION",
    "LINE_BYTES",
    "LEAF_BYTES",
    "IDS_PER_LEAF",
    "ROOT_BYTES_MIN",
    "SEGMENT_MAGIC",
    "RECORD_MAGIC",
    "BOARD_MAGIC",
    "COMMIT_MULTIPLIER",
    "LENT_CAPACITY",
    "NOT_SEALED",
    "OPERATOR_CAPACITY",
)


def constants() -> dict[str, int]:
    """The named numbers that device code sees, in the order of this file."""
    return {
        name: value
        for name, value in globals().items()
        if isinstance(value, int)
        and (name in _CONSTANT_NAMES or name.startswith(_CONSTANT_PREFIXES))
    }


def commit_word(salt: int, sequence: int) -> int:
    """The 8 bytes that follow a record's payload once it is committed; never 0 in practice."""
    return salt ^ ((sequence + 1) * COMMIT_MULTIPLIER & NOT_SEALED)


def header() -> str:
    """The text of `kernels/abi.h`."""
    lines = [
        "// Generated by concordia.abi; do not edit. Regenerate: python -m concordia.abi",
        "#pragma once",
        '#include "types.h"',
        "",
    ]
    for name, value in constants().items():
        camel = "k" + "".join(part.capitalize() for part in name.split("_"))
        suffix = "ull" if value > 0xFFFFFFFF else "u"
        kind = "uint64_t" if value > 0xFFFFFFFF else "uint32_t"
        lines.append(f"constexpr {kind} {camel} = {value:#x}{suffix};")
    for struct in STRUCTS:
        lines += ["", f"struct {struct.name} {{"]
        for field in struct.fields:
            array = "" if field.count == 1 else f"[{field.count}]"
            note = f"  // {field.note}" if field.note else ""
            lines.append(f"  {_C_TYPES[field.kind]} {field.name}{array};{note}")
        lines.append("};")
        lines.append(f'static_assert(sizeof({struct.name}) == {struct.size}, "{struct.name}");')
        lines.append(
            "#if !defined(__CUDACC_RTC__)  // run-time compilation of device code has no offsetof"
        )
        for name, offset in struct.offsets().items():
            lines.append(
                f'static_assert(__builtin_offsetof({struct.name}, {name}) == {offset}, "{name}");'
            )
        lines.append("#endif")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import pathlib

    (pathlib.Path(__file__).parent / "kernels" / "abi.h").write_text(header(), encoding="utf-8")
