// The memory that is protected.
//
// Owns: the table of regions, their copies on the device and places in the stage, and the rules
// that find them. Promises: a region is an allocation that a rule of the policy names, or the part
// of one that a kernel's argument names; names are by the order of the program's own allocations,
// so a resumed program has the same; one that is freed is said, and no longer there; where one
// cannot be had, nothing is protected. Called by allocations.c and launches.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "protect.h"

#define WAIT_SAVER_MS 5000

struct region *regions[REGIONS_MAX];
int region_count;
uint64_t regions_generation;
uint64_t window_base;
CUdeviceptr window_map;
static uint64_t matched[RULES_MAX];      // allocations that a rule has met
static _Atomic uint64_t done_rules;      // kernel rules that have their region
static CUcontext context;
static CUdeviceptr garbage[REGIONS_MAX];  // copies whose region is gone
static int garbage_count;

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

// The window of what kernels mark: made once, around the first region.
static void make_window(uint64_t address) {
  CUdeviceptr map = 0;
  if (window_map) return;
  uint64_t base = address & ~(WINDOW_BYTES / 2 - 1);
  if (REAL(cuMemAlloc_v2, &map, WINDOW_BYTES >> MARK_SHIFT) != CUDA_SUCCESS) return;
  if (REAL(cuMemsetD8_v2, map, 0, WINDOW_BYTES >> MARK_SHIFT) != CUDA_SUCCESS ||
      !window_open(base, WINDOW_BYTES, map)) {
    REAL(cuMemFree_v2, map);
    return;
  }
  protect_lock();
  window_base = base;
  window_map = map;
  protect_unlock();
}

static void drop(struct region *region) {
  free(region->marks);
  free(region->taken);
  free(region);
}

static struct region *made(const char *name, uint64_t address, uint64_t bytes) {
  struct region *region = calloc(1, sizeof *region);
  if (!region) return NULL;
  snprintf(region->name, sizeof region->name, "%s", name);
  region->address = address;
  region->bytes = bytes;
  region->pages = (bytes + MARK_BYTES - 1) / MARK_BYTES;
  region->is_fresh = 1;
  region->marks = calloc(1, region->pages);
  region->taken = calloc(1, region->pages);
  uint64_t room = region->pages * MARK_BYTES;
  // The rest of the last page is brought, too. A whole number of pages needs no work on a stream.
  if (region->marks && region->taken &&
      REAL(cuMemAlloc_v2, &region->copy, room) == CUDA_SUCCESS &&
      (room == bytes || REAL(cuMemsetD8_v2, region->copy, 0, room) == CUDA_SUCCESS))
    return region;
  drop(region);
  return NULL;
}

static void add(const char *name, uint64_t address, uint64_t bytes) {
  CUcontext current = NULL;
  int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  REAL(cuCtxGetCurrent, &current);
  if (!context) context = current;
  if (current != context) {
    protect_lose("region %s is on another GPU, or in another context: one is protected", name);
    return;
  }
  REAL(cuThreadExchangeStreamCaptureMode, &mode);  // another stream may be capturing
  int is_ready = board_word() && reads_register();
  if (is_ready) make_window(address);
  struct region *region = is_ready ? made(name, address, bytes) : NULL;
  REAL(cuThreadExchangeStreamCaptureMode, &mode);
  if (!region) {
    protect_lose("no memory for the copy of region %s, %lu bytes", name, bytes);
    return;
  }
  region->is_outside = address < window_base || address + bytes > window_base + WINDOW_BYTES;
  protect_lock();
  int is_full = region_count == REGIONS_MAX;
  int has_place = find_place(region->pages * MARK_BYTES, &region->stage_offset);
  if (!is_full && has_place) {
    regions[region_count++] = region;
    regions_generation++;
  }
  protect_unlock();
  if (!is_full && has_place &&
      !stage_reserve(region->stage_offset, region->pages * MARK_BYTES))
    protect_lose("no room for the stage of region %s, %lu bytes", name, bytes);
  if (is_full) protect_lose("more than %d regions", REGIONS_MAX);
  else if (!has_place)
    protect_lose("regions of more than %lu bytes: make limits.stage larger", policy.stage_bytes);
}

