// Memory at addresses that are the same in every life of a program.
//
// Owns: a range of addresses and what is mapped in it. Promises: whoever allocates and frees the
// same sizes in the same order gets the same addresses, if the driver gives the range; what cannot
// be had here is the driver's own; what is freed is free only once all work is done, as with the
// driver's. Called by allocations.c where the policy asks for it. One GPU: memory of the driver's
// own is for its peers, too, which this would not be.
//
// Why: a region may hold addresses, and allocators choose by them. With these a resumed program
// has its bytes where they were.
#define _GNU_SOURCE
#include <pthread.h>
#include <string.h>

#include "protect.h"

#define RANGE_BYTES (1ull << 40)      // several times what any GPU has
#define RANGE_HINT 0x200000000000ull  // far from where a system puts a process's own mappings
enum { KEPT_MAX = 1 << 14 };
enum { LEAST_BYTES = 1 << 20 };  // frameworks ask for more, and the driver packs what is smaller
enum { NOT_TRIED, OPEN, CLOSED };

struct kept {
  uint64_t address, bytes;
};
static struct kept kept[KEPT_MAX];  // by address
static int count, state = NOT_TRIED;
static uint64_t base, granule;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static const CUmemAllocationProp property = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                             .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};

static int is_reserved(void) {
  int devices = 0, is_virtual = 0;
  size_t found = 0;
  CUdeviceptr at = 0;
  if (REAL(cuDeviceGetCount, &devices) != CUDA_SUCCESS || devices != 1) return 0;
  if (REAL(cuDeviceGetAttribute, &is_virtual,
           CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 0) != CUDA_SUCCESS ||
      !is_virtual)
    return 0;
  if (REAL(cuMemGetAllocationGranularity, &found, &property, CU_MEM_ALLOC_GRANULARITY_MINIMUM) !=
          CUDA_SUCCESS ||
      !found)
    return 0;
  if (REAL(cuMemAddressReserve, &at, RANGE_BYTES, 0, RANGE_HINT, 0) != CUDA_SUCCESS) return 0;
  base = at;
  granule = found;
  return 1;
}

// With the lock.
static int is_open(void) {
  if (state == NOT_TRIED) {
    state = is_reserved() ? OPEN : CLOSED;
    if (state == CLOSED)
      notice("concordia: addresses cannot be kept: that takes one GPU, and a driver with virtual "
             "memory");
  }
  return state == OPEN && count < KEPT_MAX;
}

// With the lock: the lowest gap; its index among them, or -1.
static int gap_for(uint64_t bytes, uint64_t *address) {
  uint64_t at = base;
  int index = 0;
  for (; index < count && kept[index].address - at < bytes; index++)
    at = kept[index].address + kept[index].bytes;
  *address = at;
  return at + bytes <= base + RANGE_BYTES ? index : -1;
}

static CUresult map_at(uint64_t address, uint64_t bytes) {
  const CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0},
                                  CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUmemGenericAllocationHandle handle;
  CUresult result = REAL(cuMemCreate, &handle, bytes, &property, 0);
  if (result != CUDA_SUCCESS) return result;
  result = REAL(cuMemMap, address, bytes, 0, handle, 0);
  if (result == CUDA_SUCCESS) {
    result = REAL(cuMemSetAccess, address, bytes, &access, 1);
    if (result != CUDA_SUCCESS) REAL(cuMemUnmap, address, bytes);
  }
  REAL(cuMemRelease, handle);  // the mapping keeps the memory
  return result;
}

// With the lock.
static CUresult made(CUdeviceptr *address, uint64_t bytes) {
  uint64_t at, size = (bytes + granule - 1) / granule * granule;
  int index = gap_for(size, &at);
  if (index < 0) return ADDRESSES_NONE;
  CUresult result = map_at(at, size);
  if (result != CUDA_SUCCESS) return result == CUDA_ERROR_OUT_OF_MEMORY ? result : ADDRESSES_NONE;
  memmove(&kept[index + 1], &kept[index], (size_t)(count - index) * sizeof *kept);
  kept[index] = (struct kept){at, size};
  count++;
  *address = at;
  return CUDA_SUCCESS;
}

CUresult addresses_allocate(CUdeviceptr *address, size_t bytes) {
  CUcontext current = NULL;
  CUresult result = ADDRESSES_NONE;
  if (!policy.keeps_addresses || !IS_PROTECTED() || bytes < LEAST_BYTES || bytes > RANGE_BYTES ||
      !board_claim())
    return ADDRESSES_NONE;
  if (REAL(cuCtxGetCurrent, &current) != CUDA_SUCCESS || !current) return ADDRESSES_NONE;
  pthread_mutex_lock(&lock);
  if (is_open()) result = made(address, bytes);
  pthread_mutex_unlock(&lock);
  return result;
}

// With the lock; -1: it is not ours.
static int index_of(CUdeviceptr address) {
  for (int i = 0; i < count; i++)
    if (kept[i].address == address) return i;
  return -1;
}

void addresses_forked(void) {
  pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
  lock = fresh;
}

CUresult addresses_free(CUdeviceptr address) {
  pthread_mutex_lock(&lock);
  int has = index_of(address) >= 0;
  pthread_mutex_unlock(&lock);
  if (!has) return ADDRESSES_NONE;
  // The driver's own memory waits so, too. What is left when it cannot, beside a capture, stays.
  CUresult result = REAL(cuCtxSynchronize);
  if (result == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) return CUDA_SUCCESS;
  if (result != CUDA_SUCCESS) return result;
  pthread_mutex_lock(&lock);
  int at = index_of(address);
  if (at >= 0) {
    result = REAL(cuMemUnmap, address, kept[at].bytes);
    memmove(&kept[at], &kept[at + 1], (size_t)(count - at - 1) * sizeof *kept);
    count--;
  }
  pthread_mutex_unlock(&lock);
  return result;
}
