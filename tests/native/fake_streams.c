// The fake driver: streams, events, launches, capture and graphs.
#include "fake_driver.h"

#include <unistd.h>

#define CALLED fake_count(__func__)

static struct stream legacy;
static uint64_t all_submitted, events_captured;
static __thread struct stream own;

struct stream *fake_stream(void *given, int is_per_thread) {
  if (given == (void *)1) return &legacy;
  if (given == (void *)2) return &own;
  return given ? given : is_per_thread ? &own : &legacy;
}

static void run(const struct operation *operation) {
  if (!operation->function) return;
  uint64_t *address = (uint64_t *)(uintptr_t)operation->arguments[0];
  if (strcmp(operation->function->name, "store") == 0) *address = operation->arguments[1];
  if (strcmp(operation->function->name, "add") == 0) *address += operation->arguments[1];
}

// Runs what is in the queue unless it is held; the caller has the lock.
static void drain(struct stream *stream) {
  while (!stream->is_held && stream->done < stream->submitted) {
    run(&stream->queue[stream->done % LIMIT]);
    stream->done++;
  }
}

CUresult fake_submit(struct stream *stream, struct operation operation) {
  CUresult result = OK;
  pthread_mutex_lock(&fake_lock);
  if (stream->is_capturing) {
    if (stream->capture->count < 64) stream->capture->operations[stream->capture->count++] = operation;
  } else if (stream->submitted - stream->done == LIMIT) {
    result = OUT_OF_MEMORY;
  } else {
    stream->queue[stream->submitted++ % LIMIT] = operation;
    all_submitted++;
    drain(stream);
  }
  pthread_mutex_unlock(&fake_lock);
  return result;
}

static CUresult launch(struct function *function, void *stream, int is_per_thread, void **parameters) {
  struct operation operation = {.function = function};
  if (!function) return INVALID_HANDLE;
  if (strcmp(function->name, "fail") == 0) return INVALID_VALUE;
  if (!parameters) operation.function = NULL;  // given by functions of long ago: not known here
  for (int i = 0; parameters && i < 2 && (!strcmp(function->name, "store") || !strcmp(function->name, "add")); i++) memcpy(&operation.arguments[i], parameters[i], 8);
  return fake_submit(fake_stream(stream, is_per_thread), operation);
}

#define GRID unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared
#define UNUSED (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared
API CUresult cuLaunchKernel(void *function, GRID, void *stream, void **parameters, void **extra) { CALLED; UNUSED; (void)extra; return launch(function, stream, 0, parameters); }
API CUresult cuLaunchKernel_ptsz(void *function, GRID, void *stream, void **parameters, void **extra) { CALLED; UNUSED; (void)extra; return launch(function, stream, 1, parameters); }
API CUresult cuLaunchCooperativeKernel(void *function, GRID, void *stream, void **parameters) { CALLED; UNUSED; return launch(function, stream, 0, parameters); }
API CUresult cuLaunchCooperativeKernel_ptsz(void *function, GRID, void *stream, void **parameters) { CALLED; UNUSED; return launch(function, stream, 1, parameters); }
API CUresult cuLaunchGridAsync(void *function, int width, int height, void *stream) { CALLED; (void)width; (void)height; return launch(function, stream, 0, NULL); }
API CUresult cuLaunchGrid(void *function, int width, int height) { CALLED; (void)width; (void)height; return launch(function, NULL, 0, NULL); }
API CUresult cuLaunch(void *function) { CALLED; return launch(function, NULL, 0, NULL); }
struct parameters { void *function; unsigned sizes[7]; void *stream; void **parameters; };
API CUresult cuLaunchCooperativeKernelMultiDevice(const struct parameters *list, unsigned devices, unsigned flags) { CALLED; (void)flags; CUresult result = OK; for (unsigned i = 0; i < devices && result == OK; i++) result = launch(list[i].function, list[i].stream, 0, list[i].parameters); return result; }
struct config { unsigned sizes[7]; void *stream; void *attributes; unsigned count; };
API CUresult cuLaunchKernelEx(const struct config *config, void *function, void **parameters, void **extra) { CALLED; (void)extra; return config ? launch(function, config->stream, 0, parameters) : INVALID_VALUE; }
API CUresult cuLaunchKernelEx_ptsz(const struct config *config, void *function, void **parameters, void **extra) { CALLED; (void)extra; return config ? launch(function, config->stream, 1, parameters) : INVALID_VALUE; }
static CUresult launch_graph(const struct graph *graph, struct stream *stream) {
  CUresult result = graph ? OK : INVALID_HANDLE;
  for (int i = 0; graph && i < graph->count && result == OK; i++) result = fake_submit(stream, graph->operations[i]);
  return result;
}
API CUresult cuGraphLaunch(void *graph, void *stream) { CALLED; return launch_graph(graph, fake_stream(stream, 0)); }
API CUresult cuGraphLaunch_ptsz(void *graph, void *stream) { CALLED; return launch_graph(graph, fake_stream(stream, 1)); }

