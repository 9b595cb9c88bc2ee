// Checkpoints of the regions: from a point in a stream to the agent.
//
// Owns: the copies at a point, and the thread that brings what changed to the stage. Promises: at a
// point the program's stream gets copies and one word to write, and nobody waits; one point is on
// its way at a time, others are counted and their marks stay; the stage changes only between two
// answers of the agent, so what it commits is one consistent cut; every wait is bounded, and at its
// bound protection ends. Called by points.c.
//
//   stream:  marks -> snapshot, marks = 0 | regions -> copies | word = number
//   thread:  word? | marked pages of the copies -> stage | post | taken?
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "copies.h"
#include "saver.h"

enum { NON_BLOCKING = 1 };
enum { STACK_BYTES = 1 << 20 };  // calls of the driver, and a line to print
enum { MISSES_SAID = 100 };  // two seconds, at the interval of the example

static _Atomic int is_busy;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wanted = PTHREAD_COND_INITIALIZER;
static int is_wanted;            // under the lock
static _Atomic uint64_t copied;  // the last point whose copies are in a stream; 0: there was none
static int has_thread, misses;   // of whoever has is_busy
static struct region *graves[REGIONS_MAX];
static int grave_count;
struct point point;
static CUdeviceptr word;

int saver_take(int bound_ms) {
  const struct timespec pause = {0, 1000000};
  for (int waited_ms = 0;; waited_ms++) {
    int nobody = 0;
    if (atomic_compare_exchange_strong(&is_busy, &nobody, 1)) return 1;
    if (waited_ms >= bound_ms) return 0;
    nanosleep(&pause, NULL);
  }
}

void saver_give(void) { atomic_store(&is_busy, 0); }

// Also when protection has ended meanwhile: what is in a stream is done all the same.
int saver_is_copying(void) {
  uint64_t ordinal = atomic_load(&copied);
  return ordinal && atomic_load(&board->word) != ordinal;
}

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

void saver_sweep(void) {
  if (!saver_take(0)) return;
  regions_sweep();
  bury();
  saver_give();
}

static void *work(void *stream) {
  int mode = CU_STREAM_CAPTURE_MODE_RELAXED, is_good = 1;  // what we do disturbs no capture
  REAL(cuCtxPushCurrent_v2, regions_context());
  REAL(cuThreadExchangeStreamCaptureMode, &mode);
  while (is_good) {
    pthread_mutex_lock(&lock);
    while (!is_wanted) pthread_cond_wait(&wanted, &lock);
    is_wanted = 0;
    pthread_mutex_unlock(&lock);
    is_good = bring_point(stream);
    saver_give();
  }
  return stream;
}

// Signals are for the program's threads; the mask is inherited.
static int has_started(CUstream stream) {
  pthread_t thread;
  pthread_attr_t attributes;
  sigset_t all, before;
  if (pthread_attr_init(&attributes)) return 0;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int is_made = pthread_create(&thread, &attributes, work, stream) == 0;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  return is_made;
}

// Once: what all points need.
static int prepare(void) {
  CUstream stream = NULL;
  if (has_thread || !IS_PROTECTED()) return has_thread;
  word = board_word();
  if (!word) return 0;
  point.map = malloc(SNAPSHOT_BYTES);  // of which a page is there once it is used
  point.page_copy = malloc(MARK_BYTES);
  if (!point.map || !point.page_copy) {
    protect_lose("no memory for the marks of a point");
    return 0;
  }
  if (window_map && bring_failed(REAL(cuMemAlloc_v2, &point.map_copy, SNAPSHOT_BYTES),
                                 "allocate a copy of the marks"))
    return 0;
  if (bring_failed(REAL(cuStreamCreate, &stream, NON_BLOCKING), "make a stream")) return 0;
  has_thread = has_started(stream);
  if (!has_thread) protect_lose("no thread can be made");
  return has_thread;
}

void saver_prepare(void) {
  if (!saver_take(0)) return;  // whoever has it has prepared all
  prepare();
  saver_give();
}

CUdeviceptr saver_drop_copy(void) {
  CUdeviceptr copy = point.map_copy;
  point.map_copy = 0;
  return copy;
}

