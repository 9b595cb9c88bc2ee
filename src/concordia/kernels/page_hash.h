// The hash of a page of one leaf, by a warp, at the speed of the memory.
//
// Owns: the layout of that work. Promises: the value is XXH3-128 of the page's 4096 bytes, as the xxhash library gives it. A lane reads 16 bytes
// at a time, which are one pair of accumulators' words of one stripe: XXH3 swaps the two words of a pair, so no lane needs another's data. The
// four blocks' sums do not depend on each other until they are scrambled, so they are added over the warp together, each halving of the lanes
// with half of the sums. GPU only. Called by page_scan.cu and page_burst.cu.
//
//   lane = 4 * g + p: words 2p and 2p + 1 of stripes g, g + 8, g + 16, ... , g + 56
#pragma once
#include "stream.h"

#if CONCORDIA_CUDA
struct PageKeys {
  uint64_t even[2], odd[2], last[2];  // secret words of stripes g and g + 8 of a block; of the page's last stripe
};

FUNCTION PageKeys page_keys() {
  const uint32_t p = threadIdx.x % 4, g = threadIdx.x / 4 % 8;
  PageKeys keys;
  for (uint32_t i = 0; i < 2; ++i) {
    keys.even[i] = kSecret[g + 2 * p + i];
    keys.odd[i] = kSecret[g + 8 + 2 * p + i];
    keys.last[i] = g == 7 ? secret_at(kSecretBytes - 64 - 7 + 8 * (2 * p + i)) : keys.odd[i];
  }
  return keys;
}

// Lanes that have the halves of a page's hash.
constexpr uint64_t kHashLowLane = 0, kHashHighLane = 8;

FUNCTION uint64_t choose(bool is_second, uint64_t first, uint64_t second) { return is_second ? second : first; }

// All lanes of a warp: the page's hash, its low half where bit 1 of g is clear, its high half where it is set.
FUNCTION uint64_t hash_page(const uint8_t* page_ptr, const PageKeys& keys) {
  const uint32_t p = threadIdx.x % 4, g = threadIdx.x / 4 % 8;
  const Wide* at = reinterpret_cast<const Wide*>(page_ptr) + 4 * g + p;
  uint64_t sums[8];  // 2 * block + word of the pair
  Wide data[8];
#pragma unroll
  for (uint32_t k = 0; k < 8; ++k) data[k] = at[32 * k];
#pragma unroll
  for (uint32_t k = 0; k < 8; k += 2) {
    const uint64_t* later = k == 6 ? keys.last : keys.odd;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i)
      sums[k + i] = keyed_product(data[k].word[i], keys.even[i]) + data[k].word[1 - i] + keyed_product(data[k + 1].word[i], later[i]) +
                    data[k + 1].word[1 - i];
  }
  // Each step adds over one bit of g and leaves a lane with the half of the sums that this bit names.
#pragma unroll
  for (uint32_t half = 4; half >= 1; half /= 2) {
    const bool is_upper = g & half;
#pragma unroll
    for (uint32_t i = 0; i < half; ++i) {
      const uint64_t kept = choose(is_upper, sums[i], sums[i + half]), given = choose(is_upper, sums[i + half], sums[i]);
      sums[i] = kept + exchange_lanes(given, 4 * half);
    }
  }
  // Now lane 4 * g + p has block g / 2's sum of accumulator 2p + g % 2; its own chain needs the four blocks'.
  const uint32_t b = g % 2, j = 2 * p + b;
  const uint64_t mixer = kSecret[16 + j];
  uint64_t sum = first_sum(j);
#pragma unroll
  for (uint32_t block = 0; block < 4; ++block) {
    sum += lane_value(sums[0], 4 * (2 * block + b) + p);
    if (block < 3) sum = (sum ^ sum >> 47 ^ mixer) * kPrime32_1;
  }
  const uint64_t other = exchange_lanes(sum, 4);
  const uint64_t low_word = choose(b, sum, other), high_word = choose(b, other, sum);
  const bool is_high = g & 2;
  const uint64_t offset = (is_high ? kSecretBytes - 64 - 11 : 11) + 16 * p;
  uint64_t mixed = mix_product(low_word ^ secret_at(offset), high_word ^ secret_at(offset + 8));
  mixed += exchange_lanes(mixed, 1);
  mixed += exchange_lanes(mixed, 2);
  mixed += is_high ? ~(kLeafBytes * kPrime64_2) : kLeafBytes * kPrime64_1;
  mixed = (mixed ^ mixed >> 37) * kPrimeMix;
  return mixed ^ mixed >> 32;
}
#endif
