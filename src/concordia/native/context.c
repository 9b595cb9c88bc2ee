// Contexts as they come into being.
//
// Owns: the hooks of their creation and end. Promises: the driver is called exactly once for each
// call; the first context of a process that is to be hooked gets the control block before the
// program has its handle; no stream of a context that ends is used afterwards, and no memory that
// the program does not have outlives it. Called by the program. What the block is, control.c says.
#include <stdatomic.h>

#include "addresses.h"

#define DEVICES_MAX 64

static _Atomic(CUcontext) primary[DEVICES_MAX];  // of each device, once it was asked for

static void made(const CUcontext *context, CUdevice device) {
  char mode[16];
  if (!context || !process_is_active()) return;
  if (process_setting("mode", mode, sizeof mode) && mode[0] == 'r') control_make(*context, device);
  gate_page_watch();
}

static void one_leaves(void) {
  kernels_unloaded();
  addresses_give_back();
}

// What is said of it elsewhere must not outlive it.
static void context_gone(CUcontext context) {
  streams_context_gone(context);
  captures_context_gone(context);
  addresses_context_gone(context);
}

static void primary_gone(CUdevice device) {
  one_leaves();
  if (device >= 0 && device < DEVICES_MAX) context_gone(atomic_load(&primary[device]));
}

#define CREATED(call)                                  \
  do {                                                 \
    CUresult result = call;                            \
    if (result == CUDA_SUCCESS) made(context, device); \
    return result;                                     \
  } while (0)

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  CUresult result = REAL(cuDevicePrimaryCtxRetain, context, device);
  if (result != CUDA_SUCCESS || !context) return result;
  if (device >= 0 && device < DEVICES_MAX) atomic_store(&primary[device], *context);
  made(context, device);
  return result;
}

CUresult cuCtxCreate(CUcontext *context, unsigned int flags, CUdevice device) {
  CREATED(REAL(cuCtxCreate, context, flags, device));
}

CUresult cuCtxCreate_v2(CUcontext *context, unsigned int flags, CUdevice device) {
  CREATED(REAL(cuCtxCreate_v2, context, flags, device));
}

CUresult cuCtxCreate_v3(CUcontext *context, void *affinity, int count, unsigned int flags,
                        CUdevice device) {
  CREATED(REAL(cuCtxCreate_v3, context, affinity, count, flags, device));
}

CUresult cuCtxCreate_v4(CUcontext *context, void *parameters, unsigned int flags,
                        CUdevice device) {
  CREATED(REAL(cuCtxCreate_v4, context, parameters, flags, device));
}

CUresult cuCtxDestroy(CUcontext context) {
  one_leaves();
  context_gone(context);
  return REAL(cuCtxDestroy, context);
}

CUresult cuCtxDestroy_v2(CUcontext context) {
  one_leaves();
  context_gone(context);
  return REAL(cuCtxDestroy_v2, context);
}

// It may be the last use; where it is not, its streams stay known.
static CUcontext primary_leaves(CUdevice device) {
  if (device < 0 || device >= DEVICES_MAX) return NULL;
  one_leaves();
  CUcontext context = atomic_load(&primary[device]);
  streams_context_leaves(context);
  return context;
}

static CUresult primary_left(CUdevice device, CUcontext context, CUresult result) {
  unsigned int flags;
  int is_active = 0;
  if (!context) return result;
  if (REAL(cuDevicePrimaryCtxGetState, device, &flags, &is_active) != CUDA_SUCCESS) is_active = 0;
  streams_context_left(context, is_active);
  if (!is_active) context_gone(context);
  return result;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  CUcontext context = primary_leaves(device);
  return primary_left(device, context, REAL(cuDevicePrimaryCtxRelease, device));
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  CUcontext context = primary_leaves(device);
  return primary_left(device, context, REAL(cuDevicePrimaryCtxRelease_v2, device));
}

CUresult cuDevicePrimaryCtxReset(CUdevice device) {
  primary_gone(device);
  return REAL(cuDevicePrimaryCtxReset, device);
}

CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) {
  primary_gone(device);
  return REAL(cuDevicePrimaryCtxReset_v2, device);
}
