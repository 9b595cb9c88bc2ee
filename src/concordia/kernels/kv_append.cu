// Handler: appends the KV of a token range. Task: token range, its blocks, record_kind; arg
// kAppendEach: whole blocks, a record for each, and result counts them. Single tokens, which a step
// of decoding has of each request, are appended together with those of the tasks behind.
#include "journal.h"
#include "kv.h"

constexpr uint64_t kPayload = kLayers * kBlockBytes;
constexpr uint64_t kToken = kLayers * kTokenBytes;  // payload of one token

FUNCTION Range block_of(const Range& range, uint64_t index) {
  Range block = range;
  block.ids += index;
  block.id_count = 1;
  block.bytes = kPayload;
  return block;
}

// All lanes, device shape: streams `count` payloads of `kBytes` each from call->place on, a record's
// length apart; words(i) gives those of payload i. The first `idle` teams have no share of it.
template <uint64_t kBytes, class WordsOf>
FUNCTION void stream_group(Call* call, uint64_t lane, uint64_t count, uint32_t idle,
                           WordsOf words) {
  constexpr uint32_t kEach = (uint32_t)leaf_count(kBytes);
  uint8_t *place = call->place, *digests = call->digests;
  const uint32_t team = (uint32_t)(lane / kTeamLanes), leaves = (uint32_t)count * kEach;
  const uint32_t teams = (uint32_t)(call->lanes / kTeamLanes) - idle;
  if (team < idle) return;
#pragma unroll 1
  for (uint32_t i = team - idle; i < leaves; i += teams) {
    const uint32_t record = i / kEach, leaf = i % kEach;
    uint8_t* digest_ptr = digests + record * root_bytes(kEach) + leaf * 16;
    stream_leaf(words(record), leaf, kBytes, place + record * record_bytes(kBytes),
                reinterpret_cast<uint64_t*>(digest_ptr));
  }
}

// Blocks at once: the leading team chains headers, a microsecond each, while the others stream the
// next ones, and each such turn costs some meetings of all.
constexpr uint64_t kBlocksAtOnce = 16;
// With more teams than one CTA has the bus is full without the leading one, which only chains then.
constexpr uint64_t kTeamsFew = kTeamLanes == 1 ? 2 : 16;

// All lanes, device shape: as many blocks at once as the segment has room for; they count while the
// next ones are on their way.
FUNCTION void append_group(Call* call, uint64_t lane, const Range& range) {
  const uint32_t idle = call->lanes / kTeamLanes > kTeamsFew ? 1 : 0;
  const uint64_t at_once = smaller(kBlocksAtOnce, group_most(call, kPayload));
  Ready ready = {};
  for (uint64_t first = 0, count = 0; first < range.id_count; first += count) {
    count = reserve_behind(call, lane, kPayload, smaller(at_once, range.id_count - first), &ready);
    if (count == 0) break;
    if (is_leading_team(lane)) put_ready(call, lane, kPayload, &ready);
    stream_group<kPayload>(call, lane, count, idle, [=](uint32_t i) {
      return RegionWords<true>(call, block_of(range, first + i));
    });
    const uint64_t start = call->task.token_start + first * kBlockTokens;
    ready = make_ready(call, lane, kPayload, count, [=](uint64_t i) {
      const uint64_t at = start + i * kBlockTokens;
      return Entry{&call->task, {kKindKvBlock, at, at + kBlockTokens}};
    });
    if (lane == 0) call->result += count;
  }
  if (is_leading_team(lane)) put_ready(call, lane, kPayload, &ready);
}

FUNCTION bool is_token(const Task* task) {
  return task->record_kind == kKindKvTail && task->token_end - task->token_start == 1 &&
         task->token_start < task->token_end &&
         task->block_count == 1 && task->arg == 0;
}

// Leader: how many tasks of the group, from the first on, append one token each of a block that is
// there.
FUNCTION uint64_t count_tokens(const Call* call) {
  if (call->region == nullptr || call->region->base_count != kLayers) return 0;
  const uint64_t blocks = call->region->block_count;
  uint64_t count = 0;
  while (count < call->group_count && is_token(&call->group[count].task) &&
         call->group[count].ids[0] < blocks)
    count += 1;
  return count;
}

FUNCTION RegionWords<false> token_words(const Call* call, uint32_t index) {
  const Fetched* one = &call->group[index];
  return {call, {one->ids, 1, one->task.token_start % kBlockTokens, 1, kToken, false}};
}

// All lanes, device shape: a step's tokens of several requests at once. A record is of one request
// alone; what they share is the way over the bus.
FUNCTION void append_tokens(Call* call, uint64_t lane) {
  uint64_t most = 0;
  if (lane == 0) {
    most = smaller(count_tokens(call), group_most(call, kToken));
    if (most == 0) refuse(call, lane, kStatusBadTask);
  }
  const uint64_t count = reserve_records(call, lane, kToken, most);
  if (count == 0) return;
  stream_group<kToken>(call, lane, count, 0, [=](uint32_t i) { return token_words(call, i); });
  commit_group(call, lane, kToken, count, [=](uint64_t i) {
    const Task* task = &call->group[i].task;
    return Entry{task, {kKindKvTail, task->token_start, task->token_end}};
  });
  if (lane == 0) call->group_done = count;
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
  if (kDeviceShape && call->near_id_count != 0 && is_token(&call->task))
    return append_tokens(call, lane);
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
