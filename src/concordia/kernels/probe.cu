// A neighbour: a kernel that computes on every multiprocessor, one CTA on each, for a known time.
//
// Owns: nothing. Promises: its CTAs are all alike and need all of a multiprocessor's arithmetic, so
// that one which has to share, or to wait for a place, shows in the time of the whole. GPU only.
// Launched by device/neighbour.py. The sums only keep the compiler from dropping the work.
#include "types.h"

constexpr int kChains = 8;  // independent ones hide each other's latency

extern "C" __global__ void __launch_bounds__(512)
    concordia_probe(uint64_t* sum_ptr, uint64_t rounds) {
  float chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = (float)(threadIdx.x + i);
  for (uint64_t round = 0; round < rounds; ++round)
#pragma unroll
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * 0.999f + 1.0f;
  float sum = 0;
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  if (sum == -1.0f) *sum_ptr = 1;  // never, and the compiler does not know
}
