// A CUDA driver in plain C whose work is done later, for tests of what protects programs.
//
// Owns: device memory at addresses of its own, streams that one thread works off in an order that FAKE_SEED says, capture and graphs; no more than FAKE_BYTES of memory. Promises:
// within a stream work is done in its order, between streams only as events say; the null stream waits for nobody (so that a missing tie shows), but an
// event in it comes after what threads gave to streams of their own. A destroyed stream's work goes on; then its handle is another's. What goes into the
// null stream while one that is not non-blocking is captured ends that capture. FAKE_SLOW: recording an event, registering memory take a while, and
// "fill" and fills begin up to two milliseconds late; a copy from the host that is waited for takes twenty. Some calls ask fake_visited()'s function
// first, which may stay as long as it likes; where it says 1 the call does nothing.
// Kernels by name, all parameters u64: "fill" (p, n, v), "axpy" (y, x, n), "scatter" (p, n, seed), "indirect" (table, n), "sum" (out, x, n), "mix"
// (state, x, n), "tensor" (128 bytes that hide an address as a count of 512 bytes, y), "tensors" (448 bytes: y, such 128 bytes at 64 and at 192; n); others
// do nothing. Maps are made by fake_tensor_maps.c.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define ARENA 0x600000000000ull
#define ARENA_BYTES (8ull << 30)
#define OWN 0x7f4a7c15f39cc060ull  // with the address before each allocation
typedef int R;
enum { OK, INVALID = 1, OOM = 2, NOT_FOUND = 500, NOT_READY = 600 };
enum { COPY, FILL, WRITE, KERNEL, WAIT, NODE_FREE };
enum { CONTEXT = 0x77 };

