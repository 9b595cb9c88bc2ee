// The memory that is protected.
//
// Owns: the table of regions, their copies on the device and places in the stage. Promises: one that
// is freed is said, and no longer there; where one cannot be had, nothing is protected; one thread
// at a time adds, in a stream of our own, so that a capture beside it is not disturbed. Called by
// region_rules.c, which says what is a region, and by allocations.c.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "control.h"
#include "protect.h"

enum { NON_BLOCKING = 1, FREED_SAID = 100 };
#ifndef WAIT_SAVER_MS  // tests have no such time
#define WAIT_SAVER_MS 5000  // for copies to end that nobody wants any more
#endif

struct region *regions[REGIONS_MAX];
int region_count;
uint64_t regions_generation;
static uint64_t lowest, highest;  // all regions lie between
uint64_t window_base;
CUdeviceptr window_map;
static CUcontext context;
static CUdeviceptr garbage[REGIONS_MAX];  // copies whose region is gone
static int garbage_count;
static pthread_mutex_t adding = PTHREAD_MUTEX_INITIALIZER;  // before protect_lock
static CUstream filler;  // waits for nobody, and nobody for it; of whoever has `adding`

CUcontext regions_context(void) { return context; }

// The lowest place in the stage with room; with the lock. They are few: tried one after another.
static int find_place(uint64_t bytes, uint64_t *place) {
  uint64_t at = 0;
  for (int moved = 1; moved;) {
    moved = 0;
    for (int i = 0; i < region_count; i++) {
      uint64_t start = regions[i]->stage_offset, size = regions[i]->pages * MARK_BYTES;
      if (at < start + size && start < at + bytes) {
        at = start + size;
        moved = 1;
      }
    }
  }
  *place = at;
  return at + bytes <= policy.stage_bytes;
}

static CUresult filled(CUdeviceptr target, uint64_t bytes) {
  CUresult result = REAL(cuMemsetD8Async, target, 0, bytes, filler);
  return result == CUDA_SUCCESS ? REAL(cuStreamSynchronize, filler) : result;
}

// It waits for all work: who has a kernel that stays is told.
static void free_ours(CUdeviceptr address) {
  int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  REAL(cuThreadExchangeStreamCaptureMode, &mode);
  park_begin();
  REAL(cuMemFree_v2, address);
  park_end();
  REAL(cuThreadExchangeStreamCaptureMode, &mode);
}

// The window of what kernels mark: made once, around the first region, or never: what points need
// is prepared with it.
static void make_window(uint64_t address) {
  static int is_tried;
  CUdeviceptr map = 0;
  if (is_tried++) return;
  uint64_t base = address & ~(CONTROL_WINDOW_BYTES / 2 - 1);
  uint64_t bytes = (uint64_t)CONTROL_MAP_COPIES * CONTROL_MAP_STRIDE;
  if (REAL(cuMemAlloc_v2, &map, bytes) != CUDA_SUCCESS) return;
  if (filled(map, bytes) != CUDA_SUCCESS ||
      !window_open(base, CONTROL_WINDOW_BYTES, map, filler)) {
    free_ours(map);
    return;
  }
  protect_lock();
  window_base = base;
  window_map = map;
  protect_unlock();
}

static void drop(struct region *region) {
  if (region->copy) free_ours(region->copy);
  free(region->marks);
  free(region->taken);
  free(region);
}

static struct region *made(const char *name, const struct allocation *at) {
  struct region *region = calloc(1, sizeof *region);
  uint64_t address = at->address, bytes = at->bytes;
  if (!region) return NULL;
  snprintf(region->name, sizeof region->name, "%s", name);
  region->call = at->call;
  region->address = address;
  region->bytes = bytes;
  region->pages = (bytes + MARK_BYTES - 1) / MARK_BYTES;
  region->is_fresh = 1;
  region->is_outside =
      address < window_base || address + bytes > window_base + CONTROL_WINDOW_BYTES;
  region->marks = calloc(1, region->pages);
  region->taken = calloc(1, region->pages);
  uint64_t room = region->pages * MARK_BYTES;
  // The rest of the last page is brought, too.
  if (region->marks && region->taken &&
      REAL(cuMemAlloc_v2, &region->copy, room) == CUDA_SUCCESS &&
      (room == bytes || filled(region->copy + bytes, room - bytes) == CUDA_SUCCESS))
    return region;
  drop(region);
  return NULL;
}

// A place that is found stays free until it is taken: only one thread adds.
static int is_placed(struct region *region) {
  uint64_t room = region->pages * MARK_BYTES;
  protect_lock();
  int is_full = region_count == REGIONS_MAX;
  int has_place = find_place(room, &region->stage_offset);
  protect_unlock();
  if (is_full) protect_lose("more than %d regions", REGIONS_MAX);
  else if (!has_place)
    protect_lose("regions of more than %lu bytes: make limits.stage larger", policy.stage_bytes);
  else if (!stage_reserve(region->stage_offset, room))
    protect_lose("no room for the stage of region %s, %lu bytes", region->name, region->bytes);
  else return 1;
  return 0;
}

