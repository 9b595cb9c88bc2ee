// The executor as a GPU kernel: one launch of it is one stay. `launch` is the number that
// ring->launched was raised to for it.
//
// Owns: where the executor's state lies meanwhile. Promises: one CTA works on a copy in shared
// memory (what one lane does alone is a chain of small reads, eight times quicker there) and puts
// it back before it ends; several CTAs share the state in device memory. GPU only. Launched by
// device/residency.py. Does not know tasks.
#include "executor.h"

constexpr uint64_t kStateWords = sizeof(Executor) / 8;
static_assert(sizeof(Executor) % 8 == 0 && sizeof(Executor) <= 16384,
              "the state is copied in words and leaves room for a neighbour");

extern "C" __global__ void __launch_bounds__(512)
    concordia_executor(Executor* executor, uint64_t launch) {
  __shared__ alignas(128) uint64_t state[kStateWords];
  const uint64_t lane = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (gridDim.x != 1) return run_executor(executor, lane, launch);
  uint64_t* words = reinterpret_cast<uint64_t*>(executor);
  Executor* near = reinterpret_cast<Executor*>(state);
  for (uint64_t i = threadIdx.x; i < kStateWords; i += blockDim.x) state[i] = words[i];
  __syncthreads();
  if (threadIdx.x == 0) near->call.journal = &near->journal;
  __syncthreads();
  run_executor(near, lane, launch);
  __syncthreads();
  if (threadIdx.x == 0) near->call.journal = &executor->journal;
  __syncthreads();
  for (uint64_t i = threadIdx.x; i < kStateWords; i += blockDim.x) words[i] = state[i];
}