struct event { uint64_t recorded, done; };
struct op { int kind; uint64_t a[6]; char name[32]; void *owned; uint64_t due; };  // a kernel's a[5]: its first parameter, where that is more than a word
struct stream { struct op *ops; uint64_t head, tail, room, finished; struct graph *capture; struct event marks; int is_blocking, is_own, is_gone; };
struct node { int type; struct op op; void *parameters[6]; };
struct graph { struct node **nodes; size_t count; int is_broken; };
struct function { char name[32]; int parameters; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct stream legacy, *streams[512] = {&legacy};
static int stream_count = 1;
static uint64_t seed, bump, live, most = UINT64_MAX;
static struct { uint64_t address, bytes; } freed[4096];
static int freed_count;

static uint64_t next(void) { seed = seed * 6364136223846793005ull + 1442695040888963407ull; return seed >> 33; }
static __thread struct stream *own;
static struct stream *added(struct stream *stream) {
  pthread_mutex_lock(&lock);
  if (stream_count < 512) streams[stream_count++] = stream;
  pthread_mutex_unlock(&lock);
  return stream;
}
static struct stream *of(void *stream) {
  if (stream == (void *)2 && !own) { own = added(calloc(1, sizeof *own)); own->is_blocking = own->is_own = 1; }
  return stream == (void *)2 ? own : (uintptr_t)stream <= 1 ? &legacy : stream;
}
static void *mine(void *stream) { return stream ? stream : (void *)2; }
static int (*visitor)(const char *call);
API void fake_visited(int (*given)(const char *)) { visitor = given; }
#define VISITED (visitor && visitor(__func__))
static int is_slow;
static void slow(void) { if (is_slow) usleep(300); }
static uint64_t now_ns(void) { struct timespec time; clock_gettime(CLOCK_REALTIME, &time); return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec; }
// With the lock: whether a stream that the null stream waits for is captured; its capture ends in failure.
static int breaks(int is_all) {
  int found = 0;
  for (int i = 0; i < stream_count; i++)
    if (streams[i]->capture && (is_all || streams[i]->is_blocking)) found = streams[i]->capture->is_broken = 1;
  return found;
}

// Kernels of a module whose image has the address of a control block in it mark what they store, afterwards.
// Each in the next copy of the map: of one page they are in several, and one store's is in any.
static uint64_t control;
static void mark(const void *address) {
  static uint64_t copy;  // of the thread that works
  const uint64_t *words = (const uint64_t *)control;
  if (control && (uint64_t)address - words[1] < words[2]) ((uint8_t *)words[3])[(copy++ & words[5] >> 32) * (uint32_t)words[5] + (((uint64_t)address - words[1]) >> (uint32_t)words[4])] = 1;
}

static void scatter(uint64_t *p, uint64_t n, uint64_t value) {
  for (int i = 0; i < 5; i++) { value = value * 6364136223846793005ull + 1; p[(value >> 20) % n] = value; mark(&p[(value >> 20) % n]); }
}
static size_t large_of(const char *name) { return !strcmp(name, "tensor") ? 128 : !strcmp(name, "tensors") ? 448 : 0; }
static void run_kernel(const struct op *op) {
  uint64_t *p = (void *)op->a[0], n = op->a[1], *large = (void *)op->a[5];
  if (!strcmp(op->name, "fill")) for (uint64_t i = 0; i < n; i++) { p[i] = op->a[2] + i; mark(&p[i]); }
  if (!strcmp(op->name, "axpy")) for (uint64_t i = 0; i < op->a[2]; i++) { p[i] = p[i] * 3 + ((uint64_t *)op->a[1])[i]; mark(&p[i]); }
  if (!strcmp(op->name, "scatter")) scatter(p, n, op->a[2]);
  if (!strcmp(op->name, "indirect")) for (uint64_t i = 0; i < n; i++) { *(uint64_t *)p[i] += 7; mark((void *)p[i]); }
  if (!strcmp(op->name, "sum")) { uint64_t sum = 1; for (uint64_t i = 0; i < op->a[2]; i++) sum = sum * 31 + ((uint64_t *)op->a[1])[i]; *p = sum; mark(p); }
  if (!strcmp(op->name, "tensor")) { *(uint64_t *)(ARENA + 512 * large[0]) += 5; *(uint64_t *)op->a[1] += 3; mark((void *)op->a[1]); }
  if (!strcmp(op->name, "tensors")) { *(uint64_t *)(ARENA + 512 * large[8]) += 5; *(uint64_t *)(ARENA + 512 * large[24]) += 5; *(uint64_t *)large[0] += 3; }
  if (!strcmp(op->name, "mix")) for (uint64_t i = 0; i < op->a[2]; i += 1 + i / 8) { p[i] ^= ((uint64_t *)op->a[1])[i] * 0x9e3779b97f4a7c15ull + i; mark(&p[i]); }
}
static void run(struct op *op) {
  if (op->kind == COPY) for (uint64_t row = 0; row < op->a[3]; row++) memmove((char *)op->a[0] + row * op->a[4], (char *)op->a[1] + row * op->a[5], op->a[2]);
  if (op->kind == FILL && op->a[5] == 1 && op->a[2] >= 1 << 24 && op->a[3] == 1) memset((void *)op->a[0], (int)op->a[1], op->a[2]);  // the map of marks: a loop would take longer than the programs
  else if (op->kind == FILL) for (uint64_t row = 0; row < op->a[3]; row++) for (uint64_t i = 0; i < op->a[2]; i++) memcpy((char *)op->a[0] + row * op->a[4] + i * op->a[5], &op->a[1], op->a[5]);
  if (op->kind == WRITE) { if (op->a[2] == 8) __atomic_store_n((uint64_t *)op->a[0], op->a[1], __ATOMIC_RELEASE); else __atomic_store_n((uint32_t *)op->a[0], (uint32_t)op->a[1], __ATOMIC_RELEASE); }
  if (op->kind == KERNEL) run_kernel(op);
  free(op->owned);
}
static int is_ready(struct stream *stream) {
  if (stream->head == stream->tail) return 0;
  struct op *op = &stream->ops[stream->head % stream->room];
  if (op->due > now_ns()) return 0;
  return op->kind != WAIT || ((struct stream *)op->a[0])->head >= op->a[1];
}
static void *work(void *unused) {
  for (;;) {
    pthread_mutex_lock(&lock);
    int first = (int)(next() % (uint64_t)stream_count), found = -1;
    for (int i = 0; i < stream_count && found < 0; i++) if (streams[(first + i) % stream_count] && is_ready(streams[(first + i) % stream_count])) found = (first + i) % stream_count;
    if (found < 0) {
      uint64_t until = now_ns() + 200000;
      struct timespec time = {(time_t)(until / 1000000000), (long)(until % 1000000000)};
      if (is_slow) pthread_cond_timedwait(&changed, &lock, &time);
      else pthread_cond_wait(&changed, &lock);
      pthread_mutex_unlock(&lock);
      continue;
    }
    struct stream *stream = streams[found];
    struct op op = stream->ops[stream->head % stream->room];
    int burst = next() % 64 == 0;
    pthread_mutex_unlock(&lock);
    if (burst) { struct timespec some = {0, 20000}; nanosleep(&some, NULL); }
    run(&op);
    pthread_mutex_lock(&lock);
    stream->head++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
  }
  return unused;
}
static void begin(void) {
  pthread_t thread;
  const char *text = getenv("FAKE_SEED");
  seed = text ? strtoull(text, NULL, 10) : 1;
  is_slow = getenv("FAKE_SLOW") != NULL;
  if (getenv("FAKE_BYTES")) most = strtoull(getenv("FAKE_BYTES"), NULL, 10);
  if (getenv("FAKE_SKEW")) bump = strtoull(getenv("FAKE_SKEW"), NULL, 10);  // where memory begins in this life
  mmap((void *)ARENA, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  pthread_create(&thread, NULL, work, NULL);
}
static pthread_once_t once = PTHREAD_ONCE_INIT;
static R put(void *handle, struct op op, int type) {
  struct stream *stream = of(handle);
  pthread_once(&once, begin);
  pthread_mutex_lock(&lock);
  if (is_slow && (op.kind == FILL || !strcmp(op.name, "fill"))) op.due = now_ns() + next() % 2000000;
  if (stream == &legacy && breaks(0)) { pthread_mutex_unlock(&lock); return 906; }
  if (stream->capture) {
    struct graph *graph = stream->capture;
    struct node *node = calloc(1, sizeof *node);
    *node = (struct node){.type = type, .op = op};
    for (int i = 0; i < 6; i++) node->parameters[i] = &node->op.a[i];
    if (large_of(op.name)) node->parameters[0] = (void *)op.a[5];
    graph->nodes = realloc(graph->nodes, (graph->count + 1) * sizeof *graph->nodes);
    graph->nodes[graph->count++] = node;
  } else {
    if (!stream->room) { stream->room = 1 << 14; stream->ops = calloc(stream->room, sizeof op); }
    while (stream->tail - stream->head == stream->room) pthread_cond_wait(&changed, &lock);
    stream->ops[stream->tail++ % stream->room] = op;
    pthread_cond_broadcast(&changed);
  }
  pthread_mutex_unlock(&lock);
  return OK;
}
static R drained(struct stream *stream, uint64_t to) {
  pthread_mutex_lock(&lock);
  while (stream->head < to) pthread_cond_wait(&changed, &lock);
  pthread_mutex_unlock(&lock);
  return OK;
}
static R all_drained(void) {
  for (int i = 0; i < stream_count; i++) if (streams[i]) drained(streams[i], streams[i]->tail);
  return OK;
}

API R cuInit(unsigned flags) { (void)flags; pthread_once(&once, begin); return OK; }
API R cuDriverGetVersion(int *version) { *version = 13000; return OK; }
API R cuDeviceGetCount(int *count) { *count = 1; return OK; }
API R cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
API R cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = (void *)CONTEXT; return OK; }
API R cuCtxSetCurrent(void *context) { (void)context; return OK; }
API R cuCtxGetCurrent(void **context) { *context = (void *)CONTEXT; return OK; }
API R cuCtxPushCurrent_v2(void *context) { (void)context; return OK; }
API R cuCtxPopCurrent_v2(void **context) { *context = (void *)CONTEXT; return OK; }
API R cuCtxSynchronize(void) { if (VISITED) return OK; pthread_mutex_lock(&lock); int is_broken = breaks(1); pthread_mutex_unlock(&lock); return is_broken ? 900 : all_drained(); }
API R cuThreadExchangeStreamCaptureMode(int *mode) { *mode = 2 - *mode; return OK; }
API R cuPointerGetAttribute(void *value, int attribute, uint64_t address) { *(unsigned *)value = address - ARENA < ARENA_BYTES ? 2 : 1; return attribute == 2 ? OK : INVALID; }
API R cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags) {
  static void *registered[16];
  (void)bytes; (void)flags;
  pthread_mutex_lock(&lock);
  int at = 0;
  while (at < 15 && registered[at] && registered[at] != address) at++;
  R result = registered[at] ? 712 : OK;
  registered[at] = address;
  pthread_mutex_unlock(&lock);
  slow();
  return result;
}
API R cuMemHostUnregister(void *address) { (void)address; return all_drained(); }
API R cuMemFreeHost(void *address) { free(address); return all_drained(); }
API R cuMemHostGetDevicePointer_v2(uint64_t *address, void *host, unsigned flags) { (void)flags; *address = (uint64_t)host; return OK; }

