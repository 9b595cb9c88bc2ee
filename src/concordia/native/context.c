// Contexts as they come into being.
//
// Owns: the hooks of their creation. Promises: the driver is called exactly once for each call; the
// first context of a process that is to be hooked gets the control block before the program has its
// handle. Called by the program. What the block is, control.c says.
#include "shim.h"

static void made(const CUcontext *context, CUdevice device) {
  char mode[16];
  if (!context || !process_is_active()) return;
  if (process_setting("mode", mode, sizeof mode) && mode[0] == 'r') control_make(*context, device);
}

#define CREATED(call)                                  \
  do {                                                 \
    CUresult result = call;                            \
    if (result == CUDA_SUCCESS) made(context, device); \
    return result;                                     \
  } while (0)

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  CREATED(REAL(cuDevicePrimaryCtxRetain, context, device));
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
