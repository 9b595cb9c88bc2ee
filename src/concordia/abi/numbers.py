"""The numbers that Python, device code and files agree on, floor 1.

Owns: sizes, magics, and the values of kinds, states, statuses and writers. Promises: a number never
gets another meaning; a change that an older reader would misread raises ABI_VERSION. Called by
everything that reads or writes shared memory. It does not know structures.
"""

from __future__ import annotations

from typing import Final

ABI_VERSION: Final = 2

# one cache line pair: what one side polls never shares it with what the other writes
LINE_BYTES: Final = 128
LEAF_BYTES: Final = 4096  # unit of the payload hash
IDS_PER_LEAF: Final = 16  # block ids that an executor has room for, per leaf of its stage
# the leaf digests are zero-padded to this, so that one XXH3 path serves every length
ROOT_BYTES_MIN: Final = 256

SEGMENT_MAGIC: Final = 0x31474553_434E4F43  # "CONCSEG1"
RECORD_MAGIC: Final = 0x52434E43  # "CNCR"
BOARD_MAGIC: Final = 0x44524F42_434E4F43  # "CONCBORD"
# odd, so that every (salt, sequence) gives another commit word
COMMIT_MULTIPLIER: Final = 0x9E3779B97F4A7C15

LENT_CAPACITY: Final = 64  # segments that the owner may lend ahead to one stream
STREAM_CAPACITY: Final = 256  # streams of one journal
# replicas registered at one time: active, standby and those being cleared away
REPLICA_CAPACITY: Final = 64
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
KIND_STATE: Final = 10  # host state of a checkpoint; its tokens are the range of bytes it has
KIND_CHECKPOINT: Final = 11  # this step is complete: what belongs to it (JSON)

# Tasks
TASK_NOOP: Final = 0
TASK_COMPUTE: Final = 1
TASK_CHECKPOINT: Final = 2
TASK_APPEND: Final = 3
TASK_RESTORE: Final = 4
TASK_PARITY: Final = 5
# no launch of the executor below `arg` passes it: launches can be put behind a framework's work
TASK_GATE: Final = 6

APPEND_EACH: Final = 1  # `arg` of an append of whole blocks: a record for each of them
PAGES_NOTED: Final = 1  # `arg` of a page scan whose pages a burst has found

# Status of a completed task
STATUS_OK: Final = 1
# no segment lent: the record was not written, its region is unprotected
STATUS_JOURNAL_FULL: Final = 2
STATUS_TOO_LARGE: Final = 3  # the record does not fit a segment
STATUS_HASH_MISMATCH: Final = 4  # payload read for a restore is not what its record promised
STATUS_BAD_TASK: Final = 5  # the task names what does not exist
STATUS_OWN: Final = 256  # from here on an own operator's, below 2**32

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
    "APPEND_EACH",
    "PAGES_NOTED",
)


def constants() -> dict[str, int]:
    """The named numbers that device code sees, in the order of this file, which is that of
    `kernels/abi.h`.
    """
    return {
        name: value
        for name, value in globals().items()
        if isinstance(value, int)
        and (name in _CONSTANT_NAMES or name.startswith(_CONSTANT_PREFIXES))
    }


def commit_word(salt: int, sequence: int) -> int:
    """The 8 bytes that follow a record's payload once it is committed; never 0 in practice."""
    return salt ^ ((sequence + 1) * COMMIT_MULTIPLIER & NOT_SEALED)
