// Handler: appends bytes that the caller put into the ring's arena. Task: source, source_bytes,
// record_kind, token range (only carried).
#include "journal.h"

HANDLER {
  const Task* task = &call->task;
  const uint8_t* payload = payload_of(call);
  const uint64_t bytes = task->source_bytes;
  if (payload == nullptr) return refuse(call, lane, kStatusBadTask);
  uint8_t* place = reserve_record(call, lane, bytes);
  if (place == nullptr) return;
  const RecordNames names = {task->record_kind, task->token_start, task->token_end};
  if constexpr (kDeviceShape) {
    stream_payload(call, lane, bytes, place, MemoryWords{payload, bytes});
    return commit_streamed(call, lane, names, bytes);
  }
  copy_together(call, lane, place, payload, bytes);
  grid_sync(call);
  hash_payload(call, lane, place, bytes);
  commit_record(call, lane, names, bytes);
}
