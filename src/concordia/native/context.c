// Contexts as they come into being.
//
// Owns: the hooks of their creation. Promises: the driver is called exactly once for each call.
// Called by the program.
#include "shim.h"

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return REAL(cuDevicePrimaryCtxRetain, context, device);
}

CUresult cuCtxCreate(CUcontext *context, unsigned int flags, CUdevice device) {
  return REAL(cuCtxCreate, context, flags, device);
}

CUresult cuCtxCreate_v2(CUcontext *context, unsigned int flags, CUdevice device) {
  return REAL(cuCtxCreate_v2, context, flags, device);
}

CUresult cuCtxCreate_v3(CUcontext *context, void *affinity, int count, unsigned int flags,
                        CUdevice device) {
  return REAL(cuCtxCreate_v3, context, affinity, count, flags, device);
}

CUresult cuCtxCreate_v4(CUcontext *context, void *parameters, unsigned int flags,
                        CUdevice device) {
  return REAL(cuCtxCreate_v4, context, parameters, flags, device);
}
