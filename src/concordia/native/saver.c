// Checkpoints of the regions: from a point in a stream to the agent.
//
// Owns: the copies at a point, and the thread that brings what changed to the stage. Promises: at a
// point the program's stream gets copies and one word to write, and nobody waits; one point is on
// its way at a time, others are counted and their marks stay; the stage changes only between two
// answers of the agent, so what it commits is one consistent cut; every wait is bounded, and at its
// bound protection ends. Called by points.c.
//
//   stream:  marks -> map copy, marks = 0 | regions -> copies | word = number
//   thread:  word? | marked pages of the copies -> stage | post | taken?
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "protect.h"

enum { MAP_BYTES = WINDOW_BYTES >> MARK_SHIFT, DEINITIALIZED = 4, NON_BLOCKING = 1 };
#define WAIT_WORK_S 600   // for the program's own work before a point
#define WAIT_AGENT_S 60   // longer than the agent takes for a checkpoint (PROGRAM_COMMIT_S)
#define POLL_NS 50000
#define POLL_NS_MAX 2000000

static _Atomic int is_busy;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wanted = PTHREAD_COND_INITIALIZER;
static int is_wanted, has_thread;  // under the lock
static struct region *held[REGIONS_MAX], *graves[REGIONS_MAX];
static int held_count, grave_count;
static struct {
  uint64_t ordinal, digest, reads_end, generation, map_first, map_count, is_audited;
} point;
static CUdeviceptr map_copy, word;
static uint8_t *map, *page_copy;

int saver_is_idle(void) { return !atomic_load(&is_busy); }

void saver_forget(struct region *region) {
  protect_lock();
  int is_full = grave_count == REGIONS_MAX;
  if (!is_full) graves[grave_count++] = region;
  protect_unlock();
  if (is_full) protect_lose("%d regions were freed between two points", REGIONS_MAX);
}

static void bury(void) {
  protect_lock();
  for (int i = 0; i < grave_count; i++) {
    free(graves[i]->marks);
    free(graves[i]->taken);
    free(graves[i]);
  }
  grave_count = 0;
  protect_unlock();
}

static int waited(uint64_t (*is_over)(void), int bound_s) {
  struct timespec start, now, pause = {0, POLL_NS};
  clock_gettime(CLOCK_MONOTONIC, &start);
  while (!is_over()) {
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec - start.tv_sec > bound_s) return 0;
    nanosleep(&pause, NULL);
    if (pause.tv_nsec < POLL_NS_MAX) pause.tv_nsec *= 2;
  }
  return 1;
}

static uint64_t is_written(void) {
  return atomic_load_explicit(&board->word, memory_order_acquire) == point.ordinal ||
         !IS_PROTECTED();
}
static uint64_t is_read(void) { return (uint64_t)reads_are_done(point.reads_end); }
static uint64_t is_taken(void) {
  return atomic_load_explicit(&board->taken, memory_order_acquire) ==
             atomic_load_explicit(&board->posted, memory_order_relaxed) ||
         atomic_load(&board->lost);
}

// A driver that is being taken down with the program is no failure of protection.
static int failed(CUresult result, const char *doing) {
  if (result == CUDA_SUCCESS) return 0;
  if (result != DEINITIALIZED && result != CUDA_ERROR_NOT_INITIALIZED)
    protect_lose("error %d of the driver: %s", result, doing);
  return 1;
}

// What kernels have marked of a region, whose pages need not lie as the map's do.
static void fold(struct region *region) {
  if (!window_map || region->is_outside || !point.map_count) return;
  for (uint64_t page = 0; page < region->pages; page++) {
    uint64_t start = region->address + page * MARK_BYTES - window_base;
    uint64_t last = region->address + (page + 1) * MARK_BYTES - 1 - window_base;
    for (uint64_t at = start >> MARK_SHIFT; at <= last >> MARK_SHIFT; at++)
      if (at - point.map_first < point.map_count && map[at - point.map_first])
        region->taken[page] = 1;
  }
}

static CUresult bring(struct region *region, uint64_t page, uint64_t count, CUstream stream) {
  return REAL(cuMemcpyDtoHAsync_v2, stage + region->stage_offset + page * MARK_BYTES,
              region->copy + page * MARK_BYTES, count * MARK_BYTES, stream);
}

