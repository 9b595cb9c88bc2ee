// The fake driver: devices, contexts, memory, and who asks for functions by name. See fake_driver.h.
#include "fake_driver.h"

#include <stdio.h>
#include <sys/mman.h>

pthread_mutex_t fake_lock = PTHREAD_MUTEX_INITIALIZER;
__thread struct context *fake_current;
static __thread struct context *stack[16];
static __thread int depth;
static struct context primary[16];
static struct { char name[64]; uint64_t calls; } counts[256];

static int number(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}

void fake_count(const char *name) {
  pthread_mutex_lock(&fake_lock);
  for (int i = 0; i < 256; i++) {
    if (!counts[i].name[0]) snprintf(counts[i].name, sizeof counts[i].name, "%s", name);
    if (strcmp(counts[i].name, name) == 0) {
      counts[i].calls++;
      break;
    }
  }
  pthread_mutex_unlock(&fake_lock);
}

uint64_t fake_calls(const char *name) {
  uint64_t found = 0;
  pthread_mutex_lock(&fake_lock);
  for (int i = 0; i < 256; i++)
    if (strcmp(counts[i].name, name) == 0) found = counts[i].calls;
  pthread_mutex_unlock(&fake_lock);
  return found;
}

#define CALLED fake_count(__func__)

API CUresult cuInit(unsigned flags) { CALLED; return flags ? INVALID_VALUE : OK; }
API CUresult cuDriverGetVersion(int *version) { *version = 13000; return OK; }
API int cuBrandNew(int value) { return value + 1; }  // newer than any shim
API CUresult cuDeviceGetCount(int *count) { *count = number("FAKE_DEVICES", 1); return OK; }
API CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < number("FAKE_DEVICES", 1) ? OK : INVALID_VALUE; }
API CUresult cuDeviceGetAttribute(int *value, int attribute, int device) { (void)device; *value = attribute == 102 ? number("FAKE_VMM", 1) : attribute == 75 ? 9 : 0; return OK; }
API CUresult cuDeviceCanAccessPeer(int *can, int device, int peer) { *can = device == peer ? 0 : number("FAKE_PEER", 1); return OK; }

static CUresult created(struct context **context, int device) {
  struct context *made = calloc(1, sizeof *made);
  made->device = device;
  *context = made;
  if (depth < 16) stack[depth++] = fake_current;
  fake_current = made;
  return OK;
}
API CUresult cuDevicePrimaryCtxRetain(struct context **context, int device) {
  CALLED;
  pthread_mutex_lock(&fake_lock);
  primary[device].device = device;
  primary[device].is_primary = 1;
  primary[device].uses++;
  pthread_mutex_unlock(&fake_lock);
  *context = &primary[device];
  return OK;
}
API CUresult cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = primary[device].uses > 0; return OK; }
API CUresult cuDevicePrimaryCtxRelease_v2(int device) { CALLED; primary[device].uses--; return OK; }
API CUresult cuDevicePrimaryCtxReset_v2(int device) { CALLED; primary[device].uses = 0; return OK; }
API CUresult cuCtxCreate(struct context **context, unsigned flags, int device) { CALLED; (void)flags; return created(context, device); }
API CUresult cuCtxCreate_v2(struct context **context, unsigned flags, int device) { CALLED; (void)flags; return created(context, device); }
API CUresult cuCtxCreate_v3(struct context **context, void *affinity, int count, unsigned flags, int device) { CALLED; (void)affinity; (void)count; (void)flags; return created(context, device); }
#ifndef FAKE_OLD  // an older driver lacks this
API CUresult cuCtxCreate_v4(struct context **context, void *parameters, unsigned flags, int device) { CALLED; (void)parameters; (void)flags; return created(context, device); }
#endif
API CUresult cuCtxDestroy_v2(struct context *context) { CALLED; if (fake_current == context) fake_current = NULL; free(context); return OK; }
API CUresult cuCtxSetCurrent(struct context *context) { fake_current = context; return OK; }
API CUresult cuCtxGetCurrent(struct context **context) { *context = fake_current; return OK; }
API CUresult cuCtxGetDevice(int *device) { if (!fake_current) return INVALID_CONTEXT; *device = fake_current->device; return OK; }
API CUresult cuCtxPushCurrent_v2(struct context *context) { if (depth == 16) return INVALID_VALUE; stack[depth++] = fake_current; fake_current = context; return OK; }
API CUresult cuCtxPopCurrent_v2(struct context **context) { if (!depth) return INVALID_CONTEXT; if (context) *context = fake_current; fake_current = stack[--depth]; return OK; }

