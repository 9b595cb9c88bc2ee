// Handler: the hash of what the region holds now for a token range, in the byte order of kv_append.
// Writes nothing.
#include "stream.h"
#include "kv.h"

HANDLER {
  check_range(call, lane);
  grid_sync(call);
  if (call->status != kStatusOk) return;
  const Range range = range_of(call);
  if (kDeviceShape ? !has_digests(call, range) : range.bytes > call->stage_bytes)
    return refuse_together(call, lane, kStatusTooLarge);
  if constexpr (kDeviceShape) {
    stream_range(call, lane, range, nullptr);
    return finish_payload(call, lane, range.bytes);
  }
  move_range<true>(call, lane, range, call->stage);
  grid_sync(call);
  hash_payload(call, lane, call->stage, range.bytes);
}