API R cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  pthread_once(&once, begin);
  pthread_mutex_lock(&lock);
  uint64_t size = (bytes + 511) / 512 * 512;
  static int refused;
  if (size > most - live || (getenv("FAKE_NO_MAP") && bytes > 60 << 20 && !refused++)) { pthread_mutex_unlock(&lock); return OOM; }
  live += size;
  int at = 0;
  while (at < freed_count && freed[at].bytes != size) at++;
  if (at < freed_count) { *address = freed[at].address; freed[at] = freed[--freed_count]; }
  else { *address = ARENA + 512 + bump; bump += size + 512; }
  pthread_mutex_unlock(&lock);
  if (bump > ARENA_BYTES / 2) return OOM;
  uint64_t *header = (uint64_t *)(*address - 16);
  header[0] = *address ^ OWN;
  header[1] = size;
  return OK;
}
API R cuMemFree_v2(uint64_t address) {
  uint64_t *header = (uint64_t *)(address - 16);
  pthread_once(&once, begin);
  if (address - ARENA - 16 >= ARENA_BYTES || header[0] != (address ^ OWN)) return INVALID;  // it is not its own
  all_drained();
  pthread_mutex_lock(&lock);
  header[0] = 0;
  live -= header[1];
  if (freed_count < 4096) { freed[freed_count].bytes = header[1]; freed[freed_count++].address = address; }
  pthread_mutex_unlock(&lock);
  return OK;
}
API R cuDeviceGetAttribute(int *value, int attribute, int device) { (void)device; *value = attribute == 102 ? 1 : attribute == 75 ? 9 : 0; return OK; }
API R cuMemGetAllocationGranularity(size_t *bytes, const void *property, int option) { (void)property; (void)option; *bytes = 2 << 20; return OK; }
API R cuMemCreate(uint64_t *handle, size_t bytes, const void *property, unsigned long long flags) {
  (void)property; (void)flags;
  pthread_once(&once, begin);
  pthread_mutex_lock(&lock);
  int has_room = bytes <= most - live;
  if (has_room) live += bytes;
  pthread_mutex_unlock(&lock);
  *handle = bytes;
  return has_room ? OK : OOM;
}
API R cuMemRelease(uint64_t handle) { (void)handle; return OK; }
// A range that is asked for at an address is the upper half of the arena.
API R cuMemAddressReserve(uint64_t *address, size_t bytes, size_t alignment, uint64_t hint, unsigned long long flags) { (void)alignment; (void)flags; *address = ARENA + ARENA_BYTES / 2; return hint ? OK : cuMemAlloc_v2(address, bytes); }
API R cuMemAddressFree(uint64_t address, size_t bytes) { (void)bytes; return cuMemFree_v2(address); }
API R cuMemMap(uint64_t address, size_t bytes, size_t offset, uint64_t handle, unsigned long long flags) { (void)address; (void)bytes; (void)offset; (void)handle; (void)flags; return OK; }
API R cuMemUnmap(uint64_t address, size_t bytes) {  // at once, whoever uses it
  memset((void *)address, 0xEE, bytes);
  pthread_mutex_lock(&lock);
  live -= bytes < live ? bytes : live;
  pthread_mutex_unlock(&lock);
  return OK;
}
API R cuMemSetAccess(uint64_t address, size_t bytes, const void *access, size_t count) { (void)address; (void)bytes; (void)access; (void)count; return OK; }
API R cuMemAllocAsync(uint64_t *address, size_t bytes, void *stream) { (void)stream; return cuMemAlloc_v2(address, bytes); }
API R cuMemFreeAsync(uint64_t address, void *stream) { (void)stream; return cuMemFree_v2(address); }
API R cuMemFreeAsync_ptsz(uint64_t address, void *stream) { return cuMemFreeAsync(address, stream); }

