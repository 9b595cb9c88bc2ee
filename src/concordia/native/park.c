// Calls that wait for the whole GPU, and kernels of ours that must be off it meanwhile.
//
// Owns: the list of who is to be parked, and the hooks of calls that block beside a kernel that
// stays (HARDWARE: module loads and unloads, frees, host unregistration, context synchronisation,
// the first launch of a kernel, cooperative launches). Promises: whoever registered is told before
// such a call and after it, by a plain function: no interpreter takes part; calls nest; nobody is
// told anything while the list is empty, and a launch then costs one load more; a child of fork has
// an empty list. Whether parking has worked is for the one who parks to see to, within a bound of
// its own. Called by the program, and by what of ours waits for the GPU in its hooks.
#define _GNU_SOURCE
#include <sched.h>
#include <string.h>
#include <time.h>

#include "addresses.h"

enum { PARKED_MAX = 16, SEEN_SLOTS = 1 << 16, SEEN_PROBES = 16 };
#define WAIT_UNREGISTER_NS 2000000000ull  // a call that takes longer waits for more than kernels

struct parked {
  _Atomic int is_used;  // 0: free, 1: being filled or emptied, 2: told
  _Atomic int inside;   // calls under way
  void (*park)(void *context);
  void (*unpark)(void *context);
  void *context;
};
static struct parked list[PARKED_MAX];
static _Atomic int count;
static _Atomic(void *) seen[SEEN_SLOTS];  // functions that were launched
static _Atomic(void *) exempt[PARKED_MAX];
static __thread int depth;
static __thread uint32_t told;

// Both must be there until concordia_park_unregister has returned 1, and may be called by any
// thread, by several at a time. The answer is a handle; -1: there is no room.
EXPORTED int concordia_park_register(void (*park)(void *), void (*unpark)(void *), void *context) {
  for (int i = 0; park && unpark && i < PARKED_MAX; i++) {
    int nobody = 0;
    if (!atomic_compare_exchange_strong(&list[i].is_used, &nobody, 1)) continue;
    list[i].park = park;
    list[i].unpark = unpark;
    list[i].context = context;
    atomic_store(&list[i].is_used, 2);  // what is above is seen by who reads 2: park_begin
    atomic_fetch_add(&count, 1);
    return i;
  }
  return -1;
}

static uint64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

// 0: a call that it was told of is still under way after two seconds; it stays registered.
EXPORTED int concordia_park_unregister(int handle) {
  int full = 2;
  if (handle < 0 || handle >= PARKED_MAX) return 0;
  if (!atomic_compare_exchange_strong(&list[handle].is_used, &full, 1)) return 0;
  uint64_t start = now();
  while (atomic_load(&list[handle].inside)) {
    if (now() - start > WAIT_UNREGISTER_NS) {
      atomic_store(&list[handle].is_used, 2);
      return 0;
    }
    sched_yield();
  }
  atomic_fetch_sub(&count, 1);
  atomic_store(&list[handle].is_used, 0);
  return 1;
}

// The count is read late, at worst, by a call that began before the registration was over.
void park_begin(void) {
  if (!depth && !atomic_load_explicit(&count, memory_order_relaxed)) return;
  if (depth++) return;
  told = 0;
  for (int i = 0; i < PARKED_MAX; i++) {
    // Announces itself, then looks; concordia_park_unregister empties, then counts. All four are
    // sequentially consistent, so one of the two sees the other.
    atomic_fetch_add(&list[i].inside, 1);
    if (atomic_load(&list[i].is_used) != 2) {
      atomic_fetch_sub(&list[i].inside, 1);
      continue;
    }
    told |= 1u << i;
    list[i].park(list[i].context);
  }
}

void park_end(void) {
  if (!depth || --depth) return;
  for (int i = PARKED_MAX; i-- > 0;) {
    if (!(told >> i & 1)) continue;
    list[i].unpark(list[i].context);
    atomic_fetch_sub(&list[i].inside, 1);
  }
  told = 0;
}

// A kernel of whoever registered: its own launch is nothing that it must leave for.
EXPORTED void concordia_park_exempt(void *function) {
  for (int i = 0; i < PARKED_MAX; i++) {
    void *free = NULL;
    if (atomic_compare_exchange_strong(&exempt[i], &free, function) || free == function) return;
  }
}

// Relaxed, here and below: a pointer says all there is to say, nothing is read through it.
static int is_exempt(void *function) {
  for (int i = 0; i < PARKED_MAX; i++)
    if (atomic_load_explicit(&exempt[i], memory_order_relaxed) == function) return 1;
  return 0;
}

// The first launch of a function may load its code, which waits.
static int is_first(void *function) {
  uint64_t at = (uint64_t)(uintptr_t)function * 0x9e3779b97f4a7c15ull >> 48;
  for (int i = 0; i < SEEN_PROBES; i++, at = (at + 1) % SEEN_SLOTS) {
    void *found = atomic_load_explicit(&seen[at], memory_order_relaxed);
    if (found == function) return 0;
    if (!found && atomic_compare_exchange_strong(&seen[at], &found, function)) return 1;
    if (found == function) return 0;
  }
  return 1;  // no room to remember it: parked once too often
}

// Code that is loaded later may have the handles of code that is gone.
void park_forget_launches(void) {
  for (int i = 0; i < SEEN_SLOTS; i++) atomic_store_explicit(&seen[i], NULL, memory_order_relaxed);
}

static __thread uint64_t has_parked;  // a bit for each launch of this call, the last one lowest

void park_before(const struct launch *launch) {
  has_parked <<= 1;
  if (!atomic_load_explicit(&count, memory_order_relaxed)) return;
  if (launch->kind != LAUNCH_COOPERATIVE && !is_first(launch->function)) return;
  if (is_exempt(launch->function)) return;
  has_parked |= 1;
  park_begin();
}

void park_after(const struct launch *launch, CUresult result) {
  (void)launch;
  (void)result;
  if (has_parked & 1) park_end();
  has_parked >>= 1;
}

// Who has registered, and its kernel, are the parent's.
void park_forked(void) {
  for (int i = 0; i < PARKED_MAX; i++) {
    atomic_store(&list[i].is_used, 0);
    atomic_store(&list[i].inside, 0);
    atomic_store(&exempt[i], NULL);
  }
  atomic_store(&count, 0);
  depth = 0;
  told = 0;
  has_parked = 0;
}

#define PARKED(call)       \
  do {                     \
    park_begin();          \
    CUresult result = call; \
    park_end();            \
    return result;         \
  } while (0)

static CUresult synchronized(void) {
  CUresult result = REAL(cuCtxSynchronize);
  if (result == CUDA_SUCCESS) addresses_settle();  // what is put off waits for no new work, mostly
  return result;
}

CUresult cuCtxSynchronize(void) { PARKED(synchronized()); }

CUresult cuCtxSynchronize_v2(CUcontext context) { PARKED(REAL(cuCtxSynchronize_v2, context)); }

CUresult cuMemFreeHost(void *address) { PARKED(REAL(cuMemFreeHost, address)); }

CUresult cuMemHostUnregister(void *address) { PARKED(REAL(cuMemHostUnregister, address)); }
