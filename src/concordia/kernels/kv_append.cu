// Handler: appends the KV of a token range. Task: token range, its blocks, record_kind; arg
// kAppendEach: whole blocks, a record for each, and result counts them.
#include "journal.h"
#include "kv.h"

constexpr uint64_t kPayload = kLayers * kBlockBytes, kLeaves = leaf_count(kPayload);

FUNCTION Range block_of(const Range& range, uint64_t index) {
  Range block = range;
  block.ids += index;
  block.id_count = 1;
  block.bytes = kPayload;
  return block;
}

// All lanes, device shape: as many blocks at once as the segment has room for.
FUNCTION void append_group(Call* call, uint64_t lane, const Range& range) {
  constexpr uint64_t kRoot = root_bytes(kLeaves), kBytes = record_bytes(kPayload);
  const uint64_t start = call->task.token_start, teams = call->lanes / kTeamLanes;
  for (uint64_t first = 0, count = 0; first < range.id_count; first += count) {
    const uint64_t most = smaller(range.id_count - first, call->digest_bytes / kRoot);
    count = reserve_records(call, lane, kPayload, most);
    if (count == 0) return;
    uint8_t *place = call->place, *digests = call->digests;
#pragma unroll 1
    for (uint32_t i = (uint32_t)(lane / kTeamLanes); i < count * kLeaves; i += (uint32_t)teams) {
      const uint32_t record = i / (uint32_t)kLeaves, leaf = i % (uint32_t)kLeaves;
      stream_leaf(RegionWords<true>(call, block_of(range, first + record)), leaf, kPayload,
                  place + record * kBytes,
                  reinterpret_cast<uint64_t*>(digests + record * kRoot + leaf * 16));
    }
    const RecordNames names = {kKindKvBlock, start + first * kBlockTokens, 0};
    commit_group(call, lane, names, kBlockTokens, kPayload, count);
    if (lane == 0) call->result += count;
  }
}

// All lanes of a CPU: the range as one record; false when the journal refuses it.
FUNCTION bool append_range(Call* call, uint64_t lane, const Range& range, uint64_t start,
                           uint64_t end) {
  uint8_t* place = reserve_record(call, lane, range.bytes);
  if (place == nullptr) return false;
  move_range<true>(call, lane, range, place);
  grid_sync(call);
  hash_payload(call, lane, place, range.bytes);
  commit_record(call, lane, {call->task.record_kind, start, end}, range.bytes);
  return true;
}

// All lanes of a CPU: a record for each block.
FUNCTION void append_blocks(Call* call, uint64_t lane, const Range& range, uint64_t start) {
  for (uint64_t i = 0; i < range.id_count; ++i, start += kBlockTokens) {
    if (!append_range(call, lane, block_of(range, i), start, start + kBlockTokens)) return;
    if (lane == 0) call->result += 1;
  }
}

HANDLER {
  check_range(call, lane);
  const Range range = range_of(call);
  const Task* task = &call->task;
  const uint64_t start = task->token_start, end = task->token_end;
  if (task->arg == kAppendEach) {
    if (!range.is_raw || start % kBlockTokens != 0 || end % kBlockTokens != 0)
      refuse(call, lane, kStatusBadTask);
    else if constexpr (kDeviceShape) append_group(call, lane, range);
    else append_blocks(call, lane, range, start);
  } else if constexpr (kDeviceShape) {
    uint8_t* place = reserve_record(call, lane, range.bytes);
    if (place == nullptr) return;
    stream_range(call, lane, range, place);
    commit_streamed(call, lane, {task->record_kind, start, end}, range.bytes);
  } else {
    (void)append_range(call, lane, range, start, end);
  }
}