static R copy(uint64_t target, uint64_t source, size_t bytes, void *stream) {
  struct op op = {COPY, {target, source, bytes, 1, 0, 0}, "", NULL, 0};
  if (source - ARENA >= ARENA_BYTES && target - ARENA < ARENA_BYTES && !of(stream)->capture) {  // pageable: taken at once
    op.owned = malloc(bytes + 1);
    memcpy(op.owned, (void *)source, bytes);
    op.a[1] = (uint64_t)op.owned;
  }
  return put(stream, op, 1);
}
static R now(R result) { return result == OK ? drained(&legacy, legacy.tail) : result; }
API R cuMemcpyHtoD_v2(uint64_t target, const void *source, size_t bytes) { if (VISITED) return OK; if (is_slow) usleep(20000); return now(copy(target, (uint64_t)source, bytes, NULL)); }
API R cuMemcpyDtoH_v2(void *target, uint64_t source, size_t bytes) { return now(copy((uint64_t)target, source, bytes, NULL)); }
API R cuMemcpyDtoD_v2(uint64_t target, uint64_t source, size_t bytes) { return copy(target, source, bytes, NULL); }
API R cuMemcpy(uint64_t target, uint64_t source, size_t bytes) { return now(copy(target, source, bytes, NULL)); }
API R cuMemcpyHtoDAsync_v2(uint64_t target, const void *source, size_t bytes, void *stream) { return copy(target, (uint64_t)source, bytes, stream); }
API R cuMemcpyDtoHAsync_v2(void *target, uint64_t source, size_t bytes, void *stream) { if (VISITED) return OK; return copy((uint64_t)target, source, bytes, stream); }
API R cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t bytes, void *stream) { if (VISITED) return OK; return copy(target, source, bytes, stream); }
API R cuMemcpyAsync(uint64_t target, uint64_t source, size_t bytes, void *stream) { return copy(target, source, bytes, stream); }
API R cuMemcpyAsync_ptsz(uint64_t target, uint64_t source, size_t bytes, void *stream) { return copy(target, source, bytes, stream); }
API R cuMemcpyPeerAsync(uint64_t target, void *a, uint64_t source, void *b, size_t bytes, void *stream) { (void)a; (void)b; return copy(target, source, bytes, stream); }
API R cuMemcpyBatchAsync_v2(uint64_t *targets, uint64_t *sources, size_t *bytes, size_t count, void *a, size_t *b, size_t c, void *stream) { (void)a; (void)b; (void)c; for (size_t i = 0; i < count; i++) copy(targets[i], sources[i], bytes[i], stream); return OK; }
struct end2 { size_t x, y; int type; void *host; uint64_t device; void *array; size_t pitch; };
struct copy2 { struct end2 source, target; size_t width, height; };
static uint64_t place2(const struct end2 *end) { return (end->type == 1 ? (uint64_t)end->host : end->device) + end->y * end->pitch + end->x; }
API R cuMemcpy2DAsync_v2(const struct copy2 *c, void *stream) { struct op op = {COPY, {place2(&c->target), place2(&c->source), c->width, c->height, c->target.pitch, c->source.pitch}, "", NULL, 0}; return put(stream, op, 1); }
API R cuMemcpy2D_v2(const struct copy2 *c) { return now(cuMemcpy2DAsync_v2(c, NULL)); }
struct end3 { size_t x, y, z, level; int type; void *host; uint64_t device; void *array, *context; size_t pitch, height; };
struct copy3 { struct end3 source, target; size_t width, height, depth; };
static uint64_t place3(const struct end3 *end, size_t z) { return (end->type == 1 ? (uint64_t)end->host : end->device) + ((end->z + z) * end->height + end->y) * end->pitch + end->x; }
API R cuMemcpy3DAsync_v2(const struct copy3 *c, void *stream) { for (size_t z = 0; z < c->depth; z++) { struct op op = {COPY, {place3(&c->target, z), place3(&c->source, z), c->width, c->height, c->target.pitch, c->source.pitch}, "", NULL, 0}; put(stream, op, 1); } return OK; }
#define FILLS(bits, type) \
  API R cuMemsetD##bits##Async(uint64_t target, type value, size_t count, void *stream) { struct op op = {FILL, {target, value, count, 1, 0, bits / 8}, "", NULL, 0}; return put(stream, op, 2); } \
  API R cuMemsetD##bits##_v2(uint64_t target, type value, size_t count) { return cuMemsetD##bits##Async(target, value, count, NULL); } \
  API R cuMemsetD2D##bits##Async(uint64_t target, size_t pitch, type value, size_t width, size_t height, void *stream) { struct op op = {FILL, {target, value, width, height, pitch, bits / 8}, "", NULL, 0}; return put(stream, op, 2); } \
  API R cuMemsetD2D##bits##_v2(uint64_t target, size_t pitch, type value, size_t width, size_t height) { return cuMemsetD2D##bits##Async(target, pitch, value, width, height, NULL); }
