// Handler: finds the pages of an opaque region that changed since they were last committed, by hash, and appends each as a KIND_PAGE
// record with token_start = page. Task: pages [token_start, token_end). Answers the number of pages appended. A page's table entry is the
// hash of the bytes that were committed (the staged ones, hashed again: a page may change while it is scanned), so nothing is missed.
#include "journal.h"

constexpr uint64_t kPageBytes = PAGE_BYTES, kPageLeaves = kPageBytes / kLeafBytes;
static_assert(kPageBytes % kLeafBytes == 0, "a page is whole leaves");
constexpr uint64_t kRootBytes = root_bytes(kPageLeaves);

// All lanes: hash of every page of a batch, then marks[i] = page i differs from the table.
FUNCTION void mark_dirty(Call* call, uint64_t lane, const uint8_t* first_page_ptr, uint64_t pages, const uint64_t* table) {
  uint8_t* digests = call->digests;
  const auto digest = [=](uint64_t leaf) {
    return reinterpret_cast<uint64_t*>(digests + leaf / kPageLeaves * kRootBytes + leaf % kPageLeaves * 16);
  };
  const uint64_t bytes = pages * kPageBytes;
  if constexpr (kDeviceShape) stream_leaves(call, lane, bytes, nullptr, MemoryWords{first_page_ptr, bytes}, digest);
  else hash_leaves(call, lane, first_page_ptr, bytes, digest);
  grid_sync(call);
  for (uint64_t page = lane / kTeamLanes; page < pages; page += call->lanes / kTeamLanes) {
    uint8_t* root = digests + page * kRootBytes;
    uint64_t* hash = reinterpret_cast<uint64_t*>(root);  // over the digests, which are read before
    hash_root(root, kPageLeaves, hash);
    team_sync();
    if (team_lane() == 0) call->marks[page] = hash[0] != table[2 * page] || hash[1] != table[2 * page + 1];
  }
  grid_sync(call);
}

// All lanes: appends one page; false when the journal refuses it.
FUNCTION bool append_page(Call* call, uint64_t lane, const uint8_t* page_ptr, uint64_t page, uint64_t* entry_ptr) {
  uint8_t* place = reserve_record(call, lane, kPageBytes);
  if (place == nullptr) return false;
  const RecordNames names = {kKindPage, page, page + 1};
  if constexpr (kDeviceShape) {
    stream_payload(call, lane, kPageBytes, place, MemoryWords{page_ptr, kPageBytes});
    commit_streamed(call, lane, names, kPageBytes);
  } else {
    copy_together(call, lane, place, page_ptr, kPageBytes);
    grid_sync(call);
    hash_payload(call, lane, place, kPageBytes);
    commit_record(call, lane, names, kPageBytes);
  }
  if (lane == 0) {
    entry_ptr[0] = call->payload_hash[0];
    entry_ptr[1] = call->payload_hash[1];
    call->result += 1;
  }
  return true;
}

HANDLER {
  const Task* task = &call->task;
  const Region* region = call->region;
  if (region == nullptr || region->page_hashes == 0 || task->token_start >= task->token_end || task->token_end > region->block_count)
    return refuse(call, lane, kStatusBadTask);
  const uint8_t* base = reinterpret_cast<const uint8_t*>(*reinterpret_cast<const uint64_t*>(region->bases));
  uint64_t* table = reinterpret_cast<uint64_t*>(region->page_hashes);
  // A batch's digests and accumulators fit the scratch that one payload of stage_bytes has.
  const uint64_t batch = smaller(call->mark_count, smaller(call->stage_bytes / kPageBytes, call->digest_bytes / kRootBytes));
  if (batch == 0) return refuse(call, lane, kStatusTooLarge);
  const uint64_t end = task->token_end;
  for (uint64_t first = task->token_start; first < end; first += batch) {
    const uint64_t pages = smaller(batch, end - first);
    mark_dirty(call, lane, base + first * kPageBytes, pages, table + 2 * first);
    for (uint64_t i = 0; i < pages; ++i)
      if (call->marks[i] && !append_page(call, lane, base + (first + i) * kPageBytes, first + i, table + 2 * (first + i))) return;
    grid_sync(call);
  }
}
