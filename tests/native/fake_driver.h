// A CUDA driver in plain C, for tests: what its files share, and what tests may ask of it.
//
// Owns: nothing. "Device" memory is host memory. A stream is a queue: it runs each launch at once, or,
// while it is held by fake_hold, when it is released. A kernel is known by its name: "store" writes its
// second argument (u64) to the address in its first, "add" adds it; any other does nothing.
// FAKE_SLOW_EVENTS: making an event takes a while. FAKE_NO_EVENTS: none can be made. FAKE_DEVICES: number of devices (1).
// FAKE_PEER=0: no device sees another's memory. FAKE_VMM=0: there is no virtual memory.
#pragma once
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define LIMIT 4096

typedef int CUresult;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, CAPTURE_UNSUPPORTED = 900, CAPTURE_IMPLICIT = 906 };

struct context {
  int device, is_primary, uses;
};
struct module {
  uint64_t magic;
  unsigned char *image;
  uint64_t bytes;
};
struct function {
  char name[256];
  struct module *module;
};
struct operation {
  struct function *function;  // NULL: a copy or a fill
  uint64_t arguments[4];
};
struct graph {
  struct operation operations[64];
  int count;
};
struct stream {
  struct operation queue[LIMIT];
  uint64_t submitted, done;
  int is_held, is_capturing;
  struct graph *capture;
  struct context *context;
};
struct event {
  struct stream *stream;
  uint64_t position;
  int is_captured;
};

extern pthread_mutex_t fake_lock;
extern __thread struct context *fake_current;
struct stream *fake_stream(void *given, int is_per_thread);
CUresult fake_submit(struct stream *stream, struct operation operation);
void fake_count(const char *name);

// --- for tests; reached through the shim, which knows nothing of them
API void fake_hold(void *stream);     // launches wait
API void fake_release(void *stream);  // and now run, in order
API uint64_t fake_calls(const char *name);
API uint64_t fake_submitted(void);    // launches, to any stream, that were not captured
API uint64_t fake_events_captured(void);
API uint64_t fake_loads(void);
API const unsigned char *fake_image(uint64_t index, uint64_t *bytes);  // as the driver was handed it
API uint64_t fake_alive(void);  // modules and libraries that are loaded
API const void *fake_image_pointer(uint64_t index);
