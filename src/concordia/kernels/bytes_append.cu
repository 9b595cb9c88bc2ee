// Handler: appends bytes that the caller put into the ring's arena. Task: source, source_bytes,
// record_kind, token range (only carried).
#include "journal.h"

HANDLER {
  const Task* task = &call->task;
  const uint64_t offset = task->source - reinterpret_cast<uint64_t>(call->arena),
                 bytes = task->source_bytes;
  if (offset % 16 != 0 || offset > call->arena_bytes || bytes > call->arena_bytes - offset)
    return refuse(call, lane, kStatusBadTask);
  uint8_t* place = reserve_record(call, lane, bytes);
  if (place == nullptr) return;
  const RecordNames names = {task->record_kind, task->token_start, task->token_end};
  if constexpr (kDeviceShape) {
    stream_payload(call, lane, bytes, place, MemoryWords{call->arena + offset, bytes});
    return commit_streamed(call, lane, names, bytes);
  }
  copy_together(call, lane, place, call->arena + offset, bytes);
  grid_sync(call);
  hash_payload(call, lane, place, bytes);
  commit_record(call, lane, names, bytes);
}
