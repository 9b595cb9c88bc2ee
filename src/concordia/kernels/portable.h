// What one kernel source needs of two compilers: NVRTC for the GPU, the system C++ compiler for the
// CPU device.
//
// Owns: ordered access to shared words, who a lane is, waiting a little, the clock. Promises: the
// same source has the same meaning on both sides; no free fences (ThreadSanitizer does not know
// them) but for store_full, the one place where a store must be seen before a later load. Called by
// every kernel. Inline PTX lives here and nowhere else. Does not know rings, tasks or journals.
#pragma once
#include "abi.h"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define CONCORDIA_CUDA 1
#define FUNCTION static __device__ __forceinline__
#define FUNCTION_MEMBER __device__ __forceinline__
#define CONSTANT __device__ constexpr
#define TABLE static __device__ const
#define EXPORT extern "C" __device__
#else
#define CONCORDIA_CUDA 0
#include <sched.h>
#include <string.h>
#include <time.h>
#define FUNCTION static inline
#define FUNCTION_MEMBER inline
#define CONSTANT constexpr
#define TABLE static const
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The GPU works in fine grains: a team of lanes takes a leaf, and every word is loaded, hashed and
// stored in one pass (stream.h). A CPU lane moves whole rows straight into the pool and hashes them
// there. Tests give the CPU the GPU's shape, so that these paths run everywhere.
#ifndef CONCORDIA_DEVICE_SHAPE
#define CONCORDIA_DEVICE_SHAPE CONCORDIA_CUDA
#endif
constexpr bool kDeviceShape = CONCORDIA_DEVICE_SHAPE != 0;

enum Order { kRelaxed, kAcquire, kRelease };
enum Scope {
  kDevice,  // lanes of one executor
  kSystem,  // other processors and processes too
};

#if CONCORDIA_CUDA
// clang-format off
template <Order order, Scope scope>
FUNCTION uint64_t load(const uint64_t* word_ptr) {
  uint64_t value;
  if constexpr (order == kRelaxed && scope == kDevice)
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word_ptr) : "memory");
  else if constexpr (order == kRelaxed)
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word_ptr) : "memory");
  else if constexpr (scope == kDevice)
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word_ptr) : "memory");
  else
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word_ptr) : "memory");
  return value;
}

template <Order order, Scope scope>
FUNCTION void store(uint64_t* word_ptr, uint64_t value) {
  if constexpr (order == kRelaxed && scope == kDevice)
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" :: "l"(word_ptr), "l"(value) : "memory");
  else if constexpr (order == kRelaxed)
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(word_ptr), "l"(value) : "memory");
  else if constexpr (scope == kDevice)
    asm volatile("st.release.gpu.global.u64 [%0], %1;" :: "l"(word_ptr), "l"(value) : "memory");
  else
    asm volatile("st.release.sys.global.u64 [%0], %1;" :: "l"(word_ptr), "l"(value) : "memory");
}

// Neighbours in 16 bytes, on their way together; each is a word of its own, in no order.
struct Two { uint64_t first, second; };
FUNCTION Two load_two(const uint64_t* words_ptr) {
  Two found;
  asm volatile("ld.acquire.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(found.first), "=l"(found.second) : "l"(words_ptr) : "memory");
  return found;
}
FUNCTION void store_two(uint64_t* words_ptr, Two value) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};"
               :: "l"(words_ptr), "l"(value.first), "l"(value.second) : "memory");
}

// A store that every later load of this lane comes after, as all others see it.
FUNCTION void store_full(uint64_t* word_ptr, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;\n\tfence.sc.sys;"
               :: "l"(word_ptr), "l"(value) : "memory");
}

// The load that follows store_full on either side.
FUNCTION uint64_t load_full(const uint64_t* word_ptr) { return load<kAcquire, kSystem>(word_ptr); }

// Adds to a word that only lanes of this executor touch; never over the bus, where no such thing
// exists. Returns the value before.
FUNCTION uint64_t add_device(uint64_t* word_ptr, uint64_t value) {
  uint64_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], %2;"
               : "=l"(before) : "l"(word_ptr), "l"(value) : "memory");
  return before;
}

// The same for a word that may lie in an executor's shared memory, as those of its Call do with one
// CTA. What was added is there after the next grid_sync.
FUNCTION void add_anywhere(uint64_t* word_ptr, uint64_t value) {
  asm volatile("red.relaxed.gpu.add.u64 [%0], %1;" :: "l"(word_ptr), "l"(value) : "memory");
}

// Stores to a word that only kernels of this device touch, and returns the value before.
FUNCTION uint64_t exchange_device(uint64_t* word_ptr, uint64_t value) {
  uint64_t before;
  asm volatile("atom.exch.acquire.gpu.global.b64 %0, [%1], %2;"
               : "=l"(before) : "l"(word_ptr), "l"(value) : "memory");
  return before;
}

FUNCTION uint64_t now_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
// Orders everything before it before everything after it, for all processors: then store_settled
// may follow, many for one fence.
FUNCTION void settle() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
FUNCTION void store_settled(uint64_t* word_ptr, uint64_t value) {
  store<kRelaxed, kSystem>(word_ptr, value);
}

