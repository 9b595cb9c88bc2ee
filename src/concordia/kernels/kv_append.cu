// Handler: appends the KV of a token range as one record. Task: token range, its blocks, record_kind.
#include "journal.h"
#include "kv.h"

HANDLER {
  if (!check_range(call, lane)) return;
  const Range range = range_of(call);
  uint8_t* place = reserve_record(call, lane, range.bytes);
  if (place == nullptr) return;
  uint8_t* staged = staging_place(call, place);
  move_range<true>(call, lane, range, staged);
  grid_sync(call);
  hash_payload(call, lane, staged, range.bytes);
  const RecordNames names = {call->task.record_kind, call->task.token_start, call->task.token_end};
  commit_record(call, lane, names, staged, range.bytes);
}
