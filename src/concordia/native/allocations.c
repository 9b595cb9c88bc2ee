// The device memory that the program has.
//
// Owns: the hooks of allocation, and the table of what is allocated. Promises: the driver answers
// as it would without us; where it has no memory left, what protection took is given back and it is
// asked once more; the table is bounded, and an overflow ends the protection. Called by the
// program. Which allocation is a region says region_rules.c.
#define _GNU_SOURCE
#include <string.h>
#include <time.h>

#include "addresses.h"

enum { POINTER_MEMORY_TYPE = 2, MEMORY_TYPE_DEVICE = 2 };
enum { MAPPINGS_MAX = 1 << 12 };  // that nobody may access yet: a program has one at a time
#ifndef WAIT_COPIES_NS  // tests have no such time
#define WAIT_COPIES_NS 60000000000ull  // behind the program's own work, which uses other memory
#endif
#define LOOK_NS 20000

static const char mapped[] = "cuMemMap";  // the call of a mapping, by its address
static struct allocation table[ALLOCATIONS_MAX];  // by address
static int count;
static struct allocation mappings[MAPPINGS_MAX];  // without access
static int mapping_count;

// The first whose address is above; with the lock.
static int above(uint64_t address) {
  int low = 0, high = count;
  while (low < high) {
    int middle = (low + high) / 2;
    if (table[middle].address <= address) low = middle + 1;
    else high = middle;
  }
  return low;
}

int allocation_of(uint64_t address, struct allocation *found) {
  int at = above(address) - 1;
  if (at < 0 || address - table[at].address >= table[at].bytes) return 0;
  *found = table[at];
  return 1;
}

int allocation_reach(uint64_t address, struct allocation *found) {
  if (!allocation_of(address, found)) return 0;
  mapped_around(address, found);
  return 1;
}

int is_device_memory(uint64_t address) {
  struct allocation found;
  unsigned int type = 0;
  protect_lock();
  int is_known = allocation_of(address, &found);
  protect_unlock();
  if (is_known) return 1;
  return REAL(cuPointerGetAttribute, &type, POINTER_MEMORY_TYPE, address) == CUDA_SUCCESS &&
         type == MEMORY_TYPE_DEVICE;
}

static void came(CUdeviceptr address, uint64_t bytes, const char *call) {
  const struct allocation made = {address, bytes, call};
  if (!IS_PROTECTED() || !bytes || !board_claim()) return;
  protect_lock();
  int is_full = count == ALLOCATIONS_MAX, at = above(address);
  if (!is_full) {
    memmove(&table[at + 1], &table[at], (size_t)(count - at) * sizeof *table);
    table[at] = made;
    count++;
    if (call == mapped) mapped_came(address, bytes);
  }
  protect_unlock();
  if (is_full) protect_lose("more than %d allocations", ALLOCATIONS_MAX);
  else rules_allocated(&made);
}

// Before the driver: nobody can be given the same address meanwhile.
static void goes(CUdeviceptr address) {
  if (!IS_PROTECTED()) return;
  struct allocation found = {0};
  protect_lock();
  if (allocation_of(address, &found) && found.address == address) {
    int at = above(address) - 1;
    memmove(&table[at], &table[at + 1], (size_t)(count - at - 1) * sizeof *table);
    count--;
    if (found.call == mapped) mapped_goes(found.address, found.bytes);
  } else {
    found.bytes = 0;
  }
  protect_unlock();
  if (found.bytes) regions_freed(found.address, found.bytes);
}

// Memory that a graph allocates is there only while it runs: its launches count as writing
// anything.
#define ALLOCATED(address, bytes, is_node, call)                       \
  do {                                                                 \
    CUresult result = call;                                            \
    if (result == CUDA_ERROR_OUT_OF_MEMORY && addresses_give_back())   \
      result = call;                                                   \
    if (result == CUDA_ERROR_OUT_OF_MEMORY && regions_drop_copies())   \
      result = call;                                                   \
    if (result == CUDA_SUCCESS && !(is_node))                          \
      came(*(address), bytes, __func__);                               \
    return result;                                                     \
  } while (0)

static CUresult allocate(CUdeviceptr *address, size_t bytes) {
  const char *why;
  CUresult result = addresses_allocate(address, bytes, &why);
  if (result != ADDRESSES_NONE) return result;
  result = REAL(cuMemAlloc_v2, address, bytes);
  if (result == CUDA_SUCCESS && why) addresses_missed(why);
  return result;
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
  ALLOCATED(address, bytes, 0, allocate(address, bytes));
}

CUresult cuMemAllocPitch_v2(CUdeviceptr *address, size_t *pitch, size_t width, size_t height,
                            unsigned int element) {
  ALLOCATED(address, *pitch * height, 0,
            REAL(cuMemAllocPitch_v2, address, pitch, width, height, element));
}

CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream stream) {
  ALLOCATED(address, bytes, IS_PROTECTED() && is_capturing(stream, 0),
            REAL(cuMemAllocAsync, address, bytes, stream));
}

CUresult cuMemAllocAsync_ptsz(CUdeviceptr *address, size_t bytes, CUstream stream) {
  ALLOCATED(address, bytes, IS_PROTECTED() && is_capturing(stream, 1),
            REAL(cuMemAllocAsync_ptsz, address, bytes, stream));
}