API CUresult cuStreamCreate(struct stream **stream, unsigned flags) {
  CALLED;
  (void)flags;
  *stream = calloc(1, sizeof **stream);
  (*stream)->context = fake_current;
  return *stream ? OK : OUT_OF_MEMORY;
}
API CUresult cuStreamDestroy_v2(struct stream *stream) { CALLED; if (!stream) return INVALID_HANDLE; free(stream); return OK; }
API CUresult cuStreamGetCtx(struct stream *stream, struct context **context) { *context = stream ? stream->context : fake_current; return OK; }
static CUresult state(struct stream *stream) {
  pthread_mutex_lock(&fake_lock);
  CUresult result = stream->done == stream->submitted ? OK : NOT_READY;
  pthread_mutex_unlock(&fake_lock);
  return result;
}
API CUresult cuStreamQuery(void *stream) { CALLED; return state(fake_stream(stream, 0)); }
API CUresult cuStreamSynchronize(void *stream) { CALLED; struct stream *found = fake_stream(stream, 0); if (found->is_capturing) return CAPTURE_UNSUPPORTED; while (state(found) == NOT_READY) sched_yield(); return OK; }
API CUresult cuStreamSynchronize_ptsz(void *stream) { CALLED; struct stream *found = fake_stream(stream, 1); while (state(found) == NOT_READY) sched_yield(); return OK; }
API CUresult cuCtxSynchronize(void) { CALLED; while (state(&legacy) == NOT_READY) sched_yield(); return OK; }
API CUresult cuStreamWaitEvent(void *stream, void *event, unsigned flags) { (void)stream; (void)event; (void)flags; return OK; }

// --- capture
API CUresult cuThreadExchangeStreamCaptureMode(int *mode) { static __thread int present; int before = present; present = *mode; *mode = before; return OK; }
API CUresult cuStreamBeginCapture_v2(void *stream, int mode) {
  CALLED;
  (void)mode;
  struct stream *found = fake_stream(stream, 0);
  found->capture = calloc(1, sizeof *found->capture);
  found->is_capturing = 1;
  return OK;
}
API CUresult cuStreamEndCapture(void *stream, void **graph) { CALLED; struct stream *found = fake_stream(stream, 0); *graph = found->capture; found->is_capturing = 0; return OK; }
API CUresult cuStreamIsCapturing(void *stream, int *status) { *status = fake_stream(stream, 0)->is_capturing; return OK; }
API CUresult cuStreamIsCapturing_ptsz(void *stream, int *status) { *status = fake_stream(stream, 1)->is_capturing; return OK; }
API CUresult cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) { (void)flags; *executable = graph; return OK; }
API CUresult cuGraphExecDestroy(void *executable) { (void)executable; return OK; }
API CUresult cuGraphDestroy(void *graph) { free(graph); return OK; }

// --- events
API CUresult cuEventCreate(struct event **event, unsigned flags) { CALLED; (void)flags; if (getenv("FAKE_NO_EVENTS")) return OUT_OF_MEMORY; if (getenv("FAKE_SLOW_EVENTS")) usleep(300); *event = calloc(1, sizeof **event); return *event ? OK : OUT_OF_MEMORY; }
static CUresult record(struct event *event, struct stream *stream) {
  pthread_mutex_lock(&fake_lock);
  event->is_captured = stream->is_capturing;
  events_captured += (uint64_t)stream->is_capturing;
  event->stream = stream;
  event->position = stream->submitted;
  pthread_mutex_unlock(&fake_lock);
  return OK;
}
API CUresult cuEventRecord(struct event *event, void *stream) { CALLED; return record(event, fake_stream(stream, 0)); }
API CUresult cuEventRecord_ptsz(struct event *event, void *stream) { CALLED; return record(event, fake_stream(stream, 1)); }
API CUresult cuEventQuery(struct event *event) {
  pthread_mutex_lock(&fake_lock);
  CUresult result = event->is_captured ? 907 : !event->stream || event->stream->done >= event->position ? OK : NOT_READY;
  pthread_mutex_unlock(&fake_lock);
  return result;
}
API CUresult cuEventSynchronize(struct event *event) { CALLED; CUresult result; while ((result = cuEventQuery(event)) == NOT_READY) sched_yield(); return result; }
API CUresult cuEventDestroy_v2(struct event *event) { CALLED; free(event); return OK; }

uint64_t fake_events_captured(void) { return events_captured; }
uint64_t fake_submitted(void) {
  pthread_mutex_lock(&fake_lock);
  uint64_t found = all_submitted;
  pthread_mutex_unlock(&fake_lock);
  return found;
}
void fake_hold(void *stream) {
  pthread_mutex_lock(&fake_lock);
  fake_stream(stream, 0)->is_held = 1;
  pthread_mutex_unlock(&fake_lock);
}
void fake_release(void *stream) {
  pthread_mutex_lock(&fake_lock);
  fake_stream(stream, 0)->is_held = 0;
  drain(fake_stream(stream, 0));
  pthread_mutex_unlock(&fake_lock);
}
