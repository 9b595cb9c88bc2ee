// Launches by functions that the driver still has for programs of long ago.
//
// Owns: their hooks. Promises: as launch.c; their arguments were given before, so observers are told
// of a launch whose arguments nobody knows. Called by the program.
#include "shim.h"

#define DEVICES_MAX 64

static CUresult watched(CUfunction function, CUstream stream, CUresult (*call)(const void *),
                        const void *context) {
  const struct launch launch = {.kind = LAUNCH_LEGACY, .function = function, .stream = stream};
  launch_before(&launch);
  CUresult result = forward_swallows(&launch) ? CUDA_SUCCESS : call(context);
  launch_after(&launch, result);
  return result;
}

struct grid {
  CUfunction function;
  int width, height;
  CUstream stream;
};

static CUresult one(const void *context) {
  const struct grid *grid = context;
  return REAL(cuLaunch, grid->function);
}

static CUresult many(const void *context) {
  const struct grid *grid = context;
  return REAL(cuLaunchGrid, grid->function, grid->width, grid->height);
}

static CUresult many_in_stream(const void *context) {
  const struct grid *grid = context;
  return REAL(cuLaunchGridAsync, grid->function, grid->width, grid->height, grid->stream);
}

CUresult cuLaunch(CUfunction function) {
  const struct grid grid = {.function = function};
  return watched(function, NULL, one, &grid);
}

CUresult cuLaunchGrid(CUfunction function, int width, int height) {
  const struct grid grid = {function, width, height, NULL};
  return watched(function, NULL, many, &grid);
}

CUresult cuLaunchGridAsync(CUfunction function, int width, int height, CUstream stream) {
  const struct grid grid = {function, width, height, stream};
  return watched(function, stream, many_in_stream, &grid);
}

// One call, a launch on each of several devices.
CUresult cuLaunchCooperativeKernelMultiDevice(CUlaunchParams *list, unsigned int devices,
                                              unsigned int flags) {
  struct launch launches[DEVICES_MAX];
  unsigned int told = list && devices <= DEVICES_MAX ? devices : 0;
  for (unsigned int i = 0; i < told; i++) {
    launches[i] = (struct launch){
        .kind = LAUNCH_LEGACY, .function = list[i].function, .stream = list[i].hStream};
    launch_before(&launches[i]);
  }
  CUresult result = told && forward_swallows(&launches[0])
                        ? CUDA_SUCCESS
                        : REAL(cuLaunchCooperativeKernelMultiDevice, list, devices, flags);
  for (unsigned int i = told; i-- > 0;) launch_after(&launches[i], result);
  return result;
}
