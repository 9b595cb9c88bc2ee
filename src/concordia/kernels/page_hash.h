// Hashes of pages of one leaf, four by a warp, at the speed of the memory.
//
// Owns: the layout of that work. Promises: the values are XXH3-128 of each page's 4096 bytes, as
// the xxhash library gives them. Eight lanes take a page: four pairs of XXH3's accumulators, even
// and odd stripes of each apart, which meet once per block. An access of a warp is whole lines, and
// 8 to 16 of a lane's are under way at any time. No other load stands among them: answers come in
// order, and one from the cache would wait for all before it. GPU only. Called by page_scan.cu and
// page_burst.cu.
//
// lane = 8 * page + 4 * group + p: words 2p and 2p + 1 of stripes group, group + 2, ... of a block
#pragma once
#include "page_table.h"
#include "stream.h"

#if CONCORDIA_CUDA
constexpr uint32_t kPagesEach = 4;  // of a warp
constexpr uint32_t kPageLanes = 32 / kPagesEach, kGroups = kPageLanes / 4;
constexpr uint32_t kLoads = kStripesPerBlock / kGroups;  // of a lane, in a block
constexpr uint32_t kBlockWides = kStripesPerBlock * kStripeBytes / sizeof(Wide);
constexpr uint32_t kBlocks = kLeafBytes / kStripeBytes / kStripesPerBlock;
static_assert(kGroups == 2 && kBlocks % 2 == 0, "one exchange adds up; blocks come in twos");

// Constants of a pair of accumulators.
template <class ValueOf>
FUNCTION uint64_t choose(uint32_t p, ValueOf value) {
  const uint64_t low = p % 2 != 0 ? value(1) : value(0), high = p % 2 != 0 ? value(3) : value(2);
  return p / 2 != 0 ? high : low;
}
FUNCTION Pair page_last_keys(uint32_t p) {
  return {choose(p, [](uint32_t i) { return last_secret(2 * i); }),
          choose(p, [](uint32_t i) { return last_secret(2 * i + 1); })};
}
FUNCTION uint64_t mix_key(uint32_t p, bool is_high, uint32_t word) {
  const uint64_t low = choose(p, [=](uint32_t i) { return secret_at(11 + 16 * i + 8 * word); });
  const uint64_t high = choose(p, [=](uint32_t i) {
    return secret_at(kSecretBytes - 64 - 11 + 16 * i + 8 * word);
  });
  return is_high ? high : low;
}

// What a lane needs of the secret, in registers: in every block, and where a page begins and ends.
// The keys of its last stripe are chosen among constants each time.
struct PageKeys {
  Pair usual[kLoads];
  uint64_t scramble;  // of the accumulator that this lane has after a block
  uint64_t first;     // what that starts with
  Pair mix;
};
FUNCTION PageKeys page_keys() {
  const uint32_t p = threadIdx.x % 4, group = threadIdx.x / 4 % kGroups;
  PageKeys keys;
#pragma unroll
  for (uint32_t k = 0; k < kLoads; ++k) {
    const uint64_t* key = kSecret + 2 * p + group + kGroups * k;
    keys.usual[k] = {key[0], key[1]};
  }
  keys.scramble = kSecret[16 + 2 * p + group];
  keys.first = kept(first_sum(2 * p + group));
  keys.mix = {kept(mix_key(p, group != 0, 0)), kept(mix_key(p, group != 0, 1))};
  return keys;
}

// All lanes of a warp; the loads are asked for before anything behind this is computed: a compiler
// puts them where a register comes free, and then they wait for those before them.
FUNCTION void load_block(const Wide* from, Wide* data) {
#pragma unroll
  for (uint32_t k = 0; k < kLoads; ++k) data[k] = load_passing(from + kPageLanes * k);
  team_sync();
}

