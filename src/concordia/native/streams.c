// The streams that have worked since the last point.
//
// Owns: that list, and the events that tie them to the stream of a point. Promises: at a point all
// work that the program has given to any stream comes before the copies, and what it gives later
// comes after them; where that cannot be had, as beside a capture, no point is taken; a stream that
// is destroyed leaves its work to one of ours; no handle is used after its end, because the hook of
// destruction is a call inside, and a point waits for those. Called by the hooks of what writes,
// marks.c and saver.c, which joins and releases while nobody is inside.
#define _GNU_SOURCE
#include "addresses.h"

// PyTorch's pools have 64, NCCL and libraries some more: as many may work between two points.
enum { STREAMS_MAX = 256, NON_BLOCKING = 1 };

static CUstream seen[STREAMS_MAX];
static int count;
static CUevent work_event, copies_event;  // of the thread that has the point
// Which streams come after the copies of which point: any other waits before it writes.
struct tie {
  CUstream stream;
  uint64_t fire, epoch;
};
static struct tie tied[STREAMS_MAX];
static int tied_count;
static _Atomic uint64_t fires, epoch;  // epoch: of handles, which are given to others
static _Atomic(CUstream) heir;  // does nothing but wait for what destroyed streams still do

// A handle that means the same in every call.
static CUstream named(CUstream stream, int is_per_thread) {
  if (stream) return stream;
  return is_per_thread ? CU_STREAM_PER_THREAD : CU_STREAM_LEGACY;
}

static void add(CUstream stream) {
  protect_lock();
  int at = 0, is_full = 0;
  while (at < count && seen[at] != stream) at++;
  if (at == count) {
    is_full = count == STREAMS_MAX;
    if (!is_full) seen[count++] = stream;
  }
  protect_unlock();
  if (is_full) protect_lose("more than %d streams work between two points", STREAMS_MAX);
}

void streams_seen(CUstream stream, int is_per_thread) { add(named(stream, is_per_thread)); }

// Threads' own default streams have one name in all threads, so another's cannot be waited for by
// it; the legacy stream comes after all of them.
static CUstream joinable(CUstream stream) {
  return stream == CU_STREAM_PER_THREAD ? CU_STREAM_LEGACY : stream;
}

int streams_join(CUstream stream, int is_per_thread) {
  CUstream target = named(stream, is_per_thread);
  if (!work_event && (REAL(cuEventCreate, &work_event, CU_EVENT_DISABLE_TIMING) != CUDA_SUCCESS ||
                      REAL(cuEventCreate, &copies_event, CU_EVENT_DISABLE_TIMING) != CUDA_SUCCESS))
    return 0;
  for (int i = 0; i < count; i++) {
    CUstream other = joinable(seen[i]);
    if (other == target) continue;
    // What it did before it was captured may still run, and nothing can come after that now.
    if (is_capturing(other, 0)) return 0;
    if (REAL(cuEventRecord, work_event, other) != CUDA_SUCCESS ||
        REAL(cuStreamWaitEvent, target, work_event, 0) != CUDA_SUCCESS)
      return 0;
  }
  return 1;
}

// Not for the streams of threads, whose one name means many.
static struct tie *tie_of(CUstream stream) {
  if (stream == CU_STREAM_PER_THREAD) return NULL;
  for (int at = 0; at < tied_count; at++)
    if (tied[at].stream == stream) return &tied[at];
  return NULL;
}

int streams_release(CUstream stream, int is_per_thread) {
  CUstream target = named(stream, is_per_thread);
  if (REAL(cuEventRecord, copies_event, target) != CUDA_SUCCESS) return 0;
  protect_lock();
  struct tie *tie = tie_of(target);
  uint64_t fire = atomic_fetch_add(&fires, 1) + 1;
  if (tie) tie->fire = fire;
  count = 0;
  protect_unlock();
  return 1;
}

static void tie(CUstream stream, uint64_t fire) {
  protect_lock();
  struct tie *found = tie_of(stream);
  if (!found && stream != CU_STREAM_PER_THREAD && tied_count < STREAMS_MAX) {
    found = &tied[tied_count++];
    found->stream = stream;
  }
  if (found) found->fire = fire;
  protect_unlock();
}