// Compares what is not marked, too: what differs there was written by somebody unseen.
static CUresult audit(struct region *region, CUstream stream) {
  CUresult result = CUDA_SUCCESS;
  for (uint64_t page = 0; page < region->pages && result == CUDA_SUCCESS; page++) {
    if (region->taken[page]) continue;
    result = REAL(cuMemcpyDtoHAsync_v2, page_copy, region->copy + page * MARK_BYTES, MARK_BYTES,
                  stream);
    if (result == CUDA_SUCCESS) result = REAL(cuStreamSynchronize, stream);
    if (result == CUDA_SUCCESS &&
        memcmp(page_copy, stage + region->stage_offset + page * MARK_BYTES, MARK_BYTES) != 0) {
      if (atomic_fetch_add(&board->missed_pages, 1) == 0)
        fprintf(stderr, "concordia: page %lu of region %s changed unseen\n", page, region->name);
      region->taken[page] = 1;
    }
  }
  return result;
}

static CUresult bring_all(CUstream stream) {
  CUresult result = CUDA_SUCCESS;
  for (int i = 0; i < held_count && result == CUDA_SUCCESS; i++) {
    struct region *region = held[i];
    fold(region);
    if (point.is_audited) result = audit(region, stream);
    for (uint64_t page = 0, count; page < region->pages && result == CUDA_SUCCESS; page += count) {
      int is_marked = region->taken[page];
      for (count = 1; page + count < region->pages && region->taken[page + count] == is_marked;)
        count++;
      if (is_marked) result = bring(region, page, count, stream);
      region->pages_marked += is_marked ? count : 0;
    }
    region->posts++;
  }
  return result == CUDA_SUCCESS ? REAL(cuStreamSynchronize, stream) : result;
}

static void post(void) {
  uint8_t *marks = (uint8_t *)board + BOARD_MARKS_AT;
  struct board_region *rows = (struct board_region *)(void *)((uint8_t *)board + BOARD_REGIONS_AT);
  for (int i = 0; i < held_count; i++) {
    const struct region *region = held[i];
    struct board_region *row = &rows[i];
    memset(row, 0, sizeof *row);
    memcpy(row->name, region->name, sizeof row->name);
    row->bytes = region->bytes;
    row->stage_offset = region->stage_offset;
    row->pages = region->pages;
    row->pages_marked = region->pages_marked;
    row->posts = region->posts;
    row->address = region->address;
    memcpy(marks + region->stage_offset / MARK_BYTES, region->taken, region->pages);
  }
  board->region_count = (uint64_t)held_count;
  board->ordinal = point.ordinal;
  board->reads_bytes = point.reads_end;
  board->digest = point.digest;
  board->generation = point.generation;
  board->is_audited = point.is_audited;
  if (point.is_audited) atomic_fetch_add(&board->audits, 1);
  atomic_fetch_add_explicit(&board->posted, 1, memory_order_release);
}

static int save(CUstream stream) {
  if (!waited(is_written, WAIT_WORK_S)) {
    protect_lose("the work before point %lu is not done after %d s", point.ordinal, WAIT_WORK_S);
    return 0;
  }
  if (!IS_PROTECTED()) return 0;
  if (point.map_count &&
      (failed(REAL(cuMemcpyDtoHAsync_v2, map, map_copy + point.map_first, point.map_count, stream),
              "bring the marks") ||
       failed(REAL(cuStreamSynchronize, stream), "bring the marks")))
    return 0;
  if (failed(bring_all(stream), "bring the pages that changed")) return 0;
  if (!waited(is_read, WAIT_WORK_S)) {
    protect_lose("what was read before point %lu is not there after %d s", point.ordinal,
                 WAIT_WORK_S);
    return 0;
  }
  post();
  if (!waited(is_taken, WAIT_AGENT_S)) {
    protect_lose("the agent has not answered for %d s", WAIT_AGENT_S);
    return 0;
  }
  if (atomic_load(&board->lost)) protect_lose("%.200s", board->reason);
  for (int i = 0; i < held_count; i++) memset(held[i]->taken, 0, held[i]->pages);
  return IS_PROTECTED();
}

static void *work(void *unused) {
  CUstream stream = NULL;
  int mode = CU_STREAM_CAPTURE_MODE_RELAXED;  // what we do disturbs no capture
  REAL(cuCtxPushCurrent_v2, regions_context());
  REAL(cuThreadExchangeStreamCaptureMode, &mode);
  int is_good = !failed(REAL(cuStreamCreate, &stream, NON_BLOCKING), "make a stream");
  while (is_good) {
    pthread_mutex_lock(&lock);
    while (!is_wanted) pthread_cond_wait(&wanted, &lock);
    is_wanted = 0;
    pthread_mutex_unlock(&lock);
    is_good = save(stream);
    atomic_store(&is_busy, 0);
  }
  return unused;
}