// The value of the lane whose number in the warp differs in this bit.
FUNCTION uint64_t exchange_lanes(uint64_t value, uint32_t bit) {
  return __shfl_xor_sync(0xffffffffu, value, bit);
}
FUNCTION bool any_in_team(bool is_true) { return __any_sync(0xffffffffu, is_true); }
FUNCTION uint32_t team_bits(bool is_true) { return __ballot_sync(0xffffffffu, is_true); }
FUNCTION uint64_t from_leader(uint64_t value) { return __shfl_sync(0xffffffffu, value, 0); }
FUNCTION uint64_t lane_value(uint64_t value, uint32_t lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
FUNCTION uint64_t team_lane() { return threadIdx.x % 32; }
// threadIdx.x, asked for here: what follows from it is not kept in registers from before.
FUNCTION uint32_t thread_anew() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

FUNCTION void pause_lane() { asm volatile("nanosleep.u32 50;"); }
FUNCTION void yield_lane() { pause_lane(); }
FUNCTION void prefetch(const uint8_t*) {}  // a GPU hides latency with other warps
FUNCTION bool is_cta_leader() { return threadIdx.x == 0; }
FUNCTION uint32_t cta_count() { return gridDim.x; }
FUNCTION uint32_t cta_index() { return blockIdx.x; }
FUNCTION uint64_t mul_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
// In C++ this is a product of 64 bits, whose upper half the assembler adds once more, as a zero.
FUNCTION uint64_t mul_wide(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

struct alignas(16) Wide { uint64_t word[2]; };
// Words that are read once: lines in the near cache make no room for them.
FUNCTION Wide load_passing(const Wide* from) {
  Wide data;
  asm volatile("ld.global.L1::no_allocate.v2.u64 {%0, %1}, [%2];"
               : "=l"(data.word[0]), "=l"(data.word[1]) : "l"(from) : "memory");
  return data;
}
// A value that stays in a register: a compiler that knows it as constants would choose anew.
FUNCTION uint64_t kept(uint64_t value) {
  asm("" : "+l"(value));
  return value;
}
FUNCTION void copy_wide(uint8_t* target_ptr, const uint8_t* source_ptr) {
  *reinterpret_cast<Wide*>(target_ptr) = *reinterpret_cast<const Wide*>(source_ptr);
}
// clang-format on
#else

constexpr int builtin_order(Order order) {
  return order == kRelaxed   ? __ATOMIC_RELAXED
         : order == kAcquire ? __ATOMIC_ACQUIRE
                             : __ATOMIC_RELEASE;
}

template <Order order, Scope scope>
FUNCTION uint64_t load(const uint64_t* word_ptr) {
  return __atomic_load_n(word_ptr, builtin_order(order));
}

template <Order order, Scope scope>
FUNCTION void store(uint64_t* word_ptr, uint64_t value) {
  __atomic_store_n(word_ptr, value, builtin_order(order));
}

struct Two {
  uint64_t first, second;
};
FUNCTION void store_two(uint64_t* words_ptr, Two value) {
  store<kRelaxed, kSystem>(words_ptr, value.first);
  store<kRelaxed, kSystem>(words_ptr + 1, value.second);
}

// A store that every later load_full comes after: a locked exchange, which is a full barrier and
// costs the same as a fence.
FUNCTION void store_full(uint64_t* word_ptr, uint64_t value) {
  (void)__atomic_exchange_n(word_ptr, value, __ATOMIC_SEQ_CST);
}
FUNCTION uint64_t load_full(const uint64_t* word_ptr) {
  return __atomic_load_n(word_ptr, __ATOMIC_SEQ_CST);
}

FUNCTION uint64_t add_device(uint64_t* word_ptr, uint64_t value) {
  return __atomic_fetch_add(word_ptr, value, __ATOMIC_ACQ_REL);
}
FUNCTION uint64_t exchange_device(uint64_t* word_ptr, uint64_t value) {
  return __atomic_exchange_n(word_ptr, value, __ATOMIC_ACQUIRE);
}

FUNCTION void add_anywhere(uint64_t* word_ptr, uint64_t value) {
  __atomic_fetch_add(word_ptr, value, __ATOMIC_RELAXED);
}

// A release store each: what the GPU does with one fence costs nothing here, and ThreadSanitizer
// knows no fences.
FUNCTION void settle() {}
FUNCTION void store_settled(uint64_t* word_ptr, uint64_t value) {
  store<kRelease, kSystem>(word_ptr, value);
}

FUNCTION bool any_in_team(bool is_true) { return is_true; }
FUNCTION uint32_t team_bits(bool is_true) { return is_true; }
FUNCTION uint64_t from_leader(uint64_t value) { return value; }
FUNCTION uint64_t team_lane() { return 0; }

FUNCTION uint64_t now_ns() {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
FUNCTION void pause_lane() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
FUNCTION void yield_lane() { sched_yield(); }
// any address: it never faults
FUNCTION void prefetch(const uint8_t* line_ptr) { __builtin_prefetch(line_ptr); }
FUNCTION uint64_t mul_high(uint64_t a, uint64_t b) {
  return (uint64_t)(((unsigned __int128)a * b) >> 64);
}
FUNCTION uint64_t mul_wide(uint32_t a, uint32_t b) { return (uint64_t)a * b; }
FUNCTION void copy_wide(uint8_t* target_ptr, const uint8_t* source_ptr) {
  memcpy(target_ptr, source_ptr, 16);
}
#endif

CONSTANT uint64_t align_up(uint64_t value, uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

FUNCTION uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }
