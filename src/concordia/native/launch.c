// Launches: kernels, cooperative kernels and graphs.
//
// Owns: the launch hooks and the order in which observers are told. Promises: the driver is called
// exactly once for each call, with the very arguments, and its result is what the caller gets.
// Called by the program. It decides nothing: observers do.
#include <stdatomic.h>

#include "shim.h"

struct observer {
  void (*before)(const struct launch *);
  void (*after)(const struct launch *, CUresult);
};
static const struct observer observers[] = {
#define OBSERVER(name) {name##_before, name##_after},
#include "observers.def"
#undef OBSERVER
};
#define OBSERVERS (sizeof(observers) / sizeof(*observers))

#define SHARDS 16  // threads that launch at the same time do not share a line, most of the time

static struct {
  _Alignas(64) _Atomic uint64_t launches;
} shards[SHARDS];

void launches_before(const struct launch *launch) {
  atomic_fetch_add_explicit(&shards[(uintptr_t)launch >> 16 & (SHARDS - 1)].launches, 1,
                            memory_order_relaxed);
}

void launches_after(const struct launch *launch, CUresult result) {
  (void)launch;
  (void)result;
}

void launch_counted(void) {
  for (int i = 0; i < SHARDS; i++)
    coverage_count("launches", atomic_exchange(&shards[i].launches, 0));
}

void launch_before(const struct launch *launch) {
  for (size_t i = 0; i < OBSERVERS; i++) observers[i].before(launch);
}

void launch_after(const struct launch *launch, CUresult result) {
  for (size_t i = OBSERVERS; i-- > 0;) observers[i].after(launch, result);
}

#define KERNEL(of_kind, per_thread, more)                                             \
  {                                                                                   \
      .kind = of_kind,                                                                \
      .is_per_thread = per_thread,                                                    \
      .function = function,                                                           \
      .stream = stream,                                                               \
      .grid = {grid_x, grid_y, grid_z},                                               \
      .block = {block_x, block_y, block_z},                                           \
      .shared_bytes = shared_bytes,                                                   \
      .parameters = parameters,                                                       \
      .extra = more,                                                                  \
  }

// The driver's call with the observers around it.
#define WATCHED(launch, call)      \
  do {                             \
    launch_before(&(launch));      \
    CUresult result = forward_swallows(&(launch)) ? CUDA_SUCCESS : call; \
    launch_after(&(launch), result); \
    return result;                 \
  } while (0)

CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                        unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                        unsigned int block_z, unsigned int shared_bytes, CUstream stream,
                        void **parameters, void **extra) {
  const struct launch launch = KERNEL(LAUNCH_KERNEL, 0, extra);
  WATCHED(launch, REAL(cuLaunchKernel, function, grid_x, grid_y, grid_z, block_x, block_y, block_z,
                       shared_bytes, stream, parameters, extra));
}

CUresult cuLaunchKernel_ptsz(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                             unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                             unsigned int block_z, unsigned int shared_bytes, CUstream stream,
                             void **parameters, void **extra) {
  const struct launch launch = KERNEL(LAUNCH_KERNEL, 1, extra);
  WATCHED(launch, REAL(cuLaunchKernel_ptsz, function, grid_x, grid_y, grid_z, block_x, block_y,
                       block_z, shared_bytes, stream, parameters, extra));
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                                   unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                                   unsigned int block_z, unsigned int shared_bytes,
                                   CUstream stream, void **parameters) {
  const struct launch launch = KERNEL(LAUNCH_COOPERATIVE, 0, NULL);
  WATCHED(launch, REAL(cuLaunchCooperativeKernel, function, grid_x, grid_y, grid_z, block_x,
                       block_y, block_z, shared_bytes, stream, parameters));
}

CUresult cuLaunchCooperativeKernel_ptsz(CUfunction function, unsigned int grid_x,
                                        unsigned int grid_y, unsigned int grid_z,
                                        unsigned int block_x, unsigned int block_y,
                                        unsigned int block_z, unsigned int shared_bytes,
                                        CUstream stream, void **parameters) {
  const struct launch launch = KERNEL(LAUNCH_COOPERATIVE, 1, NULL);
  WATCHED(launch, REAL(cuLaunchCooperativeKernel_ptsz, function, grid_x, grid_y, grid_z, block_x,
                       block_y, block_z, shared_bytes, stream, parameters));
}

static struct launch configured(const CUlaunchConfig *config, CUfunction function,
                                void **parameters, void **extra) {
  struct launch launch = {.kind = LAUNCH_KERNEL,
                          .function = function,
                          .parameters = parameters,
                          .extra = extra,
                          .config = config};
  if (!config) return launch;  // the driver says what it thinks of that
  launch.stream = config->hStream;
  launch.grid[0] = config->gridDimX;
  launch.grid[1] = config->gridDimY;
  launch.grid[2] = config->gridDimZ;
  launch.block[0] = config->blockDimX;
  launch.block[1] = config->blockDimY;
  launch.block[2] = config->blockDimZ;
  launch.shared_bytes = config->sharedMemBytes;
  return launch;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  const struct launch launch = configured(config, function, parameters, extra);
  WATCHED(launch, REAL(cuLaunchKernelEx, config, function, parameters, extra));
}

CUresult cuLaunchKernelEx_ptsz(const CUlaunchConfig *config, CUfunction function,
                               void **parameters, void **extra) {
  struct launch launch = configured(config, function, parameters, extra);
  launch.is_per_thread = 1;
  WATCHED(launch, REAL(cuLaunchKernelEx_ptsz, config, function, parameters, extra));
}

CUresult cuGraphLaunch(CUgraphExec graph, CUstream stream) {
  const struct launch launch = {.kind = LAUNCH_GRAPH, .function = graph, .stream = stream};
  WATCHED(launch, REAL(cuGraphLaunch, graph, stream));
}

CUresult cuGraphLaunch_ptsz(CUgraphExec graph, CUstream stream) {
  const struct launch launch = {
      .kind = LAUNCH_GRAPH, .is_per_thread = 1, .function = graph, .stream = stream};
  WATCHED(launch, REAL(cuGraphLaunch_ptsz, graph, stream));
}
