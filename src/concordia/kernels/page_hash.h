// Hashes of pages of one leaf, eight by a warp, at the speed of the memory.
//
// Owns: the layout of that work. Promises: the values are XXH3-128 of each page's 4096 bytes, as
// the xxhash library gives them. Four lanes take a page, each one pair of XXH3's accumulators over
// all 64 stripes: the algorithm swaps the two words of a pair, which are 16 bytes that one load
// brings, so no lane needs another's data before the very end. GPU only. Called by page_scan.cu and
// page_burst.cu.
//
// lane = 4 * page + p: words 2p and 2p + 1 of every stripe of 64 bytes
#pragma once
#include "page_table.h"
#include "stream.h"

#if CONCORDIA_CUDA
constexpr uint32_t kPagesEach = 8;  // of a warp
constexpr uint32_t kHalf = kStripesPerBlock / 2;  // stripes whose loads are under way at once
constexpr uint32_t kBlocks = kLeafBytes / kStripeBytes / kStripesPerBlock;

struct Digest {
  uint64_t low, high;
};

// What a lane needs of the secret, in registers: reading it again for each page would take the
// loads' turns.
struct PageKeys {
  uint64_t word[kStripesPerBlock + 1];  // stripe i has words i and i + 1
  Pair last;
};
FUNCTION PageKeys page_keys() {
  const uint32_t p = threadIdx.x % 4;
  PageKeys keys;
#pragma unroll
  for (uint32_t i = 0; i <= kStripesPerBlock; ++i) keys.word[i] = kSecret[2 * p + i];
  keys.last = last_keys(team_place());  // a team's lanes have the same pairs
  return keys;
}

FUNCTION uint64_t mix_pair(Pair sum, uint64_t offset) {
  return mix_product(sum.a ^ secret_at(offset), sum.b ^ secret_at(offset + 8));
}

// Adds over the four lanes of a page.
FUNCTION uint64_t add_pairs(uint64_t value) {
  value += exchange_lanes(value, 1);
  return value + exchange_lanes(value, 2);
}

FUNCTION void load_half(const Wide* from, Wide* data) {
#pragma unroll
  for (uint32_t k = 0; k < kHalf; ++k) data[k] = from[4 * k];
}

FUNCTION void add_half(const PageKeys& keys, uint32_t first, const Wide* data, bool is_end,
                       Pair* sum) {
#pragma unroll
  for (uint32_t k = 0; k < kHalf; ++k) {
    const Pair usual = {keys.word[first + k], keys.word[first + k + 1]};
    add_words(sum, data[k], is_end && k == kHalf - 1 ? keys.last : usual);
  }
}

// All lanes of a warp: the hash of the page at `at`, the same for the four lanes of a page. `near`
// holds the page's first half block, and then that of the page at `next`: loads never pause.
FUNCTION Digest hash_page(const PageKeys& keys, const Wide* at, const Wide* next, Wide* near) {
  const uint32_t p = threadIdx.x % 4;
  Pair sum = {first_sum(2 * p), first_sum(2 * p + 1)};
#pragma unroll 1
  for (uint32_t block = 0; block < kBlocks; ++block) {
    const bool is_end = block == kBlocks - 1;
    Wide far[kHalf];
    load_half(at + 4 * kHalf, far);
    add_half(keys, 0, near, false, &sum);
    at = is_end ? next : at + 4 * kStripesPerBlock;
    load_half(at, near);
    add_half(keys, kHalf, far, is_end, &sum);
    if (is_end) break;
    sum.a = scrambled(sum.a, kSecret[16 + 2 * p]);
    sum.b = scrambled(sum.b, kSecret[17 + 2 * p]);
  }
  const uint64_t low = add_pairs(mix_pair(sum, 11 + 16 * p));
  const uint64_t high = add_pairs(mix_pair(sum, kSecretBytes - 64 - 11 + 16 * p));
  return {avalanche(low + kLeafBytes * kPrime64_1), avalanche(high + ~(kLeafBytes * kPrime64_2))};
}

// A whole warp, one of `warps`: notes the pages in [first, end) that differ from the table.
FUNCTION void find_dirty(const Pages& pages, uint64_t first, uint64_t end, uint64_t warp,
                         uint64_t warps) {
  const uint32_t t = threadIdx.x % 32;
  const bool is_judge = t % 4 == 0;
  const uint64_t stride = warps * kPagesEach;
  const auto place = [=](uint64_t page) {
    const uint64_t there = page < end ? page : end - 1;
    return reinterpret_cast<const Wide*>(pages.base_ptr + there * kLeafBytes) + t % 4;
  };
  uint64_t page = first + warp * kPagesEach + t / 4;
  const PageKeys keys = page_keys();
  Wide near[kHalf];
  load_half(place(page), near);
#pragma unroll 1
  for (uint64_t start = first + warp * kPagesEach; start < end; start += stride, page += stride) {
    const bool is_there = page < end;
    Wide known = {};
    if (is_judge && is_there) known = *reinterpret_cast<const Wide*>(pages.table + 2 * page);
    const Digest found = hash_page(keys, place(page), place(page + stride), near);
    if (is_judge && is_there && (found.low != known.word[0] || found.high != known.word[1]))
      note_page(pages, page);
  }
}
#endif
