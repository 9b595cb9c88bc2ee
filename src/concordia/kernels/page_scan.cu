// Handler: appends pages of an opaque region as KIND_PAGE records, many pages each. Task: with
// block ids these pages, whatever their hash (a write set); with arg 1 those that a burst has
// noted; else the pages of [token_start, token_end) whose hash differs from the table's. Answers
// how many pages were appended.
//
// A page's table entry is the hash of the bytes that were committed, taken on their way into the
// journal: a page may change while it is scanned, and is then found again. A page of one leaf has
// the leaf's digest, a larger one the root over its leaves' digests.
//
// payload:  one leaf of page numbers, u32, zero-padded | page | page | ... The record's tokens are
// [0, number of pages).
#include "journal.h"
#include "page_hash.h"

constexpr uint64_t kPageBytes = PAGE_BYTES, kPageLeaves = kPageBytes / kLeafBytes;
static_assert(kPageBytes % kLeafBytes == 0, "a page is whole leaves");
constexpr uint64_t kRootBytes = root_bytes(kPageLeaves);
constexpr uint64_t kNumbersMost = kLeafBytes / 4;

// The words of a record's pages.
struct PageWords {
  static constexpr bool kHasStretches = true, kIsLinear = true;  // a leaf lies in one page
  const uint8_t* base_ptr;
  const uint32_t* pages;
  FUNCTION_MEMBER const uint8_t* address(uint64_t offset) const {
    return base_ptr + pages[offset / kPageBytes] * kPageBytes + offset % kPageBytes;
  }
  FUNCTION_MEMBER uint64_t operator()(uint64_t offset) const {
    return *reinterpret_cast<const uint64_t*>(address(offset));
  }
};

// Eight bytes of the leaf of page numbers.
FUNCTION uint64_t number_word(const uint32_t* found, uint64_t count, uint64_t offset) {
  const uint64_t i = offset / 4;
  const uint64_t low = i < count ? found[i] : 0, high = i + 1 < count ? found[i + 1] : 0;
  return low | high << 32;
}

// One team: the hash of a page of several leaves from digests that others' follow at once, which a
// CPU's padding must leave alone.
FUNCTION void hash_digests(uint8_t* digests_ptr, uint64_t* hash_ptr) {
#if CONCORDIA_CUDA
  hash_root(digests_ptr, kPageLeaves, hash_ptr);
#else
  alignas(64) uint8_t padded[kRootBytes];
  copy_bytes(padded, digests_ptr, kPageLeaves * 16);
  hash_root(padded, kPageLeaves, hash_ptr);
#endif
}

// All lanes: notes the pages of one leaf each in [first, end) that differ from the table.
FUNCTION void find_leaves(const Call* call, uint64_t lane, const Pages& pages, uint64_t first,
                          uint64_t end) {
#if CONCORDIA_CUDA
  find_dirty([=] { return call->region; }, first, end, lane / kTeamLanes,
             call->lanes / kTeamLanes);
#else
  for_each_lane(call, lane, end - first, [=](uint64_t i) {
    uint64_t hash[2];
    const uint64_t* known = pages.table + 2 * (first + i);
    hash_long(pages.base_ptr + (first + i) * kPageBytes, kPageBytes, hash);
    if (hash[0] != known[0] || hash[1] != known[1]) note_page(pages, first + i);
  });
#endif
}

// All lanes: the same for pages of several leaves, as many at once as there is room for their
// digests.
FUNCTION void find_roots(Call* call, uint64_t lane, const Pages& pages, uint64_t first,
                         uint64_t end) {
  uint8_t* digests = call->digests;
  const auto digest = [=](uint64_t leaf) {
    return reinterpret_cast<uint64_t*>(digests + leaf / kPageLeaves * kRootBytes +
                                       leaf % kPageLeaves * 16);
  };
  const uint64_t batch = call->digest_bytes / kRootBytes;
#pragma unroll 1
  for (; first < end; first += batch) {
    const uint64_t count = smaller(batch, end - first), bytes = count * kPageBytes;
    const uint8_t* start_ptr = pages.base_ptr + first * kPageBytes;
    if constexpr (kDeviceShape)
      stream_whole_leaves(call, lane, bytes, nullptr, MemoryWords{start_ptr, bytes}, digest);
    else hash_leaves(call, lane, start_ptr, bytes, digest);
    grid_sync(call);
    for (uint64_t i = lane / kTeamLanes; i < count; i += call->lanes / kTeamLanes) {
      // over the digests, which are read before
      uint64_t* hash = reinterpret_cast<uint64_t*>(digests + i * kRootBytes);
      hash_root(digests + i * kRootBytes, kPageLeaves, hash);
      team_sync();
      const uint64_t* known = pages.table + 2 * (first + i);
      if (team_lane() == 0 && (hash[0] != known[0] || hash[1] != known[1]))
        note_page(pages, first + i);
    }
    grid_sync(call);
  }
}

// Leading team: checks the pages that the task names, and refuses it when one is not the region's.
// Those that did not come along with the task are copied to where scans put theirs.
FUNCTION void take_named(Call* call, const Pages& pages, const uint32_t* named) {
  const Task* task = &call->task;
  const uint64_t count = task->block_count, page_count = call->region->block_count;
  bool is_bad = count > page_count || task->blocks % 4 != 0 || task->blocks > call->arena_bytes ||
                count * 4 > call->arena_bytes - task->blocks;
  if (!is_bad) {
    const uint32_t* arena = reinterpret_cast<const uint32_t*>(call->arena + task->blocks);
    for (uint64_t i = team_lane(); i < count; i += kTeamLanes) {
      const uint32_t page = named == pages.found ? arena[i] : named[i];
      if (page >= page_count) is_bad = true;
      if (named == pages.found) pages.found[i] = page;
    }
  }
  if (any_in_team(is_bad)) refuse(call, team_lane(), kStatusBadTask);
}