// Once, at the first point: what all points need.
static int prepare(void) {
  pthread_t thread;
  if (has_thread) return 1;
  word = board_word();
  map = malloc(MAP_BYTES);
  page_copy = malloc(MARK_BYTES);
  if (!word || !map || !page_copy) return 0;
  if (window_map &&
      failed(REAL(cuMemAlloc_v2, &map_copy, MAP_BYTES), "allocate a copy of the marks"))
    return 0;
  if (pthread_create(&thread, NULL, work, NULL) != 0) {
    protect_lose("no thread can be made");
    return 0;
  }
  pthread_detach(thread);
  has_thread = 1;
  return 1;
}

// With protect_lock: the regions and marks of this point.
static void take(void) {
  uint64_t first = UINT64_MAX, last = 0;
  held_count = region_count;
  point.generation = regions_generation;
  for (int i = 0; i < region_count; i++) {
    struct region *region = held[i] = regions[i];
    uint8_t *marks = region->marks;
    region->marks = region->taken;  // all zero
    region->taken = marks;
    if (region->is_whole || region->is_fresh) memset(region->taken, 1, region->pages);
    region->is_whole = region->is_fresh = 0;
    if (!window_map || region->is_outside) continue;
    uint64_t start = (region->address - window_base) >> MARK_SHIFT;
    uint64_t end = (region->address + region->pages * MARK_BYTES - 1 - window_base) >> MARK_SHIFT;
    first = start < first ? start : first;
    last = end > last ? end : last;
  }
  point.map_first = first;
  point.map_count = first <= last && map_copy ? last - first + 1 : 0;
}

static int has_marks(const struct region *region) {
  return memchr(region->taken, 1, region->pages) != NULL;
}

static CUresult copy_all(CUstream stream, int per_thread) {
  CUresult result = CUDA_SUCCESS;
  // The marks first: a store is marked behind it, so what a page gets after its copy is marked for
  // the next point.
  if (point.map_count) {
    result = STREAM_CALL(per_thread, cuMemcpyDtoDAsync_v2, map_copy + point.map_first,
                         window_map + point.map_first, point.map_count, stream);
    if (result == CUDA_SUCCESS)
      result = STREAM_CALL(per_thread, cuMemsetD8Async, window_map + point.map_first, 0,
                           point.map_count, stream);
  }
  for (int i = 0; i < held_count && result == CUDA_SUCCESS; i++) {
    const struct region *region = held[i];
    int is_known = !point.map_count || region->is_outside;  // all of its marks are here
    if (is_known && !point.is_audited && !has_marks(region)) continue;
    result = STREAM_CALL(per_thread, cuMemcpyDtoDAsync_v2, region->copy, region->address,
                         region->bytes, stream);
  }
  if (result == CUDA_SUCCESS)
    result = STREAM_CALL(per_thread, cuStreamWriteValue64_v2, stream, word, point.ordinal, 0);
  return result;
}

void saver_fire(CUstream stream, int is_per_thread, uint64_t ordinal, uint64_t digest,
                uint64_t reads_end) {
  int nobody = 0, mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  if (!region_count || is_capturing(stream, is_per_thread)) return;
  if (!atomic_compare_exchange_strong(&is_busy, &nobody, 1)) {
    atomic_fetch_add(&board->coalesced, 1);
    return;
  }
  REAL(cuThreadExchangeStreamCaptureMode, &mode);
  int is_ready = prepare();
  if (is_ready) {
    regions_sweep();
    bury();
    is_ready = streams_join(stream, is_per_thread);
    if (!is_ready) atomic_fetch_add(&board->unjoined, 1);
  }
  if (is_ready) {
    point.ordinal = ordinal;
    point.digest = digest;
    point.reads_end = reads_end;
    uint64_t number = atomic_fetch_add(&board->fired, 1) + 1;
    point.is_audited = policy.audit && number % policy.audit == 0;
    protect_lock();
    take();
    protect_unlock();
    is_ready = !failed(copy_all(stream, is_per_thread), "copy the regions");
    streams_release(stream, is_per_thread);
  }
  REAL(cuThreadExchangeStreamCaptureMode, &mode);
  if (!is_ready) {
    atomic_store(&is_busy, 0);
    return;
  }
  pthread_mutex_lock(&lock);
  is_wanted = 1;
  pthread_cond_signal(&wanted);
  pthread_mutex_unlock(&lock);
}
