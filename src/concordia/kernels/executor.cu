// The executor as a GPU kernel: one launch of it is one stay. `launch` is the number that ring->launched was raised to for it.
#include "executor.h"

extern "C" __global__ void __launch_bounds__(1024) concordia_executor(Executor* executor, uint64_t launch) {
  run_executor(executor, (uint64_t)blockIdx.x * blockDim.x + threadIdx.x, launch);
}
