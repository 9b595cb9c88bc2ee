// Memory at addresses that are the same in every life of a program.
//
// Owns: a range of addresses and what is mapped in it. Promises: whoever allocates and frees the
// same sizes in the same order gets the same addresses, if the driver gives the range; what is
// small shares memory, as with the driver; what cannot be had here is the driver's own, and the
// first time said; what is freed is free only once all work is done, as with the driver's: beside a
// capture, which a wait for that would end, it is put off to the next call that may wait. Called
// where the policy asks for it, by allocations.c, and by pointers.c. One GPU: memory of the
// driver's own is for its peers, too, which this would not be. The driver maps memory under the
// lock, so that nobody takes a place that is not ready; these calls wait for no work of the GPU,
// and none of our hooks is below them.
//
// Why: a region may hold addresses, and allocators choose by them. With these a resumed program
// has its bytes where they were. The small ones, too: a library that frameworks use keeps what it
// works with in some kilobytes that it allocates itself.
#define _GNU_SOURCE
#include <pthread.h>
#include <string.h>

#include "addresses.h"

#define RANGE_BYTES (1ull << 40)      // several times what any GPU has
#define RANGE_HINT 0x200000000000ull  // far from where a system puts a process's own mappings
#define KEPT_ID (1ull << 62)  // the driver counts its own from below
#ifndef SMALL_RANGE_BYTES  // tests have less memory
#define SMALL_RANGE_BYTES (1ull << 30)  // its beginning: a program has some megabytes of them
#endif
#ifndef KEPT_MAX  // likewise
// Each allocation looks through all of its kind: an allocator of a framework has some hundreds.
#define KEPT_MAX 16384
#endif
#define TEXT_OF(number) #number
#define TEXT(number) TEXT_OF(number)
enum { LARGE_BYTES = 1 << 20 };   // of the driver's own, too, each of these has pages for itself
enum { SMALL_ALIGNMENT = 512 };  // more than the driver promises, and what it gives
enum { NOT_TRIED, OPEN, CLOSED };

// The part of the range from `start` to `end`, and what is there, by address. Of the large each has
// a mapping of its own; the small share one for each granule.
struct part {
  uint64_t start, end, unit;  // sizes are rounded up to it
  int count;
  struct kept kept[KEPT_MAX];
};
static struct part small, large;
static int state = NOT_TRIED;
static _Atomic uint64_t base;  // 0: there is no range
static uint64_t granule;  // of the driver, or some of its own: what is small fits in
static uint64_t spare;  // one that is mapped and empty, or 0: who frees the last wants it again
static uint64_t made_ever;
static uint64_t freed_ever;
static _Atomic int leaving;  // how many are freed and still there
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int is_reserved(void) {
  CUdeviceptr at = 0;
  uint64_t found = range_reserve(RANGE_HINT, RANGE_BYTES, &at);
  if (!found) return 0;
  for (granule = found; granule < LARGE_BYTES;) granule += found;
  small.start = at;
  small.end = large.start = at + SMALL_RANGE_BYTES;
  large.end = at + RANGE_BYTES;
  small.unit = SMALL_ALIGNMENT;
  large.unit = granule;
  atomic_store(&base, at);
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
  return state == OPEN;
}

int addresses_has(uint64_t address) {
  uint64_t start = atomic_load(&base);
  return start && address - start < RANGE_BYTES;
}

