"""What host and executor tell each other: tasks, answers, handlers and regions, floor 1.

Owns: the layout of the ring, its slots and completions, of operators and regions. Promises: each
word has exactly one writer, named beside it; what two sides poll never shares a line. Called by
runtime/ and checkpoint/, and by device code through `kernels/abi.h`.
"""

from __future__ import annotations

from concordia.abi.structure import Field, Struct, pad

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
            note=(
                "positions that the task occupies: one, or more when its arguments need more arena"
            ),
        ),
        pad(4, "reserved"),
        Field("model_hash", "u64", note="for the record"),
    ),
)

COMPLETION = Struct(
    "Completion",
    64,
    (
        Field("publish", "u64", note="position + 1 once the others are valid (ring.h: or none is)"),
        Field("status", "u32"),
        Field("generation", "u32", note="of the operator table entry that ran"),
        Field("sequence", "u64", note="of the record that was committed"),
        Field("payload_hash", "u64", 2),
        Field("result", "u64"),
        pad(16, "reserved"),
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
        Field("head_seen", "u64", note="what a producer last read in head, or something older"),
        pad(112, "line0"),
        # line 1: the executor
        Field("head", "u64", note="positions below this are done"),
        pad(120, "line1"),
        # line 2: the launcher
        Field("launched", "u64", note="how often the executor was sent in"),
        Field("lease_ns", "u64"),
        Field("idle_ns", "u64"),
        pad(104, "line2"),
        # line 3: the executor
        Field("left", "u64", note="equals launched once that launch has left"),
        pad(120, "line3"),
        # line 4: the host
        Field("stop", "u64", note="1 asks the executor to leave at the next task boundary"),
        Field("operators", "u64", note="address of the operator table"),
        Field("generation", "u64", note="of the operator table"),
        pad(104, "line4"),
        # line 5: the executor
        Field("heartbeat", "u64", note="raised at every loop"),
        Field("generation_seen", "u64"),
        Field("done_count", "u64", note="tasks ever done"),
        Field("busy_ns", "u64", note="time spent in handlers"),
        Field("appended_bytes", "u64", note="bytes of records committed"),
        pad(88, "line5"),
        # line 6: constant after creation
        Field("slot_count", "u64", note="a power of two"),
        Field("slots", "u64", note="address of the Task slots, as the executor sees it"),
        Field("completions", "u64"),
        Field("arena", "u64"),
        Field("arena_bytes", "u64"),
        Field("completion_count", "u64", note="a power of two, several laps of the slots"),
        pad(80, "line6"),
        pad(128, "line7"),
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
        pad(32, "reserved"),
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
        pad(24, "reserved"),
    ),
)