void regions_allocated(uint64_t address, uint64_t bytes) {
  for (int i = 0; i < policy.rule_count; i++) {
    const struct rule *rule = &policy.rules[i];
    char name[NAME_MAX_BYTES + 24];
    if (rule->kernel[0] || bytes < rule->size_min || bytes > rule->size_max) continue;
    if (rule->stack[0] && !stack_matches(rule->stack)) continue;
    protect_lock();
    uint64_t ordinal = matched[i]++;
    protect_unlock();
    if (rule->ordinal >= 0 && (uint64_t)rule->ordinal != ordinal) continue;
    if (rule->ordinal >= 0) snprintf(name, sizeof name, "%s", rule->name);
    else snprintf(name, sizeof name, "%s.%lu", rule->name, ordinal);
    add(name, address, bytes);
    return;  // the first rule that names it
  }
}

void regions_launched(const struct kernel *kernel, const struct launch *launch) {
  uint64_t rules = kernel->rules & ~atomic_load(&done_rules);
  for (int i = 0; rules; i++, rules >>= 1) {
    struct allocation found = {0, 0};
    const struct rule *rule = &policy.rules[i];
    uint64_t word;
    if (!(rules & 1)) continue;
    if (atomic_fetch_or(&done_rules, 1ull << i) & 1ull << i) continue;
    if (!kernel_argument(kernel, launch->parameters, launch->extra, rule->argument, &word)) {
      protect_lose("region %s: kernel %s has no pointer %d", rule->name, kernel->name,
                   rule->argument);
      return;
    }
    protect_lock();
    int is_there = allocation_of(word, &found);
    protect_unlock();
    uint64_t start = rule->bytes ? word : found.address;
    uint64_t bytes = rule->bytes ? rule->bytes : found.bytes;
    if (!is_there || start + bytes > found.address + found.bytes) {
      protect_lose("region %s: argument %d of kernel %s is no memory of %lu bytes", rule->name,
                   rule->argument, kernel->name, bytes);
      return;
    }
    add(rule->name, start, bytes);
  }
}

void regions_freed(uint64_t address, uint64_t bytes) {
  for (;;) {
    struct region *gone = NULL;
    protect_lock();
    for (int i = 0; i < region_count && !gone; i++) {
      if (regions[i]->address - address >= bytes) continue;
      gone = regions[i];
      garbage[garbage_count % REGIONS_MAX] = gone->copy;
      garbage_count += garbage_count < REGIONS_MAX;
      memmove(&regions[i], &regions[i + 1], sizeof *regions * (size_t)(region_count - i - 1));
      region_count--;
      regions_generation++;
    }
    protect_unlock();
    if (!gone) return;
    if (atomic_load(&protect_mode) == PROTECT_RECORD)
      fprintf(stderr, "concordia: region %s is freed: it is no part of later checkpoints\n",
              gone->name);
    saver_forget(gone);
  }
}

void regions_sweep(void) {
  CUdeviceptr found[REGIONS_MAX];
  protect_lock();
  int count = garbage_count;
  memcpy(found, garbage, sizeof *found * (size_t)count);
  garbage_count = 0;
  protect_unlock();
  for (int i = 0; i < count; i++) REAL(cuMemFree_v2, found[i]);
}

int regions_drop_copies(void) {
  const struct timespec pause = {0, 1000000};
  protect_lock();
  int has_some = region_count > 0 || garbage_count > 0;
  protect_unlock();
  if (!has_some) return 0;
  protect_lose("the program needs the memory that protection took");
  // What reads them ends soon: nobody waits for an answer any more. In the worst case they stay.
  for (int waited_ms = 0; !saver_is_idle() && waited_ms < WAIT_SAVER_MS; waited_ms++)
    nanosleep(&pause, NULL);
  if (!saver_is_idle()) return 0;
  protect_lock();
  int count = region_count;
  region_count = 0;
  protect_unlock();
  for (int i = 0; i < count; i++) REAL(cuMemFree_v2, regions[i]->copy);
  regions_sweep();
  return 1;
}