CUresult cuMemAllocFromPoolAsync(CUdeviceptr *address, size_t bytes, void *pool, CUstream stream) {
  ALLOCATED(address, bytes, IS_PROTECTED() && is_capturing(stream, 0),
            REAL(cuMemAllocFromPoolAsync, address, bytes, pool, stream));
}

CUresult cuMemAllocFromPoolAsync_ptsz(CUdeviceptr *address, size_t bytes, void *pool,
                                      CUstream stream) {
  ALLOCATED(address, bytes, IS_PROTECTED() && is_capturing(stream, 1),
            REAL(cuMemAllocFromPoolAsync_ptsz, address, bytes, pool, stream));
}

CUresult cuMemAllocManaged(CUdeviceptr *address, size_t bytes, unsigned int flags) {
  CUresult result = REAL(cuMemAllocManaged, address, bytes, flags);
  if (result == CUDA_SUCCESS && IS_PROTECTED())
    protect_lose("managed memory is in use: what the program reads of it passes nobody");
  return result;
}

// Takes a mapping without access out of the list; address 0: there is none in this range.
static struct allocation mapping_taken(uint64_t address, uint64_t bytes) {
  struct allocation found = {0};
  protect_lock();
  for (int i = 0; i < mapping_count && !found.address; i++) {
    if (mappings[i].address - address >= bytes) continue;
    found = mappings[i];
    mappings[i] = mappings[--mapping_count];
  }
  protect_unlock();
  return found;
}

// It is no region before it may be read: a copy at a point would end the context.
CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  CUresult result = REAL(cuMemMap, address, bytes, offset, handle, flags);
  if (result != CUDA_SUCCESS || !IS_PROTECTED()) return result;
  protect_lock();
  int is_full = mapping_count == MAPPINGS_MAX;
  if (!is_full) mappings[mapping_count++] = (struct allocation){address, bytes, mapped};
  protect_unlock();
  if (is_full) protect_lose("more than %d mappings without access", MAPPINGS_MAX);
  return result;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc *access,
                        size_t count_of_access) {
  int is_given = 0;
  CUresult result = REAL(cuMemSetAccess, address, bytes, access, count_of_access);
  if (result != CUDA_SUCCESS || !IS_PROTECTED()) return result;
  for (size_t i = 0; i < count_of_access; i++) is_given |= access[i].flags != 0;
  for (struct allocation found; is_given && (found = mapping_taken(address, bytes)).address;)
    came(found.address, found.bytes, found.call);
  return result;
}

// The lowest allocation in a range; with the lock.
static int is_within(uint64_t address, uint64_t bytes, struct allocation *found) {
  if (allocation_of(address, found)) return 1;
  int at = above(address);
  if (at == count || table[at].address - address >= bytes) return 0;
  *found = table[at];
  return 1;
}

// The driver waits for nobody here, and a copy of a region that is not there ends the context.
static void await_copies(void) {
  static _Atomic int is_over;  // waited for once in a life: what goes later would wait for the same
  const struct timespec pause = {0, LOOK_NS};
  uint64_t end = now_ns() + WAIT_COPIES_NS;
  while (saver_is_copying() && !atomic_load(&is_over)) {
    if (now_ns() >= end) {
      atomic_store(&is_over, 1);
      protect_lose("the copies of memory that goes are not done in time");
      return;
    }
    nanosleep(&pause, NULL);
  }
}

CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
  int has_gone = 0;
  while (IS_PROTECTED() && mapping_taken(address, bytes).address) continue;
  while (IS_PROTECTED()) {
    struct allocation found = {0};
    protect_lock();
    int is_there = is_within(address, bytes, &found);
    protect_unlock();
    if (!is_there) break;
    goes(found.address);
    has_gone = 1;
  }
  // Also where protection has ended since they began.
  if (has_gone || !IS_PROTECTED()) await_copies();
  return REAL(cuMemUnmap, address, bytes);
}

// Not in the middle of a point: the copies of what it has taken are in a stream before it goes on.
static void goes_between_points(CUdeviceptr address) {
  ENTERS_ONLY();
  goes(address);
}

// ADDRESSES_NONE: it is the driver's own.
static CUresult free_kept(CUdeviceptr address) {
  if (!addresses_has(address)) return ADDRESSES_NONE;
  goes_between_points(address);
  await_copies();  // where that had a bound, or protection has ended since they began
  return addresses_free(address);
}

CUresult cuMemFree_v2(CUdeviceptr address) {
  park_begin();  // it waits for all work
  CUresult result = free_kept(address);
  if (result == ADDRESSES_NONE) {
    goes_between_points(address);
    result = REAL(cuMemFree_v2, address);
  }
  park_end();
  return result;
}

// The driver has never heard of a kept address. Behind all work it is behind that of the stream.
static CUresult free_kept_behind(CUdeviceptr address, CUstream stream, int is_per_thread) {
  if (!addresses_has(address) || is_capturing(stream, is_per_thread)) return ADDRESSES_NONE;
  return free_kept(address);
}

CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
  CUresult result = free_kept_behind(address, stream, 0);
  if (result != ADDRESSES_NONE) return result;
  ENTERS(stream, 0);
  goes(address);
  return REAL(cuMemFreeAsync, address, stream);
}

CUresult cuMemFreeAsync_ptsz(CUdeviceptr address, CUstream stream) {
  CUresult result = free_kept_behind(address, stream, 1);
  if (result != ADDRESSES_NONE) return result;
  ENTERS(stream, 1);
  goes(address);
  return REAL(cuMemFreeAsync_ptsz, address, stream);
}