// --- memory
API CUresult cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  CALLED;
  if (!fake_current) return INVALID_CONTEXT;
  void *made = bytes ? calloc(1, bytes) : NULL;
  *address = (uint64_t)(uintptr_t)made;
  return made ? OK : bytes ? OUT_OF_MEMORY : INVALID_VALUE;
}
API CUresult cuMemFree_v2(uint64_t address) { CALLED; free((void *)(uintptr_t)address); return OK; }
API CUresult cuMemAllocAsync(uint64_t *address, size_t bytes, void *stream) { (void)stream; return cuMemAlloc_v2(address, bytes); }
API CUresult cuMemFreeAsync(uint64_t address, void *stream) { (void)stream; return cuMemFree_v2(address); }
API CUresult cuMemGetAllocationGranularity(size_t *bytes, const void *property, int option) { (void)property; (void)option; *bytes = 2 << 20; return OK; }
API CUresult cuMemCreate(uint64_t *handle, size_t bytes, const void *property, unsigned long long flags) { CALLED; (void)property; (void)flags; *handle = bytes; return bytes % (2 << 20) ? INVALID_VALUE : OK; }
API CUresult cuMemRelease(uint64_t handle) { (void)handle; return OK; }
API CUresult cuMemAddressReserve(uint64_t *address, size_t bytes, size_t alignment, uint64_t hint, unsigned long long flags) {
  (void)alignment; (void)hint; (void)flags;
  void *made = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  *address = (uint64_t)(uintptr_t)made;
  return made == MAP_FAILED ? OUT_OF_MEMORY : OK;
}
API CUresult cuMemAddressFree(uint64_t address, size_t bytes) { return munmap((void *)(uintptr_t)address, bytes) ? INVALID_VALUE : OK; }
API CUresult cuMemMap(uint64_t address, size_t bytes, size_t offset, uint64_t handle, unsigned long long flags) { (void)address; (void)bytes; (void)offset; (void)handle; (void)flags; return OK; }
API CUresult cuMemUnmap(uint64_t address, size_t bytes) { return mprotect((void *)(uintptr_t)address, bytes, PROT_NONE) ? INVALID_VALUE : OK; }
API CUresult cuMemSetAccess(uint64_t address, size_t bytes, const void *access, size_t count) { CALLED; (void)access; if (!count || number("FAKE_ACCESS", 1) == 0) return INVALID_VALUE; return mprotect((void *)(uintptr_t)address, bytes, PROT_READ | PROT_WRITE) ? INVALID_VALUE : OK; }
API CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned flags) { (void)flags; *address = calloc(1, bytes); return OK; }
API CUresult cuMemFreeHost(void *address) { free(address); return OK; }
API CUresult cuMemcpyHtoD_v2(uint64_t target, const void *source, size_t bytes) { CALLED; memcpy((void *)(uintptr_t)target, source, bytes); return OK; }
API CUresult cuMemcpyDtoH_v2(void *target, uint64_t source, size_t bytes) { CALLED; memcpy(target, (void *)(uintptr_t)source, bytes); return OK; }
API CUresult cuMemcpyDtoD_v2(uint64_t target, uint64_t source, size_t bytes) { CALLED; memmove((void *)(uintptr_t)target, (void *)(uintptr_t)source, bytes); return OK; }
API CUresult cuMemcpy(uint64_t target, uint64_t source, size_t bytes) { CALLED; memmove((void *)(uintptr_t)target, (void *)(uintptr_t)source, bytes); return OK; }
API CUresult cuMemcpyHtoDAsync_v2(uint64_t target, const void *source, size_t bytes, void *stream) { (void)stream; return cuMemcpyHtoD_v2(target, source, bytes); }
API CUresult cuMemcpyDtoHAsync_v2(void *target, uint64_t source, size_t bytes, void *stream) { (void)stream; return cuMemcpyDtoH_v2(target, source, bytes); }
API CUresult cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t bytes, void *stream) { (void)stream; return cuMemcpyDtoD_v2(target, source, bytes); }
API CUresult cuMemcpyAsync(uint64_t target, uint64_t source, size_t bytes, void *stream) { (void)stream; return cuMemcpy(target, source, bytes); }
API CUresult cuMemsetD8_v2(uint64_t address, unsigned char value, size_t bytes) { CALLED; memset((void *)(uintptr_t)address, value, bytes); return OK; }
API CUresult cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void *stream) { (void)stream; return cuMemsetD8_v2(address, value, bytes); }
API CUresult cuMemsetD32_v2(uint64_t address, unsigned value, size_t count) { CALLED; for (size_t i = 0; i < count; i++) ((unsigned *)(uintptr_t)address)[i] = value; return OK; }
API CUresult cuMemsetD32Async(uint64_t address, unsigned value, size_t count, void *stream) { (void)stream; return cuMemsetD32_v2(address, value, count); }

