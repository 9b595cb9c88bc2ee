// The points of a program's work at which it may be saved, or is gone on with.
//
// Owns: the count of points, and the digest of what was launched so far and on which places of the
// regions. Promises: the count depends on the program's calls alone, not on time; a point is passed
// after the call that made it one; nothing here waits for the device, but for the one point at
// which a resumed program is given its bytes. Called by marks.c and the hooks of synchronisation.
#define _GNU_SOURCE
#include <stdio.h>
#include <time.h>

#include "protect.h"

static uint64_t ordinal, digest = 0xcbf29ce484222325ull;
static uint64_t counts[TRIGGERS_MAX], fired_us[TRIGGERS_MAX];

uint64_t points_digest(void) { return digest; }

static uint64_t now_us(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static void mix(uint64_t word) { digest = ((digest ^ word) * 0x100000001b3ull) + (digest >> 31); }

// With the lock. A program whose allocator takes other places than it did, be it because addresses
// have another order, is not one that goes on with the bytes that lay there. Launches alone say so:
// a copy may come from a thread of its own, in any order.
static void mix_place(uint64_t word, uint64_t at, void *unused) {
  (void)unused;
  uint64_t place = regions_place(word, at);
  if (place) mix(place);
}

// With the lock.
static int is_due(int trigger) {
  return ++counts[trigger] % policy.triggers[trigger].every == 0;
}

static void pass(CUstream stream, int is_per_thread, uint32_t hits) {
  uint64_t end, now = now_us(), here, is_wanted = 0;
  protect_lock();
  int mode = atomic_load(&protect_mode);
  here = ++ordinal;
  uint64_t found = digest;
  int is_good = mode != PROTECT_OFF && reads_point(here, found, &end);
  for (int i = 0; i < policy.trigger_count; i++) {
    if (!(hits >> i & 1) || mode != PROTECT_RECORD) continue;
    if (fired_us[i] && now - fired_us[i] < policy.triggers[i].interval_us) continue;
    fired_us[i] = now;
    is_wanted = 1;
  }
  protect_unlock();
  if (!is_good) return;
  atomic_store(&board->points, here);
  if (is_wanted) saver_fire(stream, is_per_thread, here, found, end);
  if (mode == PROTECT_RECORD) return;
  if (here == forward_target) forward_restore();
  else if (here >= policy.warm) atomic_store(&protect_mode, PROTECT_FORWARD);
}

void points_launched(const struct launch *launch, const struct kernel *kernel,
                     uint64_t graph_hash) {
  uint32_t hits = 0;
  if (!board_claim()) return;
  protect_lock();
  mix(kernel ? kernel->hash : graph_hash);
  for (int i = 0; i < 3; i++) mix(launch->grid[i] ^ (uint64_t)launch->block[i] << 32);
  mix(launch->shared_bytes);
  if (kernel)
    arguments_small_words(kernel, launch->parameters, launch->extra, mix_place, NULL);
  for (int i = 0; i < policy.trigger_count; i++) {
    int is_one = kernel ? kernel->triggers >> i & 1 : policy.triggers[i].on == ON_GRAPH;
    if (is_one && is_due(i)) hits |= 1u << i;
  }
  protect_unlock();
  if (hits) pass(launch->stream, launch->is_per_thread, hits);
}

void points_synchronized(CUstream stream, int is_per_thread) {
  uint32_t hits = 0;
  if (!IS_PROTECTED() || !board_claim()) return;
  protect_lock();
  for (int i = 0; i < policy.trigger_count; i++)
    if (policy.triggers[i].on == ON_SYNCHRONIZE && is_due(i)) hits |= 1u << i;
  protect_unlock();
  if (hits) pass(stream, is_per_thread, hits);
}

CUresult cuStreamSynchronize(CUstream stream) {
  CUresult result = REAL(cuStreamSynchronize, stream);
  if (result == CUDA_SUCCESS) points_synchronized(stream, 0);
  return result;
}

CUresult cuStreamSynchronize_ptsz(CUstream stream) {
  CUresult result = REAL(cuStreamSynchronize_ptsz, stream);
  if (result == CUDA_SUCCESS) points_synchronized(stream, 1);
  return result;
}
