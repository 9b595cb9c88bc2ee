// The control block: made once in a process, when its first context exists.
//
// Owns: its memory on the device. Promises: all devices that the program sees can read and write
// it, or there is none, with the reason: a hook that could not would end the program. It belongs to
// no context and outlives each (virtual memory does). It is all zero but for magic, page shift and
// the places of the map's copies, as read back, before its address is told to anybody. Called by
// context.c; the address is asked for by load.c and by the tracker.
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "control.h"
#include "shim.h"

#define DEVICES_MAX 64

enum { NOT_TRIED, BUSY, MADE, REFUSED };

static _Atomic int state;
static _Atomic uint64_t address;
static char reason[160];  // written before `state` says REFUSED

void control_forked(void) {
  atomic_store(&state, NOT_TRIED);
  atomic_store(&address, 0);
}

// Pairs with the release in control_make: who sees the address sees a block that is complete.
uint64_t control_address(void) { return atomic_load_explicit(&address, memory_order_acquire); }

const char *control_why_not(void) {
  int seen = atomic_load_explicit(&state, memory_order_acquire);
  return seen == REFUSED ? reason : "loaded before the first context";
}

static int refuse(const char *what, CUresult result) {
  snprintf(reason, sizeof reason, "%s%s%.0d", what, result ? ": CUDA error " : "", result);
  return 0;
}

// Peers must see each other in both directions; a lone device always does.
static int are_all_peers(int count, CUdevice device) {
  for (CUdevice other = 0; other < count; other++) {
    int can = 0;
    if (other == device) continue;
    CUresult result = REAL(cuDeviceCanAccessPeer, &can, other, device);
    if (result || !can) return refuse("a device that the program sees cannot read another's memory", result);
  }
  return 1;
}

static int is_mapped_for_all(CUdevice device, int count, CUdeviceptr *made) {
  CUmemAllocationProp property = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                  .location = {CU_MEM_LOCATION_TYPE_DEVICE, device}};
  CUmemAccessDesc access[DEVICES_MAX];
  CUmemGenericAllocationHandle handle;
  CUdeviceptr at = 0;
  size_t bytes = 0;
  CUresult result =
      REAL(cuMemGetAllocationGranularity, &bytes, &property, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  if (result || bytes < CONTROL_ALLOCATED_BYTES) return refuse("no granularity of memory", result);
  result = REAL(cuMemCreate, &handle, bytes, &property, 0);
  if (result) return refuse("no memory for the control block", result);
  result = REAL(cuMemAddressReserve, &at, bytes, 0, 0, 0);
  if (!result) {
    result = REAL(cuMemMap, at, bytes, 0, handle, 0);
    for (int i = 0; i < count; i++)
      access[i] = (CUmemAccessDesc){{CU_MEM_LOCATION_TYPE_DEVICE, i}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    int is_mapped = !result;
    if (is_mapped) result = REAL(cuMemSetAccess, at, bytes, access, (size_t)count);
    if (result && is_mapped) REAL(cuMemUnmap, at, bytes);
    if (result) REAL(cuMemAddressFree, at, bytes);
  }
  REAL(cuMemRelease, handle);  // the mapping keeps the memory
  if (result) return refuse("the control block cannot be mapped for all devices", result);
  *made = at;
  return 1;
}

union block {
  struct concordia_control control;
  uint8_t bytes[CONTROL_ALLOCATED_BYTES];
};

// Filled and read back: copies to the device may still be on their way when they return.
static int is_filled(CUdeviceptr at) {
  static union block zero, back;  // one thread is ever here
  struct concordia_control control = {
      .magic = CONTROL_MAGIC,
      .page_shift = (uint32_t)process_number("page_shift", CONTROL_PAGE_SHIFT),
      .map_stride = CONTROL_MAP_STRIDE,
      .map_last = CONTROL_MAP_COPIES - 1};
  CUresult result = REAL(cuMemcpyHtoD_v2, at, &zero, sizeof zero);
  if (!result) result = REAL(cuMemcpyHtoD_v2, at, &control, sizeof control);
  if (!result) result = REAL(cuMemcpyDtoH_v2, (void *)&back, at, sizeof back);
  if (result) return refuse("the control block cannot be written", result);
  if (memcmp(&back, &control, sizeof control) != 0 ||
      memcmp(back.bytes + sizeof control, zero.bytes + sizeof control, sizeof zero - sizeof control))
    return refuse("the control block does not keep what is written", 0);
  return 1;
}

// Hooks were made, and kernels read, for one architecture: the code that the driver takes for
// another one, or makes from PTX because it was told to, is not what the table of an image says.
static int is_as_hooked(CUdevice device) {
  static const char *const forced[] = {"CUDA_FORCE_PTX_JIT", "CUDA_FORCE_JIT"};
  uint64_t wanted = process_number("arch", 0);
  int major = 0, minor = 0;
  for (int i = 0; i < 2; i++) {
    const char *value = getenv(forced[i]);
    if (value && *value && strcmp(value, "0") != 0)
      return refuse("the driver was told to take code that has no hooks", 0);
  }
  if (!wanted) return 1;
  CUresult result =
      REAL(cuDeviceGetAttribute, &major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
  if (!result)
    result =
        REAL(cuDeviceGetAttribute, &minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
  if (!result && (uint64_t)(10 * major + minor) == wanted) return 1;
  return refuse("the GPU is of another architecture than the hooks", result);
}

static int is_made(CUdevice device, CUdeviceptr *made) {
  int count = 0, is_virtual = 0;
  if (!is_as_hooked(device)) return 0;
  CUresult result = REAL(cuDeviceGetCount, &count);
  if (result || count < 1 || count > DEVICES_MAX) return refuse("no count of devices", result);
  if (!are_all_peers(count, device)) return 0;
  result = REAL(cuDeviceGetAttribute, &is_virtual,
                CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device);
  // Memory of a context would end with it, and libraries that were loaded do not.
  if (result || !is_virtual) return refuse("a device without virtual memory", result);
  return is_mapped_for_all(device, count, made);
}

void control_make(CUcontext context, CUdevice device) {
  int expected = NOT_TRIED, mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  if (!atomic_compare_exchange_strong(&state, &expected, BUSY)) return;
  CUdeviceptr made = 0;
  int is_good = 0;
  CUresult result = REAL(cuCtxPushCurrent_v2, context);
  if (result) {
    refuse("the context does not become current", result);
  } else {
    // another thread may capture, and must not be disturbed by an allocation
    CUresult exchanged = REAL(cuThreadExchangeStreamCaptureMode, &mode);
    is_good = is_made(device, &made) && is_filled(made);
    if (!exchanged) REAL(cuThreadExchangeStreamCaptureMode, &mode);
    REAL(cuCtxPopCurrent_v2, &context);
  }
  if (is_good) atomic_store_explicit(&address, made, memory_order_release);
  atomic_store_explicit(&state, is_good ? MADE : REFUSED, memory_order_release);
  if (!is_good) coverage_note("nothing is hooked in this process", reason);
}
