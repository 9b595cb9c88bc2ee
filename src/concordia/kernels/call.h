// One call of a handler: what it is given, who runs it, what it answers.
//
// Owns: Call, the lanes and their barriers. Promises: all lanes of an executor enter a handler
// together, see the same Call, and leave together; lane 0 (the leader) alone writes Call, and the
// others read it after a grid_sync. Every way out of a handler must be taken by all lanes alike.
// Called by executor.cu and by every handler. Does not touch ring or journal.
#pragma once
#include "portable.h"

struct Journal;

struct Barrier {
  uint64_t arrived;
  uint64_t pad[15];  // waiting lanes poll `phase`: keep it off the line that arriving lanes write
  uint64_t phase;
  uint64_t pad2[15];
};

// A task as it was fetched, with its first block ids.
constexpr uint64_t kFetchedMost = 8, kNearIds = 32;
struct Fetched {
  Task task;
  uint64_t mark;  // position + 1 when it is there
  alignas(16) uint32_t ids[kNearIds];
};

struct Call {
  Task task;  // the leader's copy of the slot
  const Operator* op;
  const Region* region;
  const uint8_t* arena;
  uint64_t arena_bytes;
  Journal* journal;
  // payload before it is verified or crosses the bus; stage_bytes is a multiple of kLeafBytes
  uint8_t* stage;
  uint64_t stage_bytes;
  uint32_t* ids;  // device shape: the task's block ids
  uint64_t id_capacity;
  uint8_t* digests;  // two u64 per leaf, then zeroes up to the length that the root hash wants
  uint64_t digest_bytes;
  uint64_t lanes;
  // What answers the tasks before: stored after the next fence, whoever needs that first.
  uint8_t* completions;
  uint64_t completion_mask;
  uint64_t answer_first, answer_count;  // positions; a count of 0: nothing waits
  uint64_t* head_word;
  uint64_t head_value;
  // The task at hand, and appends behind it that name the same operator: a handler may run as many
  // of them together as it likes.
  const Fetched* group;
  uint64_t group_count;
  const uint32_t* near_ids;  // the task's first ids, if they came along with the task
  uint64_t near_id_count;
  // A handler's working words.
  uint8_t* place;  // where the reserved record's payload goes; 0 where none was to be had
  uint64_t place_count;  // records of that size that are reserved there
  uint64_t scratch[8];
  // Its answer.
  uint64_t status;
  uint64_t sequence;
  uint64_t payload_hash[2];
  uint64_t result;
  // More than 1: so many of the group are done, all of them well, and their records end with
  // `sequence`.
  uint64_t group_done;
  uint64_t group_hash[kFetchedMost][2];
  alignas(128) RecordHeader header;  // the record being committed
  alignas(128) Barrier barrier;
};

typedef void (*HandlerFunction)(Call* call, uint64_t lane);

// A handler is a file that includes this one and defines HANDLER { ... } once. The loader looks for
// these two names.
#if CONCORDIA_CUDA
#define HANDLER                                                                   \
  extern "C" __device__ void concordia_handler(Call* call, uint64_t lane);        \
  extern "C" __device__ const uint64_t concordia_handler_abi = kAbiVersion;       \
  extern "C" __device__ HandlerFunction const concordia_handler_pointer = concordia_handler; \
  extern "C" __device__ void concordia_handler(Call* call, uint64_t lane)
#else
#define HANDLER                                                                    \
  extern "C" __attribute__((visibility("default"), used)) const uint64_t                  \
      concordia_handler_abi = kAbiVersion;                                                \
  EXPORT void concordia_handler(Call* call, uint64_t lane)
#endif

