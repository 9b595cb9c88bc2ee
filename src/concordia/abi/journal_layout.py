"""What lies in a journal's pool and on its board, floor 1.

Owns: the layout of records, segments, streams, the board and registrations. Promises: each word has
exactly one writer, named beside it; a change raises ABI_VERSION, and a reader refuses another
version. Called by journal/, and by device code through `kernels/abi.h`.
"""

from __future__ import annotations

from concordia.abi.numbers import LENT_CAPACITY, REPLICA_CAPACITY
from concordia.abi.structure import Field, Struct, pad

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
            note=(
                "KV records: model, adapter and salt that computed the bytes, 0 if the writer "
                "does not say"
            ),
        ),
        pad(100, "reserved"),
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
        pad(180, "reserved"),
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
        pad(40, "owner_reserved"),
        # line 1: the owner writes
        Field(
            "lent_count", "u64", note="segments ever lent; entry i lies at lent[i % LENT_CAPACITY]"
        ),
        pad(120, "lent_reserved"),
        # line 2: the executor writes
        Field("taken_count", "u64", note="segments ever taken"),
        Field(
            "committed_count", "u64", note="records committed: a hint for readers, never trusted"
        ),
        Field("committed_bytes", "u64"),
        Field("dropped_count", "u64", note="records lost for want of a segment"),
        Field("segment_offset", "u64", note="first free byte of the present segment"),
        pad(88, "executor_reserved"),
        # line 3: the host thread of the writer writes (step announcements for the detector)
        Field("step_started", "u64", note="number of the step that started last, from 1"),
        Field("step_tokens", "u64", note="tokens of that step"),
        Field("step_started_ns", "u64", note="CLOCK_MONOTONIC"),
        Field("step_done", "u64", note="number of the step that ended last"),
        Field("step_done_ns", "u64"),
        Field("waiting_count", "u64", note="requests that wait to be scheduled"),
        Field("heartbeat_ns", "u64"),
        Field("unprotected_count", "u64", note="requests that lost protection in this writer"),
        pad(64, "host_reserved"),
        # line 4: the owner writes
        Field("label", "u8", 128, "writer's name, UTF-8, zero-padded"),
        # lines 5..: the owner writes an entry before it raises lent_count
        Field("lent", "u64", 2 * LENT_CAPACITY, "LentSegment entries"),
        pad(4096 - 5 * 128 - 16 * LENT_CAPACITY, "tail"),
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
        pad(4096 - 56 - 48 * REPLICA_CAPACITY, "reserved"),
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