static uint64_t rounded(uint64_t bytes, uint64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

static uint64_t granule_of(uint64_t address) { return address - (address - small.start) % granule; }

// Where so many bytes can begin at or behind an address. What is small lies in one granule: a copy
// across two mappings is not for every call.
static uint64_t fitting(uint64_t at, uint64_t bytes) {
  uint64_t end = granule_of(at) + granule;
  return bytes <= granule && at + bytes > end ? end : at;
}

// With the lock: the lowest gap; its index among what is there, or -1 and why not.
static int gap_for(const struct part *part, uint64_t bytes, uint64_t *address, const char **why) {
  uint64_t at = fitting(part->start, bytes);
  int index = 0;
  *why = "more than " TEXT(KEPT_MAX) " allocations of less than 1 MiB, or from 1 MiB on";
  if (part->count == KEPT_MAX) return -1;
  for (; index < part->count && at + bytes > part->kept[index].address; index++) {
    const struct kept *kept = &part->kept[index];
    at = fitting(kept->address + rounded(kept->bytes, part->unit), bytes);
  }
  *address = at;
  *why = "the place for those of less than 1 MiB is full";
  return at + bytes <= part->end ? index : -1;
}

// With the lock.
static int granule_is_used(uint64_t start) {
  for (int i = 0; i < small.count && small.kept[i].address < start + granule; i++)
    if (small.kept[i].address >= start) return 1;
  return 0;
}

// With the lock.
static int has_given_back(void) {
  int has_some = spare != 0;
  if (has_some) REAL(cuMemUnmap, spare, granule);
  spare = 0;
  return has_some;
}

// With the lock: memory for an allocation, where its neighbours do not have it already.
static CUresult backed(const struct part *part, uint64_t at, uint64_t bytes) {
  if (part == &small) {
    at = granule_of(at);
    bytes = granule;
    if (granule_is_used(at)) return CUDA_SUCCESS;
    if (at == spare) {
      spare = 0;
      return CUDA_SUCCESS;
    }
  }
  CUresult result = range_map(at, bytes);
  return result == CUDA_ERROR_OUT_OF_MEMORY && has_given_back() ? range_map(at, bytes) : result;
}

// With the lock.
static CUresult made(struct part *part, CUdeviceptr *address, uint64_t bytes, CUcontext context,
                     const char **why) {
  uint64_t at, room = rounded(bytes, part->unit);
  int index = gap_for(part, room, &at, why);
  if (index < 0) return ADDRESSES_NONE;
  CUresult result = backed(part, at, room);
  // The driver may have room for a small one in what it has already.
  if (result == CUDA_ERROR_OUT_OF_MEMORY && part == &large) return result;
  *why = result == CUDA_ERROR_OUT_OF_MEMORY ? "no memory for one more granule of small ones"
                                            : "the driver maps no memory there";
  if (result != CUDA_SUCCESS) return ADDRESSES_NONE;
  struct kept *place = &part->kept[index];
  memmove(place + 1, place, (size_t)(part->count - index) * sizeof *place);
  *place = (struct kept){at, bytes, KEPT_ID | ++made_ever, 0, context};
  part->count++;
  *address = at;
  return CUDA_SUCCESS;
}

CUresult addresses_allocate(CUdeviceptr *address, size_t bytes, const char **why) {
  CUcontext current = NULL;
  CUresult result = ADDRESSES_NONE;
  *why = NULL;
  if (!policy.keeps_addresses || !IS_PROTECTED() || !bytes || bytes > RANGE_BYTES || !board_claim())
    return ADDRESSES_NONE;
  if (REAL(cuCtxGetCurrent, &current) != CUDA_SUCCESS || !current) return ADDRESSES_NONE;
  addresses_settle();  // also where it fails: then places are not free yet
  pthread_mutex_lock(&lock);
  if (is_open()) result = made(bytes < LARGE_BYTES ? &small : &large, address, bytes, current, why);
  pthread_mutex_unlock(&lock);
  return result;
}

void addresses_missed(const char *why) {
  static _Atomic int is_said;
  if (!atomic_exchange(&is_said, 1))
    notice("concordia: not all addresses are kept from here on: %s", why);
}

static struct part *part_of(uint64_t address) { return address < large.start ? &small : &large; }

int addresses_find(uint64_t address, struct kept *found) {
  const struct part *part = part_of(address);
  int has = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < part->count && !has; i++) {
    has = !part->kept[i].freed && address - part->kept[i].address < part->kept[i].bytes;
    if (has) *found = part->kept[i];
  }
  pthread_mutex_unlock(&lock);
  return has;
}