#if CONCORDIA_CUDA
// All lanes of all CTAs. The add releases what this CTA wrote (its lanes came through the CTA's
// barrier) and the poll acquires what the other CTAs wrote; both at device scope, for no other
// processor takes part.
FUNCTION void grid_sync(Call* call) {
  __syncthreads();
  if (gridDim.x == 1) return;
  if (threadIdx.x == 0) {
    Barrier* barrier = &call->barrier;
    const uint64_t phase = load<kRelaxed, kDevice>(&barrier->phase);
    if (add_device(&barrier->arrived, 1) + 1 == gridDim.x) {
      store<kRelaxed, kDevice>(&barrier->arrived, 0);
      store<kRelease, kDevice>(&barrier->phase, phase + 1);
    } else {
      while (load<kAcquire, kDevice>(&barrier->phase) == phase) {
      }
    }
  }
  __syncthreads();
}
#else
FUNCTION void grid_sync(Call* call) {
  if (call->lanes == 1) return;
  Barrier* barrier = &call->barrier;
  const uint64_t phase = load<kRelaxed, kDevice>(&barrier->phase);
  if (add_device(&barrier->arrived, 1) + 1 == call->lanes) {
    store<kRelaxed, kDevice>(&barrier->arrived, 0);
    store<kRelease, kDevice>(&barrier->phase, phase + 1);  // pairs with the acquire below
    return;
  }
  // more lanes than cores must not spin each other out
  while (load<kAcquire, kDevice>(&barrier->phase) == phase) yield_lane();
}
#endif

// Runs body(i) for every i below count, spread over all lanes: neighbours on the GPU, so that a
// warp's accesses are one; a stretch each on the CPU, so that two lanes never share a cache line
// but at the seams.
template <class Body>
FUNCTION void for_each_lane(const Call* call, uint64_t lane, uint64_t count, Body body) {
#if CONCORDIA_CUDA
  for (uint64_t i = lane; i < count; i += call->lanes) body(i);
#else
  const uint64_t share = (count + call->lanes - 1) / call->lanes;
  const uint64_t end = smaller(count, share * (lane + 1));
  for (uint64_t i = share * lane; i < end; ++i) body(i);
#endif
}

// Ends a handler: every lane returns what this returns. Lane 0 notes the status, and the first one
// noted stays.
FUNCTION void refuse(Call* call, uint64_t lane, uint64_t status) {
  // volatile: a compiler that reads the word ahead reads it in all lanes, beside the leader's store
  volatile uint64_t* noted = &call->status;
  if (lane == 0 && *noted == kStatusOk) *noted = status;
}

// All lanes together: the same where another lane may still be looking at call->status.
FUNCTION void refuse_together(Call* call, uint64_t lane, uint64_t status) {
  grid_sync(call);
  refuse(call, lane, status);
}

// The bytes that came along with the task, in the ring's arena, at a multiple of 16; null when it
// names none, or others.
FUNCTION const uint8_t* payload_of(const Call* call) {
  const uint64_t offset = call->task.source - reinterpret_cast<uint64_t>(call->arena),
                 bytes = call->task.source_bytes;
  const bool is_there =
      offset % 16 == 0 && offset <= call->arena_bytes && bytes <= call->arena_bytes - offset;
  return is_there ? call->arena + offset : nullptr;
}

// Any lane: adds to the answer, which is 0 when a task starts.
FUNCTION void add_result(Call* call, uint64_t value) { add_anywhere(&call->result, value); }

// Copies within one lane.
FUNCTION void copy_bytes(uint8_t* target_ptr, const uint8_t* source_ptr, uint64_t bytes) {
#if CONCORDIA_CUDA
  for (uint64_t i = 0; i < bytes; ++i) target_ptr[i] = source_ptr[i];
#else
  memcpy(target_ptr, source_ptr, bytes);
#endif
}

FUNCTION void zero_bytes(uint8_t* target_ptr, uint64_t bytes) {
#if CONCORDIA_CUDA
  for (uint64_t i = 0; i < bytes; ++i) target_ptr[i] = 0;
#else
  memset(target_ptr, 0, bytes);
#endif
}

FUNCTION void zero_words(uint64_t* target_ptr, uint64_t words) {
  for (uint64_t i = 0; i < words; ++i) target_ptr[i] = 0;
}

// All lanes of a CPU copy one stretch.
FUNCTION void copy_together(const Call* call, uint64_t lane, uint8_t* target_ptr,
                            const uint8_t* source_ptr, uint64_t bytes) {
  const uint64_t share = align_up((bytes + call->lanes - 1) / call->lanes, kLineBytes);
  const uint64_t start = smaller(bytes, share * lane);
  copy_bytes(target_ptr + start, source_ptr + start, smaller(bytes, start + share) - start);
}
