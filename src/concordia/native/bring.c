// A point on its way to the agent.
//
// Owns: the copies of what changed into the stage, and the post. Promises: nothing is copied before
// the stream has come to the point, nor posted before everything that the program read until then
// is logged; what was posted stays as it is until the agent has answered; every wait is bounded,
// and at its bound protection ends. Called by the thread of saver.c.
#define _GNU_SOURCE
#include <string.h>
#include <time.h>

#include "saver.h"

#define WAIT_WORK_S 600      // for the program's own work before a point, however long its kernels
#define WAIT_AGENT_S 60      // longer than the agent takes for a checkpoint (PROGRAM_COMMIT_S)
#define POLL_NS 50000        // a point takes some hundred microseconds
#define POLL_NS_MAX 2000000  // and where it takes longer, two milliseconds more hurt nobody

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

// Acquire: what the stream did before it wrote the word is there. Its partner is the write of
// copy_all(), which the driver orders behind the copies.
static uint64_t is_written(void) {
  return atomic_load_explicit(&board->word, memory_order_acquire) == point.ordinal ||
         !IS_PROTECTED();
}
static uint64_t is_read(void) { return reads_are_done(point.reads_end) || !IS_PROTECTED(); }
// Acquire: the agent is done with the stage. Its partner is the store of `taken` in
// program_pages.py answer(), which comes last. `posted` is of this thread alone.
static uint64_t is_taken(void) {
  return atomic_load_explicit(&board->taken, memory_order_acquire) ==
             atomic_load_explicit(&board->posted, memory_order_relaxed) ||
         atomic_load(&board->lost);
}

// A driver that is being taken down with the program is no failure of protection.
int bring_failed(CUresult result, const char *doing) {
  if (result == CUDA_SUCCESS) return 0;
  if (result != CUDA_ERROR_DEINITIALIZED && result != CUDA_ERROR_NOT_INITIALIZED)
    protect_lose("error %d of the driver: %s", result, doing);
  return 1;
}

// Of one piece; the compiler makes vectors of it.
static void join(uint64_t *restrict all, const uint64_t *restrict some) {
  for (int i = 0; i < MAP_ROW_WORDS; i++) all[i] |= some[i];
}

// The copies of the map become one: a page is marked when it is in any of them. Rows are brought
// whole; what lies behind the marks in a row is nobody's.
static CUresult bring_map(CUstream stream) {
  uint64_t *all = (uint64_t *)(void *)point.map, words = point.map_row / sizeof *all;
  CUresult result = REAL(cuMemcpyDtoHAsync_v2, point.map, point.map_copy,
                         CONTROL_MAP_COPIES * point.map_row, stream);
  if (result == CUDA_SUCCESS) result = REAL(cuStreamSynchronize, stream);
  if (result != CUDA_SUCCESS) return result;
  for (uint64_t at = 0; at < words; at += MAP_ROW_WORDS)
    for (uint64_t copy = 1; copy < CONTROL_MAP_COPIES; copy++)
      join(all + at, all + copy * words + at);
  return CUDA_SUCCESS;
}

// What kernels have marked of a region, whose pages need not lie as the map's do.
static void fold(struct region *region) {
  if (!window_map || region->is_outside || !point.map_count) return;
  for (uint64_t page = 0; page < region->pages; page++) {
    uint64_t start = region->address + page * MARK_BYTES - window_base;
    uint64_t last = region->address + (page + 1) * MARK_BYTES - 1 - window_base;
    for (uint64_t at = start >> MARK_SHIFT; at <= last >> MARK_SHIFT; at++)
      if (at - point.map_first < point.map_count && point.map[at - point.map_first])
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
    result = REAL(cuMemcpyDtoHAsync_v2, point.page_copy, region->copy + page * MARK_BYTES,
                  MARK_BYTES,
                  stream);
    if (result == CUDA_SUCCESS) result = REAL(cuStreamSynchronize, stream);
    if (result == CUDA_SUCCESS &&
        memcmp(point.page_copy, stage + region->stage_offset + page * MARK_BYTES,
               MARK_BYTES) != 0) {
      if (atomic_fetch_add(&board->missed_pages, 1) == 0)
        notice("concordia: page %lu of region %s changed unseen", page, region->name);
      region->taken[page] = 1;
    }
  }
  return result;
}

static CUresult bring_all(CUstream stream) {
  CUresult result = CUDA_SUCCESS;
  for (int i = 0; i < point.held_count && result == CUDA_SUCCESS; i++) {
    struct region *region = point.held[i];
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
  for (int i = 0; i < point.held_count; i++) {
    const struct region *region = point.held[i];
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
  board->region_count = (uint64_t)point.held_count;
  board->ordinal = point.ordinal;
  board->reads_bytes = point.reads_end;
  board->digest = point.digest;
  board->generation = point.generation;
  board->is_audited = point.is_audited;
  if (point.is_audited) atomic_fetch_add(&board->audits, 1);
  // Release: what is above and the stage come first. Its partner is the load of `posted` in
  // program_pages.py post().
  atomic_fetch_add_explicit(&board->posted, 1, memory_order_release);
}

int bring_point(CUstream stream) {
  if (!waited(is_written, WAIT_WORK_S)) {
    protect_lose("the work before point %lu is not done after %d s", point.ordinal, WAIT_WORK_S);
    return 0;
  }
  if (!IS_PROTECTED()) return 0;
  if (point.map_count && bring_failed(bring_map(stream), "bring the marks")) return 0;
  if (bring_failed(bring_all(stream), "bring the pages that changed")) return 0;
  if (!waited(is_read, WAIT_WORK_S)) {
    protect_lose("what was read before point %lu is not there after %d s", point.ordinal,
                 WAIT_WORK_S);
    return 0;
  }
  if (!IS_PROTECTED()) return 0;
  post();
  if (!waited(is_taken, WAIT_AGENT_S)) {
    protect_lose("the agent has not answered for %d s", WAIT_AGENT_S);
    return 0;
  }
  if (atomic_load(&board->lost)) protect_lose("%.200s", board->reason);
  for (int i = 0; i < point.held_count; i++) memset(point.held[i]->taken, 0, point.held[i]->pages);
  return IS_PROTECTED();
}
