// Captures that are under way, for who must wait for all work and may not break one.
//
// Owns: the list of streams at which a capture has begun, and the hooks of its end. Promises: while
// captures_refuse() holds there is none, and none begins, for a bounded time; a capture is in the
// list from before the driver knows of it until it has ended, or its stream or context has; the
// driver is called without the lock. Where no addresses are kept there is no list: nobody asks.
// Called by gate_streams.c, streams.c and context.c, which see captures and what they are of, and
// by addresses.c.
#define _GNU_SOURCE
#include <pthread.h>
#include <time.h>

#include "addresses.h"

enum { CAPTURES_MAX = 256 };  // as many streams as may work between two points
#define LOOK_NS 20000
#ifndef BEGIN_HELD_NS  // tests have slow machines
// The driver looks for captures when a wait begins, in microseconds; then it only waits.
#define BEGIN_HELD_NS 100000000ull
#endif

static struct capture {
  CUstream stream;
  CUcontext context;
  pthread_t thread;  // of its own stream, which has one name in all threads
} list[CAPTURES_MAX];
static int count, is_over, refusals;  // is_over: of some nobody knows when they end
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void captures_forked(void) {
  pthread_mutex_init(&lock, NULL);
  count = is_over = refusals = 0;
}

static CUstream named(CUstream stream, int is_per_thread) {
  return !stream && is_per_thread ? CU_STREAM_PER_THREAD : stream;
}

// With the lock; -1: there is none.
static int index_of(CUstream stream) {
  for (int at = 0; at < count; at++)
    if (list[at].stream == stream &&
        (stream != CU_STREAM_PER_THREAD || pthread_equal(list[at].thread, pthread_self())))
      return at;
  return -1;
}

static void drop(CUstream stream) {
  pthread_mutex_lock(&lock);
  int at = index_of(stream);
  if (at >= 0) list[at] = list[--count];
  pthread_mutex_unlock(&lock);
}

// With the lock, which it gives up meanwhile.
static void await_allowance(void) {
  const struct timespec pause = {0, LOOK_NS};
  for (uint64_t end = now_ns() + BEGIN_HELD_NS; refusals && now_ns() < end;) {
    pthread_mutex_unlock(&lock);
    nanosleep(&pause, NULL);
    pthread_mutex_lock(&lock);
  }
}

int captures_begins(CUstream stream, int is_per_thread) {
  struct capture begun = {named(stream, is_per_thread), NULL, pthread_self()};
  if (!policy.keeps_addresses) return 0;
  REAL(cuCtxGetCurrent, &begun.context);
  pthread_mutex_lock(&lock);
  await_allowance();
  int is_new = index_of(begun.stream) < 0;
  if (is_new && count < CAPTURES_MAX) list[count++] = begun;
  else is_over |= is_new;
  pthread_mutex_unlock(&lock);
  return is_new;
}

void captures_failed(CUstream stream, int is_per_thread) { drop(named(stream, is_per_thread)); }

void captures_stream_gone(CUstream stream) {
  if (policy.keeps_addresses) drop(stream);
}

void captures_context_gone(CUcontext context) {
  if (!policy.keeps_addresses || !context) return;
  pthread_mutex_lock(&lock);
  for (int at = 0; at < count; at++)
    if (list[at].context == context) list[at--] = list[--count];
  pthread_mutex_unlock(&lock);
}

// There is one that did not begin here: from now on nobody knows that there is none.
void captures_unseen(void) {
  pthread_mutex_lock(&lock);
  is_over = 1;
  pthread_mutex_unlock(&lock);
}

int captures_refuse(void) {
  pthread_mutex_lock(&lock);
  int has_none = !count && !is_over;
  refusals += has_none;
  pthread_mutex_unlock(&lock);
  return has_none;
}

void captures_allow(void) {
  pthread_mutex_lock(&lock);
  refusals--;
  pthread_mutex_unlock(&lock);
}

// It may have failed and still be under way: another thread has to end it.
static void ended(CUstream stream, int is_per_thread, CUresult result) {
  if (!policy.keeps_addresses) return;
  if (result == CUDA_SUCCESS || !is_capturing(stream, is_per_thread))
    drop(named(stream, is_per_thread));
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
  CUresult result = REAL(cuStreamEndCapture, stream, graph);
  ended(stream, 0, result);
  return result;
}

CUresult cuStreamEndCapture_ptsz(CUstream stream, CUgraph *graph) {
  CUresult result = REAL(cuStreamEndCapture_ptsz, stream, graph);
  ended(stream, 1, result);
  return result;
}