// --- functions by name: the newest that is not newer than the version asked for
#define NAMES(X) \
  X(cuCtxCreate, 2000, cuCtxCreate, 0) X(cuCtxCreate, 3020, cuCtxCreate_v2, 0) X(cuCtxCreate, 11040, cuCtxCreate_v3, 0) \
  X(cuDevicePrimaryCtxRetain, 7000, cuDevicePrimaryCtxRetain, 0) X(cuInit, 2000, cuInit, 0) X(cuMemAlloc, 3020, cuMemAlloc_v2, 0) X(cuMemFree, 3020, cuMemFree_v2, 0) \
  X(cuModuleLoad, 2000, cuModuleLoad, 0) X(cuModuleLoadData, 2000, cuModuleLoadData, 0) X(cuModuleLoadDataEx, 2010, cuModuleLoadDataEx, 0) \
  X(cuModuleLoadFatBinary, 2000, cuModuleLoadFatBinary, 0) X(cuModuleUnload, 2000, cuModuleUnload, 0) X(cuModuleGetFunction, 2000, cuModuleGetFunction, 0) \
  X(cuLibraryLoadData, 12000, cuLibraryLoadData, 0) X(cuLibraryLoadFromFile, 12000, cuLibraryLoadFromFile, 0) X(cuLibraryUnload, 12000, cuLibraryUnload, 0) \
  X(cuLibraryGetKernel, 12000, cuLibraryGetKernel, 0) X(cuLaunchKernel, 4000, cuLaunchKernel, cuLaunchKernel_ptsz) X(cuLaunchKernelEx, 11060, cuLaunchKernelEx, cuLaunchKernelEx_ptsz) \
  X(cuLaunchCooperativeKernel, 9000, cuLaunchCooperativeKernel, cuLaunchCooperativeKernel_ptsz) X(cuGraphLaunch, 10000, cuGraphLaunch, cuGraphLaunch_ptsz) \
  X(cuGetProcAddress, 11030, cuGetProcAddress, 0) X(cuGetProcAddress, 12000, cuGetProcAddress_v2, 0) X(cuStreamDestroy, 4000, cuStreamDestroy_v2, 0) X(cuBrandNew, 13000, cuBrandNew, 0)

API CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags);
API CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status);
#define EXTERN(name) extern CUresult name()
EXTERN(cuModuleLoad); EXTERN(cuModuleLoadData); EXTERN(cuModuleLoadDataEx); EXTERN(cuModuleLoadFatBinary); EXTERN(cuModuleUnload); EXTERN(cuModuleGetFunction);
EXTERN(cuLibraryLoadData); EXTERN(cuLibraryLoadFromFile); EXTERN(cuLibraryUnload); EXTERN(cuLibraryGetKernel); EXTERN(cuLaunchKernel); EXTERN(cuLaunchKernel_ptsz);
EXTERN(cuLaunchKernelEx); EXTERN(cuLaunchKernelEx_ptsz); EXTERN(cuLaunchCooperativeKernel); EXTERN(cuLaunchCooperativeKernel_ptsz); EXTERN(cuGraphLaunch); EXTERN(cuGraphLaunch_ptsz); EXTERN(cuStreamDestroy_v2);

static const struct { const char *base; int since; void *plain, *per_thread; } names[] = {
#define ROW(base, since, name, per_thread) {#base, since, (void *)name, (void *)per_thread},
    NAMES(ROW)
#ifndef FAKE_OLD
    ROW(cuCtxCreate, 12050, cuCtxCreate_v4, 0)
#endif
};

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
  CALLED;
  int best = -1, known = 0;
  for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
    if (strcmp(names[i].base, symbol) != 0) continue;
    known = 1;
    if (names[i].since <= version && (best < 0 || names[i].since > names[best].since)) best = (int)i;
  }
  if (status) *status = best >= 0 ? 0 : known ? 2 : 1;
  *function = best < 0 ? NULL : (flags & 2) && names[best].per_thread ? names[best].per_thread : names[best].plain;
  return best >= 0 ? OK : NOT_FOUND;
}
CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags) { return cuGetProcAddress_v2(symbol, function, version, flags, NULL); }
API CUresult cuGetExportTable(const void **table, const void *id) { (void)id; *table = NULL; return NOT_FOUND; }
