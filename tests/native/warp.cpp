// A warp of the GPU's code on the CPU: 32 contexts that take turns, in lockstep where they exchange values. Runs find_dirty of
// page_hash.h and the headers of journal.h, which no other test without a GPU does. Compiled and called by test_page_hash.py.
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
static void __syncwarp() { meet(0); }
static bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
static uint64_t __umul64hi(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }
static void __syncthreads() {}

// What is PTX there, and what would add over the bus.
#define thread_anew thread_anew_ptx
#define mul_wide mul_wide_ptx
#define load_passing load_passing_ptx
#define kept kept_ptx
#include "portable.h"
#undef thread_anew
#undef mul_wide
#undef load_passing
#undef kept
static uint32_t thread_anew() { return threadIdx.x; }
static uint64_t mul_wide(uint32_t a, uint32_t b) { return (uint64_t)a * b; }
static Wide load_passing(const Wide* from) { return *from; }
static uint64_t kept(uint64_t value) { return value; }
#include "page_table.h"
static std::vector<uint32_t> noted;
#define note_page(pages, page) noted.push_back(page)
#include "page_hash.h"
#include "journal.h"

static Region region;
static uint64_t base_address;
static uint64_t range[2], warps, warp;

static void (*work)();

static void run_lane() {
  work();
  rounds[threadIdx.x] = -1;
}

// One warp from its start to its end; false when not all lanes came as far at the same time, which none would.
static bool run_warp() {
  std::vector<std::vector<char>> stacks(kLanes, std::vector<char>(1 << 16));
  for (int i = 0; i < kLanes; ++i) {
    rounds[i] = 0;
    getcontext(&lanes[i]);
    lanes[i].uc_stack.ss_sp = stacks[i].data();
    lanes[i].uc_stack.ss_size = stacks[i].size();
    lanes[i].uc_link = &turn;
    makecontext(&lanes[i], run_lane, 0);
  }
  while (rounds[0] >= 0) {
    for (int i = 0; i < kLanes; ++i) {
      threadIdx.x = (unsigned)i;
      swapcontext(&turn, &lanes[i]);
    }
    for (int i = 1; i < kLanes; ++i)
      if (rounds[i] != rounds[0]) return false;
  }
  return true;
}

#define CALLED extern "C" __attribute__((visibility("default")))

CALLED int find_dirty_pages(const uint8_t* base, uint64_t* table, uint64_t first, uint64_t end, uint64_t warp_count, uint32_t* found, uint64_t most) {
  base_address = reinterpret_cast<uint64_t>(base);
  region.bases = reinterpret_cast<uint64_t>(&base_address);
  region.page_hashes = reinterpret_cast<uint64_t>(table);
  range[0] = first, range[1] = end, warps = warp_count;
  noted.clear();
  work = [] { find_dirty([] { return const_cast<const Region*>(&region); }, range[0], range[1], warp, warps); };
  for (warp = 0; warp < warps; ++warp)
    if (!run_warp()) return -1;
  for (uint64_t i = 0; i < noted.size() && i < most; ++i) found[i] = noted[i];
  return (int)noted.size();
}

static RecordHeader* headers;
static uint64_t header_count, payload_size, chain[kLanes][2];
static uint8_t* pool;

// A segment's header at `target`, then `count` records' with payloads of `bytes` each; `hash` is the last one's.
CALLED int put_chain(SegmentHeader* segment, RecordHeader* first, uint64_t count, uint64_t bytes, uint8_t* target, uint64_t* hash) {
  static SegmentHeader* start;
  start = segment, headers = first, header_count = count, payload_size = bytes, pool = target;
  work = [] {
    uint64_t* mine = chain[threadIdx.x];
    seal_header(start, pool, mine);
    put_headers(headers, header_count, payload_size, pool + 2 * sizeof(SegmentHeader), mine);
  };
  if (!run_warp()) return -1;
  for (int i = 1; i < kLanes; ++i)
    if (chain[i][0] != chain[0][0] || chain[i][1] != chain[0][1]) return -2;
  hash[0] = chain[0][0], hash[1] = chain[0][1];
  return 0;
}
