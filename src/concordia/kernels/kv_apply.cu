// Handler: writes a record's payload back into the region, if its hash is task.key. What is hashed
// is the staged copy that is then written, so that nothing can change in between; a GPU, whose stage
// is small, reads larger payloads twice, and what is then in the region is kv_hash's to tell. Task:
// range and blocks as in kv_append, source and source_bytes, key = expected hash.
#include "journal.h"
#include "kv.h"

HANDLER {
  check_range(call, lane);
  grid_sync(call);
  if (call->status != kStatusOk) return;
  const Range range = range_of(call);
  const Task* task = &call->task;
  const Journal* journal = call->journal;
  const bool is_ours = is_within(task->source, range.bytes, journal->pool, journal->pool_bytes) ||
                       is_within(task->source, range.bytes, call->arena, call->arena_bytes);
  if (range.bytes != task->source_bytes || task->source % 16 != 0 || !is_ours)
    return refuse_together(call, lane, kStatusBadTask);
  const bool is_staged = range.bytes <= call->stage_bytes;
  if (kDeviceShape ? !has_digests(call, range) : !is_staged)
    return refuse_together(call, lane, kStatusTooLarge);
  const uint8_t* source = reinterpret_cast<const uint8_t*>(task->source);
  if constexpr (kDeviceShape) {
    stream_payload(call, lane, range.bytes, is_staged ? call->stage : nullptr,
                   MemoryWords{source, range.bytes});
    finish_payload(call, lane, range.bytes);
  } else {
    copy_together(call, lane, call->stage, source, range.bytes);
    grid_sync(call);
    hash_payload(call, lane, call->stage, range.bytes);
  }
  if (call->payload_hash[0] != task->key[0] || call->payload_hash[1] != task->key[1])
    return refuse(call, lane, kStatusHashMismatch);
  if constexpr (kDeviceShape) scatter_range(call, lane, range, is_staged ? call->stage : source);
  else move_range<false>(call, lane, range, call->stage);
}