// One of `teams` teams: what the table says of pages that were just appended, from the digests of
// the leaves behind the numbers' leaf.
FUNCTION void learn_pages(const Call* call, const Pages& pages, const uint32_t* found,
                          uint64_t count, uint64_t team, uint64_t teams) {
  for (uint64_t i = team; i < count; i += teams) {
    uint8_t* digests_ptr = call->digests + (1 + i * kPageLeaves) * 16;
    uint64_t* entry = pages.table + 2 * found[i];
    if constexpr (kPageLeaves > 1) hash_digests(digests_ptr, entry);
    else if (team_lane() == 0)
      entry[0] = reinterpret_cast<const uint64_t*>(digests_ptr)[0],
      entry[1] = reinterpret_cast<const uint64_t*>(digests_ptr)[1];
  }
}

// All lanes, device shape: payload and digests of one record. The last team has the numbers.
FUNCTION void stream_pages(Call* call, uint64_t lane, const PageWords& words, uint64_t count,
                           uint8_t* place) {
  uint64_t* digests = reinterpret_cast<uint64_t*>(call->digests);
  const uint32_t* found = words.pages;
  stream_whole_leaves(call, lane, count * kPageBytes, place + kLeafBytes, words,
                      [=](uint64_t leaf) { return digests + 2 * (1 + leaf); });
  if (lane / kTeamLanes != call->lanes / kTeamLanes - 1) return;
  hash_words(
      kLeafBytes, [=](uint32_t offset) { return number_word(found, count, offset); },
      [=](uint32_t offset, uint64_t word) {
        *reinterpret_cast<uint64_t*>(place + offset) = word;
      },
      digests);
}

// All lanes: one record of `count` pages; false when the journal refuses it, or the task was.
FUNCTION bool append_pages(Call* call, uint64_t lane, const Pages& pages, const uint32_t* found,
                           uint64_t count) {
  const uint64_t bytes = kLeafBytes + count * kPageBytes;
  uint8_t* place = reserve_record(call, lane, bytes);
  if (place == nullptr) return false;
  const RecordNames names = {kKindPage, 0, count};
  const PageWords words = {pages.base_ptr, found};
  const uint64_t team = lane / kTeamLanes, teams = call->lanes / kTeamLanes;
  if constexpr (kDeviceShape) {
    stream_pages(call, lane, words, count, place);
    grid_sync(call);
    // The leading team commits; what the others do meanwhile is not waited for with the answer.
    if (team == 0) commit_digests(call, lane, names, bytes);
    if (teams == 1) learn_pages(call, pages, found, count, 0, 1);
    else if (team != 0) learn_pages(call, pages, found, count, team - 1, teams - 1);
  } else {
    for_each_lane(call, lane, kLeafBytes / 8, [=](uint64_t i) {
      reinterpret_cast<uint64_t*>(place)[i] = number_word(found, count, 8 * i);
    });
    for_each_lane(call, lane, bytes / kLeafBytes - 1, [=](uint64_t leaf) {
      const uint64_t offset = leaf * kLeafBytes;
      copy_bytes(place + kLeafBytes + offset, words.address(offset), kLeafBytes);
    });
    grid_sync(call);
    hash_payload(call, lane, place, bytes);
    commit_record(call, lane, names, bytes);
    learn_pages(call, pages, found, count, team, teams);
  }
  if (lane == 0) call->result += count;
  return true;
}

// Pages that fit one record: its segment, its list of numbers, the digests of its leaves.
FUNCTION uint64_t pages_most(const Call* call) {
  const uint64_t room = call->journal->segment_bytes - sizeof(SegmentHeader) - record_bytes(0);
  const uint64_t leaves = smaller(room / kLeafBytes, call->digest_bytes / 16);
  return leaves < 1 + kPageLeaves ? 0 : smaller(kNumbersMost, (leaves - 1) / kPageLeaves);
}

// All lanes: as many records as it takes.
FUNCTION void append_all(Call* call, uint64_t lane, const Pages& pages, const uint32_t* found,
                         uint64_t count) {
  const uint64_t most = pages_most(call);
  if (most == 0) return refuse(call, lane, kStatusTooLarge);
  for (uint64_t first = 0; first < count; first += most)
    if (!append_pages(call, lane, pages, found + first, smaller(most, count - first))) return;
}

HANDLER {
  const Task* task = &call->task;
  const Region* region = call->region;
  const bool is_named = task->block_count != 0;
  const bool is_range = task->token_start < task->token_end && region != nullptr &&
                        task->token_end <= region->block_count;
  if (region == nullptr || region->page_hashes == 0 || !(is_named || is_range))
    return refuse(call, lane, kStatusBadTask);
  const Pages pages = pages_of(region);
  if (is_named) {
    // Few came along with the task, and lie close by.
    const bool are_near = task->block_count <= call->near_id_count;
    const uint32_t* named = are_near ? call->near_ids : pages.found;
    if (is_leading_team(lane)) take_named(call, pages, named);
    return append_all(call, lane, pages, named, task->block_count);
  }
  if (task->arg != kPagesNoted) {
    if (lane == 0) *pages.found_count = 0;
    grid_sync(call);
    if constexpr (kPageLeaves == 1)
      find_leaves(call, lane, pages, task->token_start, task->token_end);
    else find_roots(call, lane, pages, task->token_start, task->token_end);
  }
  grid_sync(call);
  const Pages again = pages_of(call->region);  // not kept over the scan, which wants the registers
  append_all(call, lane, again, again.found, load<kRelaxed, kDevice>(again.found_count));
}
