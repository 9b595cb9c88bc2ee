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
constexpr uint32_t kLoadsAhead = 8;  // stripes of a page whose loads are under way at once
constexpr uint32_t kHalves = kLeafBytes / kStripeBytes / kLoadsAhead;

struct Digest {
  uint64_t low, high;
};

FUNCTION uint64_t mix_pair(uint64_t first, uint64_t second, uint64_t offset) {
  return mix_product(first ^ secret_at(offset), second ^ secret_at(offset + 8));
}

// Adds over the four lanes of a page.
FUNCTION uint64_t add_pairs(uint64_t value) {
  value += exchange_lanes(value, 1);
  return value + exchange_lanes(value, 2);
}

// All lanes of a warp: the hash of the page at `page_ptr`, the same for the four lanes of a page.
FUNCTION Digest hash_page(const uint8_t* page_ptr) {
  const uint32_t p = threadIdx.x % 4;
  const Wide* at = reinterpret_cast<const Wide*>(page_ptr) + p;
  const uint64_t* secret = kSecret + 2 * p;
  uint64_t a = first_sum(2 * p), b = first_sum(2 * p + 1);
#pragma unroll 1
  for (uint32_t half = 0; half < kHalves; ++half) {
    Wide data[kLoadsAhead];
#pragma unroll
    for (uint32_t k = 0; k < kLoadsAhead; ++k) data[k] = at[4 * (half * kLoadsAhead + k)];
    const uint64_t* key = secret + half % 2 * kLoadsAhead;
#pragma unroll
    for (uint32_t k = 0; k < kLoadsAhead; ++k) {
      uint64_t key_a = key[k], key_b = key[k + 1];
      if (k == kLoadsAhead - 1 && half == kHalves - 1)
        key_a = last_secret(2 * p), key_b = last_secret(2 * p + 1);
      a += keyed_product(data[k].word[0], key_a) + data[k].word[1];
      b += keyed_product(data[k].word[1], key_b) + data[k].word[0];
    }
    if (half % 2 == 1 && half != kHalves - 1) {  // a block of 16 stripes is done
      a = (a ^ a >> 47 ^ secret[16]) * kPrime32_1;
      b = (b ^ b >> 47 ^ secret[17]) * kPrime32_1;
    }
  }
  const uint64_t low = add_pairs(mix_pair(a, b, 11 + 16 * p));
  const uint64_t high = add_pairs(mix_pair(a, b, kSecretBytes - 64 - 11 + 16 * p));
  return {avalanche(low + kLeafBytes * kPrime64_1), avalanche(high + ~(kLeafBytes * kPrime64_2))};
}

// A whole warp, one of `warps`: notes the pages in [first, end) that differ from the table.
FUNCTION void find_dirty(const Pages& pages, uint64_t first, uint64_t end, uint64_t warp,
                         uint64_t warps) {
  const uint32_t t = threadIdx.x % 32;
  const bool is_judge = t % 4 == 0;
#pragma unroll 1
  for (uint64_t start = first + warp * kPagesEach; start < end; start += warps * kPagesEach) {
    const uint64_t next = start + warps * kPagesEach + t;
    if (t < kPagesEach && next < end) fetch_ahead(pages.base_ptr + next * kLeafBytes, kLeafBytes);
    const bool is_there = start + t / 4 < end;
    const uint64_t page = is_there ? start + t / 4 : end - 1;
    Wide known = {};
    if (is_judge) known = *reinterpret_cast<const Wide*>(pages.table + 2 * page);
    const Digest found = hash_page(pages.base_ptr + page * kLeafBytes);
    if (is_judge && is_there && (found.low != known.word[0] || found.high != known.word[1]))
      note_page(pages, page);
  }
}
#endif