FILLS(8, unsigned char) FILLS(16, unsigned short) FILLS(32, unsigned)
API R cuMemsetD8Async_ptsz(uint64_t target, unsigned char value, size_t count, void *stream) { return cuMemsetD8Async(target, value, count, mine(stream)); }

API R cuStreamWriteValue64_v2(void *stream, uint64_t address, uint64_t value, unsigned flags) { (void)flags; if (VISITED) return OK; struct op op = {WRITE, {address, value, 8}, "", NULL, 0}; return put(stream, op, 12); }
API R cuStreamWriteValue32_v2(void *stream, uint64_t address, uint32_t value, unsigned flags) { (void)flags; struct op op = {WRITE, {address, value, 4}, "", NULL, 0}; return put(stream, op, 12); }
API R cuStreamCreate(struct stream **stream, unsigned flags) {
  struct stream *found = NULL;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < stream_count && !found; i++) if (streams[i]->is_gone && streams[i]->head == streams[i]->tail) found = streams[i];
  if (found) found->is_gone = 0;
  pthread_mutex_unlock(&lock);
  if (!found) found = added(calloc(1, sizeof *found));
  found->is_blocking = !(flags & 1);
  *stream = found;
  return OK;
}
API R cuStreamDestroy_v2(struct stream *stream) { pthread_mutex_lock(&lock); stream->is_gone = 1; stream->capture = NULL; pthread_mutex_unlock(&lock); return OK; }
API R cuStreamSynchronize(void *stream) { pthread_once(&once, begin); struct stream *found = of(stream); return found->capture ? 900 : drained(found, found->tail); }
API R cuStreamSynchronize_ptsz(void *stream) { return cuStreamSynchronize(mine(stream)); }
API R cuStreamQuery(void *stream) { return of(stream)->head == of(stream)->tail ? OK : NOT_READY; }
API R cuStreamIsCapturing(void *stream, int *status) {
  if (VISITED) return OK;
  int is_beside = 0;
  *status = of(stream)->capture != NULL;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < stream_count; i++) is_beside |= streams[i]->is_blocking && streams[i]->capture;
  pthread_mutex_unlock(&lock);
  return of(stream) == &legacy && is_beside ? 906 : OK;
}
API R cuStreamIsCapturing_ptsz(void *stream, int *status) { return cuStreamIsCapturing(mine(stream), status); }
struct mark { struct stream *stream; uint64_t position; };
API R cuEventCreate(struct mark **event, unsigned flags) { (void)flags; *event = calloc(1, sizeof **event); return OK; }
API R cuEventDestroy_v2(struct mark *event) { (void)event; return OK; }
API R cuStreamWaitEvent(void *stream, struct mark *event, unsigned flags) { (void)flags; if (!event->stream || event->stream == of(stream)) return OK; struct op op = {WAIT, {(uint64_t)event->stream, event->position}, "", NULL, 0}; return put(stream, op, 6); }
API R cuStreamWaitEvent_ptsz(void *stream, struct mark *event, unsigned flags) { return cuStreamWaitEvent(mine(stream), event, flags); }
API R cuEventRecord(struct mark *event, void *handle) {
  struct stream *stream = of(handle);
  slow();
  for (int i = 0; stream == &legacy && i < stream_count; i++) {
    struct op op = {WAIT, {(uint64_t)streams[i], streams[i]->tail}, "", NULL, 0};
    if (streams[i]->is_own) put(handle, op, 6);
  }
  pthread_mutex_lock(&lock);
  int is_broken = stream == &legacy && breaks(0);
  event->stream = stream;
  event->position = stream->tail;
  pthread_mutex_unlock(&lock);
  slow();
  return is_broken ? 906 : OK;
}
API R cuEventRecord_ptsz(struct mark *event, void *stream) { return cuEventRecord(event, mine(stream)); }
API R cuEventQuery(struct mark *event) { return !event->stream || event->stream->head >= event->position ? OK : NOT_READY; }
API R cuEventSynchronize(struct mark *event) { return event->stream ? drained(event->stream, event->position) : OK; }

