// Handler: the hash of what the region holds now for a token range, in the byte order of kv_append. Writes nothing.
#include "hash.h"
#include "kv.h"

HANDLER {
  if (!check_range(call, lane)) return;
  const Range range = range_of(call);
  if (range.bytes > call->stage_bytes) return refuse(call, lane, kStatusTooLarge);
  move_range<true>(call, lane, range, call->stage);
  grid_sync(call);
  hash_payload(call, lane, call->stage, range.bytes);
}
