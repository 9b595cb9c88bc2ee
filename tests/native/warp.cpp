// A warp of the GPU's code on the CPU: 32 contexts that take turns, in lockstep where they exchange values. Runs find_dirty of
// page_hash.h, which no other test without a GPU does. Compiled and called by test_page_hash.py.
#define __CUDACC__ 1
#define __device__
#define __forceinline__ inline
#include <stdint.h>
#include <ucontext.h>
#include <vector>

struct Dim { unsigned x; };
static Dim threadIdx, blockIdx, blockDim, gridDim;
constexpr int kLanes = 32;
static ucontext_t lanes[kLanes], turn;
static uint64_t said[2][kLanes];
static int rounds[kLanes];

// Says a value and comes back once every lane has; the lane's own turn is `threadIdx.x`.
static int meet(uint64_t value) {
  const unsigned lane = threadIdx.x;
  const int round = rounds[lane]++ % 2;
  said[round][lane] = value;
  swapcontext(&lanes[lane], &turn);
  return round;
}
static uint64_t __shfl_xor_sync(unsigned, uint64_t value, uint32_t bit) { return said[meet(value)][threadIdx.x ^ bit]; }
static uint64_t __shfl_sync(unsigned, uint64_t value, uint32_t lane) { return said[meet(value)][lane % kLanes]; }
static uint32_t __ballot_sync(unsigned, bool value) {
  uint32_t bits = 0;
  const int round = meet(value);
  for (int i = 0; i < kLanes; ++i) bits |= (uint32_t)said[round][i] << i;
  return bits;
}
static bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
static uint64_t __umul64hi(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }
static void __syncthreads() {}
static void __syncwarp() {}

// What is PTX there, and what would add over the bus.
#define thread_anew thread_anew_ptx
#include "portable.h"
#undef thread_anew
static uint32_t thread_anew() { return threadIdx.x; }
#include "page_table.h"
static std::vector<uint32_t> noted;
#define note_page(pages, page) noted.push_back(page)
#include "page_hash.h"

static Pages pages;
static uint64_t range[2], warps, warp;

static void run_lane() {
  find_dirty(pages, range[0], range[1], warp, warps);
  rounds[threadIdx.x] = -1;
}

extern "C" __attribute__((visibility("default"))) int find_dirty_pages(const uint8_t* base, uint64_t* table, uint64_t first, uint64_t end,
                                                                       uint64_t warp_count, uint32_t* found, uint64_t most) {
  pages = {base, table, nullptr, nullptr};
  range[0] = first, range[1] = end, warps = warp_count;
  noted.clear();
  std::vector<std::vector<char>> stacks(kLanes, std::vector<char>(1 << 16));
  for (warp = 0; warp < warps; ++warp) {
    for (int i = 0; i < kLanes; ++i) {
      rounds[i] = 0;
      getcontext(&lanes[i]);
      lanes[i].uc_stack.ss_sp = stacks[i].data();
      lanes[i].uc_stack.ss_size = stacks[i].size();
      lanes[i].uc_link = &turn;
      makecontext(&lanes[i], run_lane, 0);
    }
    for (bool is_over = false; !is_over;) {
      for (int i = 0; i < kLanes; ++i) {
        threadIdx.x = (unsigned)i;
        if (rounds[i] >= 0) swapcontext(&turn, &lanes[i]);
      }
      is_over = rounds[0] < 0;
      for (int i = 1; i < kLanes; ++i)
        if (rounds[i] != rounds[0]) return -1;  // not all of them came as far: no warp would
    }
  }
  for (uint64_t i = 0; i < noted.size() && i < most; ++i) found[i] = noted[i];
  return (int)noted.size();
}
