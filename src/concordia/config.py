"""Settings and limits, floor 1.

Owns: every named bound of the system, with its reason beside it, and the few settings that more than one room reads. Promises: nothing
here has a side effect; sizes are bytes, times are seconds or nanoseconds as their names say. Called from everywhere above.
"""

from __future__ import annotations

import os
import pathlib
import sys
from dataclasses import dataclass
from typing import Final

# --- ring and executor
RING_SLOTS: Final = 4096  # a step of 256 requests submits at most 512 tasks: eight steps of slack
RING_ARENA_BYTES: Final = 8 << 20  # block lists and byte payloads of the tasks in flight
LEASE_NS: Final = 10_000_000  # longest that a foreign driver call can be held up by us
IDLE_NS: Final = 200_000  # a CUDA executor leaves after this much silence
WAIT_TASK_S: Final = 5.0  # a task that takes longer is a fault of the executor
WAIT_PARK_S: Final = 1.0  # a lease is 10 ms: a hundred leases without leaving is a fault

# --- journal
SEGMENT_BYTES: Final = (
    16 << 20
)  # holds the largest block record met so far (a 70B model's 16 tokens are 5 MiB) with room
SEGMENT_BYTES_MIN: Final = 1 << 20
SEGMENTS_LENT: Final = (
    4  # lent ahead per stream: at 50 GB/s over a millisecond of owner latency each
)
SEGMENT_COUNT_MIN: Final = 8
JOURNAL_BYTES_DEFAULT: Final = (
    2 << 30
)  # when nobody knows the size of the KV pool; never more than half of what is free
OWNER_POLL_S: Final = 0.01  # how often the owner refills lent segments
OWNER_LINGER_S: Final = 300.0  # how long KV outlives its router
SOCKET_MESSAGE_BYTES_MAX: Final = 64 << 20

# --- connector
RESTORE_WAIT_S: Final = (
    10.0  # a cohort that is not there by then goes on without its missing members
)
STEP_DEADLINE_MIN_S: Final = 1.0
STEP_DEADLINE_FACTOR: Final = 5.0
LOOKUP_WAIT_S: Final = (
    1.0  # a prefix looked up in the journal for longer than this is computed instead
)
LOOKUP_THREADS: Final = 2  # one may hash a large restore while the other answers small look-ups
KNOWN_KEYS_REFRESH_S: Final = 1.0  # how old the engine's picture of the journal's block keys may be
FINISH_LINGER_S: Final = (
    5.0  # a routed request's last tokens may still be on their way to the router when it ends
)
BLOCK_REUSE_WAIT_S: Final = (
    1.0  # an append that still reads a block about to be overwritten; then the engine goes first
)
IDLE_STEP_WAIT_S: Final = (
    0.002  # an engine that only waits for a restore asks again this often, instead of spinning
)
HEARTBEAT_S: Final = 0.25
PROBE_ATTEMPTS_MAX: Final = (
    64  # steps that may pass without proof before a layout stays on whole blocks
)
PROBE_PROOFS: Final = 2  # single tokens whose bytes must change exactly as predicted
REQUEST_NAME_BYTES_MAX: Final = 256  # longer names come from no router of ours

# --- serving
RECOVERY_TIMEOUT_S: Final = 120.0
REQUESTS_HELD_MAX: Final = (
    4096  # requests that wait for a replica during a failover; more are refused with 503
)
GREEDY_TEMPERATURE: Final = 1e-5  # vLLM samples greedily below this
PROMPTS_MAX: Final = 1024  # prompts of one completion request, as vLLM has it
TOKENIZER_LOAD_S: Final = 60.0  # a child imports transformers and reads one file


@dataclass(frozen=True, slots=True)
class Paths:
    """Where things lie for one user; all of it private to that user."""

    journal: pathlib.Path
    kernel_cache: pathlib.Path

    @staticmethod
    def default() -> Paths:
        """Journal on /dev/shm, compiled kernels in the user's cache folder."""
        cache = os.environ.get("CONCORDIA_CACHE") or os.environ.get("XDG_CACHE_HOME")
        root = pathlib.Path(cache) if cache else pathlib.Path.home() / ".cache"
        return Paths(
            journal=pathlib.Path("/dev/shm") / f"concordia-{os.getuid()}",
            kernel_cache=root / "concordia" / f"kernels-{sys.implementation.cache_tag}",
        )
