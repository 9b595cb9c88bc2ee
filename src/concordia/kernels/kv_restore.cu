// A kernel of its own: writes the payloads of many records back into a region, a CTA each, and
// hashes what the region holds then. GPU only.
//
// Owns: nothing; answers[i] becomes the status of tasks[i]: kStatusHashMismatch where the region's
// bytes are not those that the record promised, and then those blocks hold nothing to go on from.
// Promises: it reads the pool only within its bounds, writes only the ranges that its tasks name,
// and waits for nobody. Tasks as of kv_apply; no two of one launch may name the same block. Launched
// by checkpoint/restore_burst.py in the executor's stream, between two stays.
#include "kv.h"

// All lanes of the CTA: the status of the task in call->task.
FUNCTION uint64_t restore(Call* call, uint64_t lane, const uint8_t* pool_ptr, uint64_t pool_bytes) {
  check_range(call, lane);
  __syncthreads();
  const Task* task = &call->task;
  const Range range = range_of(call);
  if (call->status != kStatusOk) return call->status;
  if (range.bytes != task->source_bytes || task->source % 16 != 0 ||
      !has_digests(call, range) ||
      !is_within(task->source, range.bytes, pool_ptr, pool_bytes))
    return kStatusBadTask;
  scatter_range(call, lane, range, reinterpret_cast<const uint8_t*>(task->source));
  __syncthreads();  // what the CTA's other lanes wrote is read now
  stream_range(call, lane, range, nullptr);
  __syncthreads();
  if (is_leading_team(lane)) hash_root(call->digests, leaf_count(range.bytes), call->payload_hash);
  __syncthreads();
  const bool is_same =
      call->payload_hash[0] == task->key[0] && call->payload_hash[1] == task->key[1];
  return is_same ? kStatusOk : kStatusHashMismatch;
}

extern "C" __global__ void __launch_bounds__(512)
    concordia_kv_restore(const Region* region, const Task* tasks, uint64_t count, uint64_t* answers,
                         const uint8_t* arena, uint64_t arena_bytes, const uint8_t* pool_ptr,
                         uint64_t pool_bytes, uint8_t* scratch_ptr, uint64_t digest_bytes,
                         uint64_t id_capacity) {
  __shared__ Call call;
  const uint64_t lane = threadIdx.x;
  uint8_t* own_ptr = scratch_ptr + blockIdx.x * (digest_bytes + 4 * id_capacity);
  for (uint64_t i = blockIdx.x; i < count; i += gridDim.x) {
    if (lane == 0) {
      call.task = tasks[i];
      call.region = region;
      call.arena = arena;
      call.arena_bytes = arena_bytes;
      call.digests = own_ptr;
      call.digest_bytes = digest_bytes;
      call.ids = reinterpret_cast<uint32_t*>(own_ptr + digest_bytes);
      call.id_capacity = id_capacity;
      call.near_id_count = 0;
      call.lanes = blockDim.x;
      call.status = kStatusOk;
    }
    __syncthreads();
    const uint64_t status = restore(&call, lane, pool_ptr, pool_bytes);
    __syncthreads();  // everybody has read what the next task changes
    if (lane == 0) answers[i] = status;
  }
}