// With the lock.
uint64_t regions_place(uint64_t word, uint64_t at) {
  if (word - lowest >= highest - lowest) return 0;
  for (int i = 0; i < region_count; i++) {
    uint64_t offset = word - regions[i]->address;
    if (offset < regions[i]->bytes) return ((uint64_t)i + 1) << 48 ^ offset ^ at << 52;
  }
  return 0;
}

// With `adding`.
static void add_alone(const char *name, const struct allocation *at) {
  CUcontext current = NULL;
  REAL(cuCtxGetCurrent, &current);
  if (!context) context = current;
  if (current != context) {
    protect_lose("region %s is on another GPU, or in another context: one is protected", name);
    return;
  }
  if (!filler && REAL(cuStreamCreate, &filler, NON_BLOCKING) != CUDA_SUCCESS) {
    protect_lose("no stream can be made");
    return;
  }
  if (!board_word() || !reads_register()) return;
  make_window(at->address);
  saver_prepare();
  if (!IS_PROTECTED()) return;
  struct region *region = made(name, at);
  if (!region) {
    protect_lose("no memory for the copy of region %s, %lu bytes", name, at->bytes);
    return;
  }
  if (!is_placed(region)) {
    drop(region);
    return;
  }
  protect_lock();
  regions[region_count++] = region;
  regions_generation++;
  // never smaller again: they only spare most words of arguments a search
  if (region->address < lowest || lowest == highest) lowest = region->address;
  if (region->address + region->bytes > highest) highest = region->address + region->bytes;
  protect_unlock();
}

void regions_add(const char *name, const struct allocation *at) {
  int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  REAL(cuThreadExchangeStreamCaptureMode, &mode);  // another stream may be capturing
  pthread_mutex_lock(&adding);
  if (IS_PROTECTED()) add_alone(name, at);
  pthread_mutex_unlock(&adding);
  REAL(cuThreadExchangeStreamCaptureMode, &mode);
}

// A program may free one in each of its steps, for days.
static void say_freed(const struct region *region) {
  static _Atomic uint64_t freed;
  uint64_t before = atomic_fetch_add_explicit(&freed, 1, memory_order_relaxed);
  if (before < FREED_SAID)
    notice("concordia: region %s is freed: it is no part of later checkpoints", region->name);
  else if (before == FREED_SAID)
    notice("concordia: more than %d regions were freed: no more of them are named", FREED_SAID);
}

void regions_freed(uint64_t address, uint64_t bytes) {
  for (;;) {
    struct region *gone = NULL;
    protect_lock();
    for (int i = 0; i < region_count && !gone; i++) {
      if (regions[i]->address - address >= bytes) continue;
      gone = regions[i];
      // Where there is no room the copy stays: saver_forget() ends the protection.
      if (garbage_count < REGIONS_MAX) garbage[garbage_count++] = gone->copy;
      memmove(&regions[i], &regions[i + 1], sizeof *regions * (size_t)(region_count - i - 1));
      region_count--;
      regions_generation++;
    }
    int is_much = garbage_count >= REGIONS_MAX / 2;
    protect_unlock();
    if (!gone) return;
    int is_recording = atomic_load(&protect_mode) == PROTECT_RECORD;
    if (is_recording) say_freed(gone);
    saver_forget(gone);
    // At points, otherwise; a resumed program has none yet.
    if (!is_recording || is_much) saver_sweep();
  }
}

void regions_sweep(void) {
  CUdeviceptr found[REGIONS_MAX];
  protect_lock();
  int count = garbage_count;
  memcpy(found, garbage, sizeof *found * (size_t)count);
  garbage_count = 0;
  protect_unlock();
  for (int i = 0; i < count; i++) free_ours(found[i]);
}

int regions_drop_copies(void) {
  static _Atomic int is_stuck;  // then each further call only looks
  protect_lock();
  int has_some = region_count > 0 || garbage_count > 0 || window_map;
  protect_unlock();
  if (!has_some) return 0;
  protect_lose("the program needs the memory that protection took");
  // What reads them ends soon: nobody waits for an answer any more. In the worst case they stay.
  if (!saver_take(atomic_load(&is_stuck) ? 0 : WAIT_SAVER_MS)) {
    atomic_store(&is_stuck, 1);
    return 0;
  }
  protect_lock();
  int count = region_count, has_garbage = garbage_count > 0;
  region_count = 0;
  protect_unlock();
  for (int i = 0; i < count; i++) free_ours(regions[i]->copy);
  regions_sweep();
  // The map itself stays: kernels that run may still mark in it.
  CUdeviceptr copy = saver_drop_copy();
  if (copy) free_ours(copy);
  saver_give();
  return copy || count > 0 || has_garbage;
}
