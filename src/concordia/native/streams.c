// The streams that have worked since the last point.
//
// Owns: that list, and the events that tie them to the stream of a point. Promises: at a point all
// work that the program has given to any stream comes before the copies, and what it gives later
// comes after them; a stream that is being captured takes no part. Called by the hooks of what
// writes, marks.c and saver.c.
#define _GNU_SOURCE
#include "protect.h"

enum { STREAMS_MAX = 64 };

struct seen {
  CUstream stream;
  int is_per_thread;
};
static struct seen seen[STREAMS_MAX];
static int count, is_over;  // over: there were more
static struct seen joined[STREAMS_MAX];
static int joined_count;
static CUevent work_event, copies_event;
// Which streams come after the copies of which point: any other waits before it writes.
struct tie {
  CUstream stream;
  int is_per_thread;
  uint64_t fire, epoch;
};
static struct tie tied[STREAMS_MAX];
static int tied_count;
static _Atomic uint64_t fires, epoch;  // epoch: of handles, which are given to others

// Of the streams that a null handle means, those of other threads cannot be named: they are as
// they were given to the driver, and only the thread itself can join its own.
static int is_same(const struct seen *one, CUstream stream, int is_per_thread) {
  return one->stream == stream && (stream > CU_STREAM_PER_THREAD ||
                                   one->is_per_thread == is_per_thread);
}

void streams_seen(CUstream stream, int is_per_thread) {
  protect_lock();
  int at = 0;
  while (at < count && !is_same(&seen[at], stream, is_per_thread)) at++;
  if (at < count) {
  } else if (count < STREAMS_MAX) {
    seen[count++] = (struct seen){stream, is_per_thread};
  } else {
    is_over = 1;
  }
  protect_unlock();
}

static CUresult record(CUevent event, CUstream stream, int is_per_thread) {
  return STREAM_CALL(is_per_thread, cuEventRecord, event, stream);
}

static CUresult wait(CUstream stream, CUevent event, int is_per_thread) {
  return STREAM_CALL(is_per_thread, cuStreamWaitEvent, stream, event, 0);
}

int streams_join(CUstream stream, int is_per_thread) {
  protect_lock();
  int found = count, was_over = is_over;
  for (int i = 0; i < count; i++) joined[i] = seen[i];
  protect_unlock();
  joined_count = 0;
  if (was_over) return 0;
  if (!work_event && (REAL(cuEventCreate, &work_event, CU_EVENT_DISABLE_TIMING) != CUDA_SUCCESS ||
                      REAL(cuEventCreate, &copies_event, CU_EVENT_DISABLE_TIMING) != CUDA_SUCCESS))
    return 0;
  for (int i = 0; i < found; i++) {
    struct seen other = joined[i];
    if (is_same(&other, stream, is_per_thread)) continue;
    if (is_capturing(other.stream, other.is_per_thread)) continue;
    if (record(work_event, other.stream, other.is_per_thread) != CUDA_SUCCESS ||
        wait(stream, work_event, is_per_thread) != CUDA_SUCCESS)
      return 0;
    joined[joined_count++] = other;
  }
  return 1;
}

void streams_release(CUstream stream, int is_per_thread) {
  record(copies_event, stream, is_per_thread);
  protect_lock();
  uint64_t fire = ++fires;
  for (int at = 0; at < tied_count; at++)
    if (tied[at].stream == stream && tied[at].is_per_thread == is_per_thread) tied[at].fire = fire;
  // Those that a thread adds meanwhile stay: their work comes before the next point.
  for (int i = 0; i < joined_count; i++)
    for (int at = 0; at < count; at++)
      if (is_same(&seen[at], joined[i].stream, joined[i].is_per_thread)) seen[at--] = seen[--count];
  protect_unlock();
}

void streams_before(CUstream stream, int is_per_thread) {
  static __thread struct tie last;  // of this thread: most have one stream
  uint64_t fire = atomic_load_explicit(&fires, memory_order_relaxed);
  if (fire == 0 ||
      (last.stream == stream && last.is_per_thread == is_per_thread && last.fire == fire &&
                    last.epoch == atomic_load_explicit(&epoch, memory_order_relaxed)))
    return;
  if (is_capturing(stream, is_per_thread)) return;
  protect_lock();
  int at = 0, is_tied = 0;
  while (at < tied_count && !(tied[at].stream == stream && tied[at].is_per_thread == is_per_thread))
    at++;
  if (at == tied_count && tied_count < STREAMS_MAX)
    tied[tied_count++] = (struct tie){.stream = stream, .is_per_thread = is_per_thread};
  if (at < tied_count) {
    is_tied = tied[at].fire == fire;
    tied[at].fire = fire;
  }
  last = (struct tie){stream, is_per_thread, fire, epoch};
  protect_unlock();
  if (!is_tied) wait(stream, copies_event, is_per_thread);
}

// The handle may be given to another stream from here on.
CUresult cuStreamDestroy_v2(CUstream stream) {
  streams_gone(stream);
  if (IS_PROTECTED()) {
    protect_lock();
    for (int at = 0; at < count; at++)
      if (seen[at].stream == stream) seen[at--] = seen[--count];
    for (int at = 0; at < tied_count; at++)
      if (tied[at].stream == stream) tied[at--] = tied[--tied_count];
    epoch++;
    protect_unlock();
  }
  return REAL(cuStreamDestroy_v2, stream);
}
