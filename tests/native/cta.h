// A CTA of the GPU's code on the CPU: a thread for each lane. Put before a kernel or handler by the compiler's -include.
//
// Only what orders memory on a GPU orders it here, as ThreadSanitizer sees it: __syncwarp and __syncthreads do; shuffles and votes make
// lanes wait for each other, but order nothing. So a word that a lane reads after another wrote it, with no more than a shuffle between,
// is a race here, as it is for racecheck. Global memory is watched too. One CTA; no cluster, no exit of single lanes. CONCORDIA_CTA is its
// size. With CONCORDIA_CTA_LOOSE __syncwarp orders nothing either: then there are races to be found.
#pragma once
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define __CUDACC__ 1
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static
constexpr unsigned kCtaLanes = CONCORDIA_CTA, kWarpLanes = 32;

struct Dim { unsigned x; };
extern __thread Dim threadIdx;
constexpr Dim blockIdx = {0}, blockDim = {kCtaLanes}, gridDim = {1};

// Where lanes wait for each other; the last to arrive wakes the others.
struct Meeting { unsigned arrived, phase; };
#define MEET(meeting, lanes)                                                                           \
  const unsigned phase = __atomic_load_n(&(meeting)->phase, __ATOMIC_ACQUIRE);                         \
  if (__atomic_add_fetch(&(meeting)->arrived, 1, __ATOMIC_ACQ_REL) == (lanes)) {                       \
    __atomic_store_n(&(meeting)->arrived, 0, __ATOMIC_RELAXED);                                        \
    __atomic_store_n(&(meeting)->phase, phase + 1, __ATOMIC_RELEASE);                                  \
    syscall(SYS_futex, &(meeting)->phase, FUTEX_WAKE_PRIVATE, (lanes), nullptr, nullptr, 0);           \
  }                                                                                                    \
  while (__atomic_load_n(&(meeting)->phase, __ATOMIC_ACQUIRE) == phase)                                \
    syscall(SYS_futex, &(meeting)->phase, FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0)

struct Warp {
  Meeting visible, hidden;
  uint64_t said[kWarpLanes];
};
extern Warp warps[kCtaLanes / kWarpLanes];
extern Meeting cta_meeting;

static inline void meet(Meeting* meeting, unsigned lanes) { MEET(meeting, lanes); }
// In cta.cpp, which the sanitizer does not look into: each lane's value to all of its warp.
void exchange_hidden(Warp* warp, unsigned lane, uint64_t value, uint64_t* all);

static inline Warp* my_warp() { return warps + threadIdx.x / kWarpLanes; }
static inline void __syncwarp() {
#ifdef CONCORDIA_CTA_LOOSE
  uint64_t all[kWarpLanes];
  exchange_hidden(my_warp(), threadIdx.x % kWarpLanes, 0, all);
#else
  meet(&my_warp()->visible, kWarpLanes);
#endif
}
static inline void __syncthreads() { meet(&cta_meeting, kCtaLanes); }
static inline uint64_t __shfl_sync(unsigned, uint64_t value, uint32_t from) {
  uint64_t all[kWarpLanes];
  exchange_hidden(my_warp(), threadIdx.x % kWarpLanes, value, all);
  return all[from % kWarpLanes];
}
static inline uint64_t __shfl_xor_sync(unsigned mask, uint64_t value, uint32_t bit) { return __shfl_sync(mask, value, (threadIdx.x % kWarpLanes) ^ bit); }
static inline uint32_t __ballot_sync(unsigned, bool value) {
  uint64_t all[kWarpLanes];
  exchange_hidden(my_warp(), threadIdx.x % kWarpLanes, value, all);
  uint32_t bits = 0;
  for (unsigned i = 0; i < kWarpLanes; ++i) bits |= (uint32_t)all[i] << i;
  return bits;
}
static inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
static inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }

// What is PTX there.
#define load load_ptx
#define store store_ptx
#define load_two load_two_ptx
#define store_two store_two_ptx
#define store_full store_full_ptx
#define load_full load_full_ptx
#define add_device add_device_ptx
#define add_anywhere add_anywhere_ptx
#define exchange_device exchange_device_ptx
#define now_ns now_ns_ptx
#define settle settle_ptx
#define store_settled store_settled_ptx
#define thread_anew thread_anew_ptx
#define mul_wide mul_wide_ptx
#define load_passing load_passing_ptx
#define kept kept_ptx
#define pause_lane pause_lane_ptx
#define yield_lane yield_lane_ptx
#include "portable.h"
#undef load
#undef store
#undef load_two
#undef store_two
#undef store_full
#undef load_full
#undef add_device
#undef add_anywhere
#undef exchange_device
#undef now_ns
#undef settle
#undef store_settled
#undef thread_anew
#undef mul_wide
#undef load_passing
#undef kept
#undef pause_lane
#undef yield_lane

constexpr int builtin_order(Order order) { return order == kRelaxed ? __ATOMIC_RELAXED : order == kAcquire ? __ATOMIC_ACQUIRE : __ATOMIC_RELEASE; }
template <Order order, Scope scope>
FUNCTION uint64_t load(const uint64_t* word_ptr) { return __atomic_load_n(word_ptr, builtin_order(order)); }
template <Order order, Scope scope>
FUNCTION void store(uint64_t* word_ptr, uint64_t value) { __atomic_store_n(word_ptr, value, builtin_order(order)); }
FUNCTION Two load_two(const uint64_t* words_ptr) { return {load<kAcquire, kSystem>(words_ptr), load<kRelaxed, kSystem>(words_ptr + 1)}; }
FUNCTION void store_two(uint64_t* words_ptr, Two value) {
  store<kRelaxed, kSystem>(words_ptr, value.first);
  store<kRelaxed, kSystem>(words_ptr + 1, value.second);
}
FUNCTION void store_full(uint64_t* word_ptr, uint64_t value) { (void)__atomic_exchange_n(word_ptr, value, __ATOMIC_SEQ_CST); }
FUNCTION uint64_t load_full(const uint64_t* word_ptr) { return __atomic_load_n(word_ptr, __ATOMIC_SEQ_CST); }
FUNCTION uint64_t add_device(uint64_t* word_ptr, uint64_t value) { return __atomic_fetch_add(word_ptr, value, __ATOMIC_ACQ_REL); }
FUNCTION void add_anywhere(uint64_t* word_ptr, uint64_t value) { __atomic_fetch_add(word_ptr, value, __ATOMIC_RELAXED); }
FUNCTION uint64_t exchange_device(uint64_t* word_ptr, uint64_t value) { return __atomic_exchange_n(word_ptr, value, __ATOMIC_ACQUIRE); }
// one fence and many plain words there; the sanitizer knows no fences, so each word is released here
FUNCTION void settle() {}
FUNCTION void store_settled(uint64_t* word_ptr, uint64_t value) { store<kRelease, kSystem>(word_ptr, value); }
// Lanes are threads that wait for processors, so their clock is slow: bounds of microseconds are for a GPU.
constexpr uint64_t kSlowness = 10000;
FUNCTION uint64_t now_ns() {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return ((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec) / kSlowness;
}
FUNCTION uint32_t thread_anew() { return threadIdx.x; }
FUNCTION uint64_t mul_wide(uint32_t a, uint32_t b) { return (uint64_t)a * b; }
FUNCTION Wide load_passing(const Wide* from) { return *from; }
FUNCTION uint64_t kept(uint64_t value) { return value; }
FUNCTION void pause_lane() { sched_yield(); }
FUNCTION void yield_lane() { sched_yield(); }
