// The streams that work was launched into, and the wait for all of it.
//
// Owns: that list. Promises: an entry goes before its stream or context does, so no handle of the
// driver's is used after its end; a stream that is being captured is neither waited for nor
// disturbed; work of threads' own default streams is waited for by the legacy stream, which comes
// after all of them. Called by gate.c and by the hooks of what ends streams and contexts.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "addresses.h"

#define STREAMS_MAX 1024  // a framework has some dozens
#define LOOK_NS 10000

struct seen {
  CUcontext context;
  CUstream stream;  // CU_STREAM_LEGACY for what a null stream or a thread's own means
  int is_leaving;   // its context is being released: perhaps for the last time
};

struct wait {
  CUcontext context;
  CUstream stream;
  CUevent event;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct seen seen[STREAMS_MAX];
static int count, is_over;
static _Atomic uint64_t life = 1;  // of the list; what a thread remembers is of one life

static _Thread_local struct seen remembered;
static _Thread_local uint64_t remembered_life;

void gate_streams_forked(void) {
  pthread_mutex_init(&lock, NULL);
  count = is_over = 0;
  atomic_fetch_add(&life, 1);
}

static int is_null(CUstream stream) {
  return !stream || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD;
}

void streams_note(CUstream stream, int is_per_thread) {
  (void)is_per_thread;  // either way the legacy stream comes after it
  struct seen wanted = {NULL, is_null(stream) ? CU_STREAM_LEGACY : stream, 0};
  // pairs with the release in forget: who sees the new life asks for the context anew
  uint64_t now = atomic_load_explicit(&life, memory_order_acquire);
  // The context of a stream does not change; a null stream is of the current one.
  if (remembered_life == now && remembered.stream == wanted.stream && wanted.stream != CU_STREAM_LEGACY)
    return;
  if (REAL(cuCtxGetCurrent, &wanted.context) != CUDA_SUCCESS || !wanted.context) return;
  if (remembered_life == now && remembered.stream == wanted.stream &&
      remembered.context == wanted.context)
    return;
  pthread_mutex_lock(&lock);
  int at = 0;
  while (at < count && (seen[at].stream != wanted.stream || seen[at].context != wanted.context)) at++;
  if (at == STREAMS_MAX) is_over = 1;
  else if (at == count) seen[count++] = wanted;
  remembered_life = atomic_load(&life);
  remembered = wanted;
  pthread_mutex_unlock(&lock);
}

static void forget(CUcontext context, CUstream stream) {
  pthread_mutex_lock(&lock);
  for (int at = 0; at < count; at++)
    if (context ? seen[at].context == context : seen[at].stream == stream) seen[at--] = seen[--count];
  // is_over stays: nobody knows whether one of those that had no place was meant
  // pairs with the acquire in streams_note
  atomic_fetch_add_explicit(&life, 1, memory_order_release);
  pthread_mutex_unlock(&lock);
}

void streams_gone(CUstream stream) {
  if (process_is_active() && !is_null(stream)) forget(NULL, stream);
}

void streams_context_gone(CUcontext context) {
  if (process_is_active() && context) forget(context, NULL);
}

void streams_context_leaves(CUcontext context) {
  if (!process_is_active() || !context) return;
  pthread_mutex_lock(&lock);
  for (int at = 0; at < count; at++) seen[at].is_leaving |= seen[at].context == context;
  pthread_mutex_unlock(&lock);
}

void streams_context_left(CUcontext context, int is_alive) {
  if (!is_alive) {
    streams_context_gone(context);
    return;
  }
  pthread_mutex_lock(&lock);
  for (int at = 0; at < count; at++)
    if (seen[at].context == context) seen[at].is_leaving = 0;
  pthread_mutex_unlock(&lock);
}

enum marking { MARKED, CAPTURED, UNKNOWN };

// An event behind all work of a stream.
static enum marking marked(const struct seen *of, struct wait *wait) {
  int status = CU_STREAM_CAPTURE_STATUS_NONE;
  enum marking found = UNKNOWN;
  if (of->is_leaving || REAL(cuCtxPushCurrent_v2, of->context) != CUDA_SUCCESS) return UNKNOWN;
  *wait = (struct wait){.context = of->context, .stream = of->stream};
  CUresult result = REAL(cuStreamIsCapturing, of->stream, &status);
  if (result == CUDA_SUCCESS && status != CU_STREAM_CAPTURE_STATUS_NONE) {
    found = CAPTURED;
  } else if (result == CUDA_SUCCESS &&
             REAL(cuEventCreate, &wait->event, CU_EVENT_DISABLE_TIMING) == CUDA_SUCCESS) {
    if (REAL(cuEventRecord, wait->event, of->stream) == CUDA_SUCCESS) found = MARKED;
    else REAL(cuEventDestroy_v2, wait->event);
  }
  CUcontext popped;
  REAL(cuCtxPopCurrent_v2, &popped);
  return found;
}

static int is_done(const struct wait *wait) {
  CUcontext popped;
  if (REAL(cuCtxPushCurrent_v2, wait->context) != CUDA_SUCCESS) return 1;  // it has gone
  CUresult result = REAL(cuEventQuery, wait->event);
  if (result != CUDA_ERROR_NOT_READY) REAL(cuEventDestroy_v2, wait->event);
  REAL(cuCtxPopCurrent_v2, &popped);
  return result != CUDA_ERROR_NOT_READY;  // an error is the program's: nothing runs on after it
}

static void give_up(const struct wait *wait) {
  CUcontext popped;
  if (REAL(cuCtxPushCurrent_v2, wait->context) != CUDA_SUCCESS) return;
  REAL(cuEventDestroy_v2, wait->event);
  REAL(cuCtxPopCurrent_v2, &popped);
}

static int polled(struct wait *waits, int left, uint64_t deadline, struct gate_report *report) {
  struct timespec look = {0, LOOK_NS};
  for (;;) {
    for (int at = 0; at < left; at++)
      if (is_done(&waits[at])) waits[at--] = waits[--left];
    if (!left) return GATE_DONE;
    if (now_ns() >= deadline) break;
    nanosleep(&look, NULL);
  }
  if (waits[0].stream == CU_STREAM_LEGACY)
    snprintf(report->waited_for, sizeof report->waited_for, "%d streams, one is the default stream", left);
  else
    snprintf(report->waited_for, sizeof report->waited_for, "%d streams, one is %p", left,
             waits[0].stream);
  for (int at = 0; at < left; at++) give_up(&waits[at]);
  return GATE_LATE;
}

int streams_drain(uint64_t deadline, struct gate_report *report) {
  static struct wait waits[STREAMS_MAX];  // the gate's lock lets one thread in
  int left = 0, mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  // Queries are forbidden to a thread beside a capture, unless it says that it knows.
  CUresult exchanged = REAL(cuThreadExchangeStreamCaptureMode, &mode);
  pthread_mutex_lock(&lock);  // a stream cannot be destroyed while it is marked
  int is_complete = !is_over, captured = 0, unknown = 0;
  for (int at = 0; at < count; at++) {
    enum marking found = marked(&seen[at], &waits[left]);
    left += found == MARKED;
    captured += found == CAPTURED;
    unknown += found == UNKNOWN;
  }
  report->streams = (uint32_t)left;
  report->captured = (uint32_t)captured;
  pthread_mutex_unlock(&lock);
  int code = polled(waits, left, deadline, report);
  if (exchanged == CUDA_SUCCESS) REAL(cuThreadExchangeStreamCaptureMode, &mode);
  if (code != GATE_DONE || (is_complete && !unknown)) return code;
  if (unknown)
    snprintf(report->waited_for, sizeof report->waited_for,
             "%d streams that the driver says nothing of", unknown);
  else
    snprintf(report->waited_for, sizeof report->waited_for, "more streams than can be remembered");
  return GATE_LATE;
}

// A capture does not begin between the look at a stream and the event on it: the event would be
// part of it. Beginning one waits for nothing, so the lock is held for a moment.
// Nor while a point is taken, for the same reason: it is a call inside. Nor when somebody is about
// to wait for all work.
#define BEGUN(per_thread, name, ...)                              \
  do {                                                            \
    int is_new = captures_begins(stream, per_thread);             \
    ENTERS_ONLY();                                                \
    int is_active = process_is_active();                          \
    if (is_active) pthread_mutex_lock(&lock);                     \
    CUresult result = REAL(name, __VA_ARGS__);                    \
    if (is_active) pthread_mutex_unlock(&lock);                   \
    if (is_new && result != CUDA_SUCCESS) captures_failed(stream, per_thread); \
    return result;                                                \
  } while (0)

CUresult cuStreamBeginCapture(CUstream stream) { BEGUN(0, cuStreamBeginCapture, stream); }

CUresult cuStreamBeginCapture_ptsz(CUstream stream) { BEGUN(1, cuStreamBeginCapture_ptsz, stream); }

CUresult cuStreamBeginCapture_v2(CUstream stream, int mode) {
  BEGUN(0, cuStreamBeginCapture_v2, stream, mode);
}

CUresult cuStreamBeginCapture_v2_ptsz(CUstream stream, int mode) {
  BEGUN(1, cuStreamBeginCapture_v2_ptsz, stream, mode);
}

CUresult cuStreamBeginCaptureToGraph(CUstream stream, CUgraph graph, const void *nodes,
                                     const void *edges, size_t count, int mode) {
  BEGUN(0, cuStreamBeginCaptureToGraph, stream, graph, nodes, edges, count, mode);
}

CUresult cuStreamBeginCaptureToGraph_ptsz(CUstream stream, CUgraph graph, const void *nodes,
                                          const void *edges, size_t count, int mode) {
  BEGUN(1, cuStreamBeginCaptureToGraph_ptsz, stream, graph, nodes, edges, count, mode);
}