// A word of the list read late costs one wait more, so these loads need no order among themselves;
// that of the last point's values comes from the door (inside.c).
int streams_before(CUstream given, int is_per_thread) {
  static __thread struct tie last;  // of this thread: most have one stream
  CUstream stream = named(given, is_per_thread);
  inside_enter();
  uint64_t fire = atomic_load_explicit(&fires, memory_order_relaxed);
  uint64_t now = atomic_load_explicit(&epoch, memory_order_relaxed);
  if (fire == 0 || (last.stream == stream && last.fire == fire && last.epoch == now)) return 1;
  if (is_capturing(stream, 0)) return 1;
  protect_lock();
  const struct tie *found = tie_of(stream);
  int is_tied = found && found->fire == fire;
  protect_unlock();
  if (!is_tied) {
    CUresult result = REAL(cuStreamWaitEvent, stream, copies_event, 0);
    // The program's own call fails, too, for the same reason.
    if (result == CUDA_ERROR_INVALID_HANDLE || result == CUDA_ERROR_INVALID_CONTEXT ||
        result == CUDA_ERROR_NOT_INITIALIZED || result == CUDA_ERROR_DEINITIALIZED)
      return 1;
    if (result != CUDA_SUCCESS) protect_lose("error %d of the driver: wait for copies", result);
    tie(stream, fire);  // not before: another thread would not wait
  }
  last = (struct tie){stream, fire, now};
  return 1;
}

void streams_after(const int *is_inside) {
  if (*is_inside) inside_leave();
}

static CUstream heir_made(void) {
  CUstream made = NULL, nobody = atomic_load(&heir);
  if (nobody) return nobody;
  if (REAL(cuStreamCreate, &made, NON_BLOCKING) != CUDA_SUCCESS) return NULL;
  if (atomic_compare_exchange_strong(&heir, &nobody, made)) return made;
  REAL(cuStreamDestroy_v2, made);
  return nobody;
}

// A destroyed stream's work goes on.
static CUresult inherit(CUstream stream) {
  int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  CUcontext popped = NULL, context = regions_context();
  CUevent event = NULL;
  if (context && REAL(cuCtxPushCurrent_v2, context) != CUDA_SUCCESS)
    return CUDA_ERROR_INVALID_CONTEXT;
  REAL(cuThreadExchangeStreamCaptureMode, &mode);
  // While it is captured the event would be a node of that graph.
  CUstream to = is_capturing(stream, 0) ? NULL : heir_made();
  CUresult result = to ? REAL(cuEventCreate, &event, CU_EVENT_DISABLE_TIMING)
                       : CUDA_ERROR_NOT_SUPPORTED;
  if (result == CUDA_SUCCESS) result = REAL(cuEventRecord, event, stream);
  if (result == CUDA_SUCCESS) result = REAL(cuStreamWaitEvent, to, event, 0);
  if (event) REAL(cuEventDestroy_v2, event);
  REAL(cuThreadExchangeStreamCaptureMode, &mode);
  if (context) REAL(cuCtxPopCurrent_v2, &popped);
  if (result == CUDA_SUCCESS) add(to);
  return result;
}

static void gone(CUstream stream) {
  protect_lock();
  int has_worked = 0;
  for (int at = 0; at < count; at++) has_worked |= seen[at] == stream;
  int is_wanted = has_worked && region_count > 0;
  protect_unlock();
  CUresult result = has_worked ? inherit(stream) : CUDA_SUCCESS;
  if (is_wanted && result != CUDA_SUCCESS)
    protect_lose("a stream ends whose work cannot be waited for: error %d of the driver", result);
  protect_lock();
  for (int at = 0; at < count; at++)
    if (seen[at] == stream) seen[at--] = seen[--count];
  for (int at = 0; at < tied_count; at++)
    if (tied[at].stream == stream) tied[at--] = tied[--tied_count];
  atomic_fetch_add_explicit(&epoch, 1, memory_order_relaxed);
  protect_unlock();
}

// The handle may be given to another stream from here on.
CUresult cuStreamDestroy_v2(CUstream stream) {
  streams_gone(stream);
  captures_stream_gone(stream);
  if (IS_PROTECTED() && stream > CU_STREAM_PER_THREAD) {
    inside_enter();
    gone(stream);
    inside_leave();
  }
  return REAL(cuStreamDestroy_v2, stream);
}