void addresses_context_gone(CUcontext context) {
  struct part *parts[] = {&small, &large};
  if (!atomic_load(&base) || !context) return;
  pthread_mutex_lock(&lock);
  for (int k = 0; k < 2; k++)
    for (int i = 0; i < parts[k]->count; i++)
      if (parts[k]->kept[i].context == context) parts[k]->kept[i].context = NULL;
  pthread_mutex_unlock(&lock);
}

void addresses_forked(void) {
  pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
  lock = fresh;
}

// With the lock.
static CUresult removed(struct part *part, int index) {
  struct kept *place = &part->kept[index], gone = *place;
  memmove(place, place + 1, (size_t)(part->count - index - 1) * sizeof *place);
  part->count--;
  atomic_fetch_sub(&leaving, 1);
  if (part == &large) return REAL(cuMemUnmap, gone.address, rounded(gone.bytes, part->unit));
  uint64_t start = granule_of(gone.address), other = spare;
  if (granule_is_used(start)) return CUDA_SUCCESS;
  if (!IS_PROTECTED()) return REAL(cuMemUnmap, start, granule);  // no more of them will come
  spare = other && other < start ? other : start;  // the lowest gap comes first
  return other ? REAL(cuMemUnmap, other < start ? start : other, granule) : CUDA_SUCCESS;
}

// What was freed as the so manieth, or before, goes.
static CUresult swept(struct part *part, uint64_t until) {
  CUresult found = CUDA_SUCCESS;
  pthread_mutex_lock(&lock);
  for (int i = part->count; i-- > 0;) {
    if (!part->kept[i].freed || part->kept[i].freed > until) continue;
    CUresult result = removed(part, i);
    if (result != CUDA_SUCCESS) found = result;
  }
  pthread_mutex_unlock(&lock);
  return found;
}

CUresult addresses_settle(void) {
  if (!atomic_load(&leaving) || !captures_refuse()) return CUDA_SUCCESS;
  pthread_mutex_lock(&lock);
  uint64_t until = freed_ever;  // what others free from here on, work may still use behind the wait
  pthread_mutex_unlock(&lock);
  park_begin();
  CUresult result = REAL(cuCtxSynchronize);
  park_end();
  captures_allow();
  if (result == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) captures_unseen();
  if (result != CUDA_SUCCESS) return result;
  CUresult of_small = swept(&small, until), of_large = swept(&large, until);
  return of_small != CUDA_SUCCESS ? of_small : of_large;
}

int addresses_give_back(void) {
  if (!atomic_load(&base)) return 0;
  int before = atomic_load(&leaving);
  addresses_settle();
  pthread_mutex_lock(&lock);
  int has_some = has_given_back();
  pthread_mutex_unlock(&lock);
  return has_some || atomic_load(&leaving) < before;
}

// Whether it is one of ours that was not so before.
static int is_set_freed(CUdeviceptr address, int is_freed) {
  struct part *part = part_of(address);
  int at = 0;
  pthread_mutex_lock(&lock);
  while (at < part->count && part->kept[at].address != address) at++;
  int has = at < part->count && (part->kept[at].freed == 0) == is_freed;
  if (has) part->kept[at].freed = is_freed ? ++freed_ever : 0;
  if (has) atomic_fetch_add(&leaving, is_freed ? 1 : -1);
  pthread_mutex_unlock(&lock);
  return has;
}

CUresult addresses_free(CUdeviceptr address) {
  if (!addresses_has(address) || !is_set_freed(address, 1)) return ADDRESSES_NONE;
  CUresult result = addresses_settle();
  // It is put off for good: one such capture was ended by the wait, and no other must be.
  if (result == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) return CUDA_SUCCESS;
  if (result != CUDA_SUCCESS) is_set_freed(address, 0);
  return result;
}