// A block's words added up, for one accumulator: even groups have the first of the pair, odd ones
// the second.
FUNCTION uint64_t add_block(const PageKeys& keys, const Wide* data, Pair last, bool is_odd) {
  Sums sums = {};
#pragma unroll
  for (uint32_t k = 0; k < kLoads; k += 2)
    add_two(&sums, data[k], keys.usual[k], data[k + 1],
            k + 2 == kLoads ? last : keys.usual[k + 1]);
  const Pair part = total(sums);
  return (is_odd ? part.b : part.a) + exchange_lanes(is_odd ? part.a : part.b, 4);
}

// All lanes of a warp: whether the page at *at_ptr has another hash than the one at `known_ptr`, by
// halves: the low one in the first four of its lanes and the high one in the others. `near` holds
// the page's first block, and then that of the page `step` Wides behind it, where *at_ptr is then:
// loads never pause.
FUNCTION bool is_other(const PageKeys& keys, const uint64_t* known_ptr, const Wide** at_ptr,
                       uint32_t step, Wide* near) {
  const bool is_odd = thread_anew() / 4 % kGroups != 0;
  uint64_t sum = keys.first, known = 0;
#pragma unroll 1
  for (uint32_t block = 0; block < kBlocks; block += 2) {
    const bool is_end = block == kBlocks - 2;
    Wide far[kLoads];
    load_block(*at_ptr + kBlockWides, far);
    sum += add_block(keys, near, keys.usual[kLoads - 1], is_odd);
    sum = scrambled(sum, keys.scramble);
    *at_ptr += is_end ? (int32_t)(step - (kBlocks - 2) * kBlockWides) : 2 * (int32_t)kBlockWides;
    load_block(*at_ptr, near);
    // the last time counts; behind those loads, for it is the last to be needed
    known = *known_ptr;
    team_sync();
    Pair last = keys.usual[kLoads - 1];
    // the odd group has the last stripe
    if (is_end && is_odd) last = page_last_keys(thread_anew() % 4);
    sum += add_block(keys, far, last, is_odd);
    if (!is_end) sum = scrambled(sum, keys.scramble);
  }
  const uint64_t other = exchange_lanes(sum, 4);
  uint64_t mixed = mix_product((is_odd ? other : sum) ^ keys.mix.a,
                               (is_odd ? sum : other) ^ keys.mix.b);
  mixed += exchange_lanes(mixed, 1);
  mixed += exchange_lanes(mixed, 2);
  return known !=
         avalanche(mixed + (is_odd ? ~(kLeafBytes * kPrime64_2) : kLeafBytes * kPrime64_1));
}

// A whole warp, one of `warps`: notes the pages in [first, end) that differ from the table. What is
// seldom needed is looked up in region() again: registers are for loads.
template <class RegionOf>
FUNCTION void find_dirty(RegionOf region, uint64_t first, uint64_t end, uint64_t warp,
                         uint64_t warps) {
  // a region has less than 2^31 pages: 8 TiB
  const uint32_t stride = (uint32_t)warps * kPagesEach, stop = (uint32_t)end;
  const uint32_t t = threadIdx.x % 32;
  uint32_t page = (uint32_t)first + (uint32_t)warp * kPagesEach + t / kPageLanes;  // of this lane
  const uint32_t there = page < stop ? page : stop - 1;  // who has none reads another's
  const Pages pages = pages_of(region());
  const uint64_t* known_ptr = pages.table + 2ull * there + t / 4 % 2;  // half of a known hash
  const Wide* at =
      reinterpret_cast<const Wide*>(pages.base_ptr + there * kLeafBytes) + t % kPageLanes;
  const PageKeys keys = page_keys();
  Wide near[kLoads];
  load_block(at, near);
#pragma unroll 1
  while (any_in_team(page < stop)) {
    const bool is_more = page + stride < stop;
    const uint32_t step = is_more ? stride * (uint32_t)(kLeafBytes / sizeof(Wide)) : 0;
    const uint32_t others = team_bits(is_other(keys, known_ptr, &at, step, near));
    const uint32_t lane = thread_anew() % 32, differ = others >> (lane - lane % kPageLanes);
    if (lane % kPageLanes == 0 && page < stop && (differ & 0x11) != 0)
      note_page(pages_of(region()), page);
    if (is_more) known_ptr += 2ull * stride;
    page += stride;
  }
}
#endif
