// Handler: appends the KV of a token range as one record. Task: token range, its blocks,
// record_kind.
#include "journal.h"
#include "kv.h"

HANDLER {
  check_range(call, lane);
  const Range range = range_of(call);
  uint8_t* place = reserve_record(call, lane, range.bytes);
  if (place == nullptr) return;
  const RecordNames names = {call->task.record_kind, call->task.token_start, call->task.token_end};
  if constexpr (kDeviceShape) {
    stream_range(call, lane, range, place);
    return commit_streamed(call, lane, names, range.bytes);
  }
  move_range<true>(call, lane, range, place);
  grid_sync(call);
  hash_payload(call, lane, place, range.bytes);
  commit_record(call, lane, names, range.bytes);
}