// With protect_lock: the regions and marks of this point.
static void take(void) {
  uint64_t first = UINT64_MAX, last = 0;
  point.held_count = region_count;
  point.generation = regions_generation;
  for (int i = 0; i < region_count; i++) {
    struct region *region = point.held[i] = regions[i];
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
  if (last >= CONTROL_MAP_BYTES) last = CONTROL_MAP_BYTES - 1;  // the rest of a last page
  point.map_first = first;
  point.map_count = first <= last && point.map_copy ? last - first + 1 : 0;
  point.map_row = (point.map_count + MAP_ROW - 1) & ~(uint64_t)(MAP_ROW - 1);
}

// Not to be taken: the marks stay. When it happens always, somebody must be told.
static void missed(void) {
  atomic_fetch_add(&board->unjoined, 1);
  if (++misses == MISSES_SAID)
    notice("concordia: %d points one after another found a capture, calls of other threads under "
           "way, or a stream that cannot be waited for: there are no checkpoints meanwhile",
           MISSES_SAID);
}

static int has_marks(const struct region *region) {
  return memchr(region->taken, 1, region->pages) != NULL;
}

// All copies of the map in two calls: the program waits for them.
static CUresult take_map(CUstream stream, int per_thread) {
  CUdeviceptr first = window_map + point.map_first;
  CUDA_MEMCPY2D copy = {
      .source = {.type = MEMORY_DEVICE, .device = first, .pitch = CONTROL_MAP_STRIDE},
      .target = {.type = MEMORY_DEVICE, .device = point.map_copy, .pitch = point.map_row},
      .width = point.map_count,
      .height = CONTROL_MAP_COPIES};
  CUresult result = STREAM_CALL(per_thread, cuMemcpy2DAsync_v2, &copy, stream);
  if (result != CUDA_SUCCESS) return result;
  return STREAM_CALL(per_thread, cuMemsetD2D8Async, first, CONTROL_MAP_STRIDE, 0, point.map_count,
                     CONTROL_MAP_COPIES, stream);
}

static CUresult copy_all(CUstream stream, int per_thread) {
  // The marks first: a store is marked behind it, so what a page gets after its copy is marked for
  // the next point.
  CUresult result = point.map_count ? take_map(stream, per_thread) : CUDA_SUCCESS;
  for (int i = 0; i < point.held_count && result == CUDA_SUCCESS; i++) {
    const struct region *region = point.held[i];
    int is_known = !point.map_count || region->is_outside;  // all of its marks are here
    if (is_known && !point.is_audited && !has_marks(region)) continue;
    result = STREAM_CALL(per_thread, cuMemcpyDtoDAsync_v2, region->copy, region->address,
                         region->bytes, stream);
  }
  if (result == CUDA_SUCCESS)
    result = STREAM_CALL(per_thread, cuStreamWriteValue64_v2, stream, word, point.ordinal, 0);
  return result;
}

// With the door closed: what the point has, and its copies into the stream.
static int fired(CUstream stream, int is_per_thread) {
  // A capture may have begun before the door was closed.
  if (is_capturing(stream, is_per_thread) || !streams_join(stream, is_per_thread)) {
    missed();
    return 0;
  }
  misses = 0;
  uint64_t number = atomic_fetch_add(&board->fired, 1) + 1;
  point.is_audited = policy.audit && number % policy.audit == 0;
  atomic_store(&copied, point.ordinal);  // before: whoever sees a region taken sees this
  protect_lock();
  take();
  protect_unlock();
  if (bring_failed(copy_all(stream, is_per_thread), "copy the regions")) {
    atomic_store(&copied, 0);  // the word never comes
    return 0;
  }
  if (streams_release(stream, is_per_thread)) return 1;
  protect_lose("what comes after a point cannot be told to wait for its copies");
  return 0;
}

void saver_fire(CUstream stream, int is_per_thread, uint64_t ordinal, uint64_t digest,
                uint64_t reads_end) {
  int mode = CU_STREAM_CAPTURE_MODE_RELAXED, is_fired = 0;
  if (!region_count || is_capturing(stream, is_per_thread)) return;
  if (!saver_take(0)) {
    atomic_fetch_add(&board->coalesced, 1);
    return;
  }
  if (!IS_PROTECTED()) {  // since this was called: the thread may have gone, and nobody would give
    saver_give();
    return;
  }
  REAL(cuThreadExchangeStreamCaptureMode, &mode);
  int is_ready = prepare();
  if (is_ready) {
    regions_sweep();  // before the door is closed: it waits for the device
    bury();
  }
  if (is_ready && inside_close()) {
    point.ordinal = ordinal;
    point.digest = digest;
    point.reads_end = reads_end;
    is_fired = fired(stream, is_per_thread);
    inside_open();
  } else if (is_ready) {
    missed();
  }
  REAL(cuThreadExchangeStreamCaptureMode, &mode);
  if (!is_fired) {
    saver_give();
    return;
  }
  pthread_mutex_lock(&lock);
  is_wanted = 1;
  pthread_cond_signal(&wanted);
  pthread_mutex_unlock(&lock);
}