static const struct { const char *name; int parameters; } known[] = {{"fill", 3}, {"axpy", 3}, {"scatter", 3}, {"indirect", 2}, {"sum", 3}, {"mix", 3}, {"update", 3}, {"nothing", 0}, {"tensor", 2}, {"tensors", 2}};
enum { KNOWN = sizeof known / sizeof *known };
static struct function functions[KNOWN];
API R cuModuleLoadData(void **module, const void *image) {
  const char *found = strstr(image, "hooked: 0x");
  control = found ? strtoull(found + 8, NULL, 16) : 0;
  *module = (void *)0x55;
  return OK;
}
API R cuModuleUnload(void *module) { (void)module; return OK; }
API R cuModuleGetFunction(struct function **function, void *module, const char *name) {
  (void)module;
  for (int i = 0; i < KNOWN; i++) {
    if (strcmp(known[i].name, name)) continue;
    snprintf(functions[i].name, sizeof functions[i].name, "%s", name);
    functions[i].parameters = known[i].parameters;
    *function = &functions[i];
    return OK;
  }
  return NOT_FOUND;
}
API R cuFuncGetModule(void **module, struct function *function) { (void)function; *module = (void *)0x55; return OK; }
API R cuFuncGetName(const char **name, struct function *function) { *name = function->name; return OK; }
API R cuFuncGetParamInfo(struct function *function, size_t index, size_t *offset, size_t *bytes) { size_t large = large_of(function->name); *offset = large ? large * index : 8 * index; *bytes = large && !index ? large : 8; return (int)index < function->parameters ? OK : INVALID; }
// Its own copy, which nobody frees: a graph may need it for ever.
static uint64_t kept(const char *name, void **parameters, void **extra) {
  size_t size = large_of(name);
  return size ? (uint64_t)memcpy(malloc(size), parameters ? parameters[0] : extra[1], size) : 0;
}
static R launch(struct function *function, void *stream, void **parameters, void **extra) {
  struct op op = {.kind = KERNEL, .a = {[5] = kept(function->name, parameters, extra)}};
  snprintf(op.name, sizeof op.name, "%s", strcmp(function->name, "update") ? function->name : "axpy");
  if (op.a[5]) { if (parameters) memcpy(&op.a[1], parameters[1], 8); }
  else if (parameters) for (int i = 0; i < function->parameters; i++) memcpy(&op.a[i], parameters[i], 8);
  else if (extra) memcpy(op.a, extra[1], 8 * (size_t)function->parameters);
  return put(stream, op, 0);
}
API R cuLaunchKernel(struct function *function, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f, unsigned g, void *stream, void **parameters, void **extra) { (void)a; (void)b; (void)c; (void)d; (void)e; (void)f; (void)g; return launch(function, stream, parameters, extra); }
API R cuLaunchKernel_ptsz(struct function *function, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f, unsigned g, void *stream, void **parameters, void **extra) { (void)a; (void)b; (void)c; (void)d; (void)e; (void)f; (void)g; return launch(function, mine(stream), parameters, extra); }

API R cuLaunchHostFunc(void *stream, void (*call)(void *), void *context) { (void)call; (void)context; return put(stream, (struct op){.kind = NODE_FREE}, 3); }  // in a graph: not called
struct listed { struct function *function; unsigned sizes[7]; void *stream; void **parameters; };
API R cuLaunchCooperativeKernelMultiDevice(const struct listed *list, unsigned devices, unsigned flags) { (void)flags; for (unsigned i = 0; i < devices; i++) launch(list[i].function, list[i].stream, list[i].parameters, NULL); return OK; }
API R cuStreamBeginCapture_v2(void *stream, int mode) { (void)mode; of(stream)->capture = calloc(1, sizeof(struct graph)); return OK; }
API R cuStreamEndCapture(void *stream, struct graph **graph) { *graph = of(stream)->capture; of(stream)->capture = NULL; return (*graph)->is_broken ? 901 : OK; }
API R cuGraphInstantiateWithFlags(struct graph **executable, struct graph *graph, unsigned long long flags) { (void)flags; *executable = calloc(1, sizeof **executable); **executable = *graph; return OK; }
API R cuGraphExecUpdate_v2(struct graph *executable, struct graph *graph, void *information) { (void)information; *executable = *graph; return OK; }
API R cuGraphExecDestroy(struct graph *executable) { free(executable); return OK; }
API R cuGraphLaunch(struct graph *executable, void *stream) { for (size_t i = 0; i < executable->count; i++) put(stream, executable->nodes[i]->op, executable->nodes[i]->type); return OK; }
API R cuGraphGetNodes(struct graph *graph, struct node **nodes, size_t *count) { if (nodes) memcpy(nodes, graph->nodes, *count * sizeof *nodes); *count = graph->count; return OK; }
API R cuGraphNodeGetType(struct node *node, int *type) { *type = node->type; return OK; }
struct kernel_node { void *function; unsigned sizes[7]; void **parameters, **extra; void *kernel, *context; };
API R cuGraphKernelNodeGetParams_v2(struct node *node, struct kernel_node *found) {
  memset(found, 0, sizeof *found);
  cuModuleGetFunction((struct function **)&found->function, NULL, node->op.name);
  found->parameters = node->parameters;
  return OK;
}
API R cuGraphKernelNodeGetAttribute(struct node *node, int attribute, void *value) { (void)node; memset(value, 0, 64); *(int *)value = attribute == 13 && getenv("FAKE_UPDATABLE"); return OK; }
API R cuGraphExecKernelNodeSetParams_v2(struct graph *executable, struct node *node, const struct kernel_node *to) {  // of all that have this node
  (void)executable;
  node->op.a[5] = kept(node->op.name, to->parameters, NULL);
  memcpy(&node->op.a[1], to->parameters[1], 8);
  return OK;
}
API R cuGraphMemcpyNodeGetParams(struct node *node, struct copy3 *found) {
  memset(found, 0, sizeof *found);
  found->target.type = node->op.a[0] - ARENA < ARENA_BYTES ? 2 : 1;
  found->target.device = node->op.a[0];
  found->target.host = (void *)node->op.a[0];
  found->target.pitch = node->op.a[4];
  found->width = node->op.a[2];
  found->height = node->op.a[3];
  found->depth = 1;
  return OK;
}
struct fill_node { uint64_t target; size_t pitch; unsigned value, element; size_t width, height; };
API R cuGraphMemsetNodeGetParams(struct node *node, struct fill_node *found) { *found = (struct fill_node){node->op.a[0], node->op.a[4], (unsigned)node->op.a[1], (unsigned)node->op.a[5], node->op.a[2], node->op.a[3]}; return OK; }

static R newer(uint64_t target, unsigned char value, size_t count) { memset((void *)target, value, count); return OK; }
API R cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
  char name[128];
  Dl_info info;
  (void)version; (void)flags;
  dladdr((void *)cuInit, &info);
  void *self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  snprintf(name, sizeof name, "%s_v2", symbol);
  *function = dlsym(self, name);
  if (!*function) *function = dlsym(self, symbol);
  if (getenv("FAKE_NEWER") && !strcmp(symbol, getenv("FAKE_NEWER"))) *function = (void *)newer;  // which no shim knows
  if (status) *status = *function ? 0 : 1;
  return *function ? OK : NOT_FOUND;
}
