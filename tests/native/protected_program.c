// A program on a GPU that knows nothing of protection: it allocates, trains and prints what it reads. For tests.
//
//   train STEPS [KILL]  each step's numbers depend on what was read before; KILL: SIGKILL in the middle of this step
//   place STEPS         random allocations and frees, small and large, each with bytes of its own until it is freed; prints where they lie
//   dirty STEPS         random copies, fills, launches and graphs on two streams; before each point writes what the regions hold to a file
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "program.h"

R cuMemFree_v2(P), cuMemAllocAsync(P *, size_t, H), cuMemFreeAsync(P, H), cuMemcpyHtoD_v2(P, const void *, size_t), cuMemcpyDtoH_v2(void *, P, size_t), cuMemcpyDtoD_v2(P, P, size_t);
R cuMemcpyHtoDAsync_v2(P, const void *, size_t, H), cuMemcpyDtoHAsync_v2(void *, P, size_t, H), cuMemcpyDtoDAsync_v2(P, P, size_t, H), cuMemcpyAsync(P, P, size_t, H), cuMemcpy(P, P, size_t), cuMemcpyPeerAsync(P, H, P, H, size_t, H);
R cuMemsetD8Async(P, unsigned char, size_t, H), cuMemsetD16Async(P, unsigned short, size_t, H), cuMemsetD32_v2(P, unsigned, size_t), cuMemsetD2D32Async(P, size_t, unsigned, size_t, size_t, H);
R cuStreamDestroy_v2(H), cuStreamSynchronize(H), cuStreamBeginCapture_v2(H, int), cuStreamEndCapture(H, H *), cuGraphInstantiateWithFlags(H *, H, unsigned long long), cuGraphExecUpdate_v2(H, H, void *), cuGraphExecDestroy(H), cuGraphLaunch(H, H);
R cuMemcpy2DAsync_v2(const void *, H), cuMemcpy2D_v2(const void *), cuMemcpy3DAsync_v2(const void *, H), cuMemcpyBatchAsync_v2(P *, P *, size_t *, size_t, void *, size_t *, size_t, H);
R cuEventCreate(H *, unsigned), cuEventRecord(H, H), cuStreamWaitEvent(H, H, unsigned);

static uint64_t random_state;
static uint64_t next(void) { random_state = random_state * 6364136223846793005ull + 1442695040888963407ull; return random_state >> 29; }
static H module, fill, axpy, scatter, indirect, sum, mix, update;
static void launch(H function, H stream, P a, P b, P c) {
  void *parameters[] = {&a, &b, &c};
  DO(cuLaunchKernel(function, 4, 1, 1, 32, 1, 1, 0, stream, parameters, NULL));
}
static void start(void) {
  H context;
  enter(&context);
  DO(cuModuleLoadData(&module, ".version 8.0"));
  DO(cuModuleGetFunction(&fill, module, "fill"));
  DO(cuModuleGetFunction(&axpy, module, "axpy"));
  DO(cuModuleGetFunction(&scatter, module, "scatter"));
  DO(cuModuleGetFunction(&indirect, module, "indirect"));
  DO(cuModuleGetFunction(&sum, module, "sum"));
  DO(cuModuleGetFunction(&mix, module, "mix"));
  DO(cuModuleGetFunction(&update, module, "update"));
}

enum { WEIGHTS = 1 << 18, MOMENTS = 1 << 17, BATCH = 1 << 10, ACTIVATIONS = 1 << 12 };  // in words

static int train(int steps, int kill_at) {
  P weights, moments, activations, batch, loss, extra = 0;
  H stream, other, event, graph, executable = NULL;
  static uint64_t host[BATCH], got[4];
  uint64_t seen = 17;
  DO(cuStreamCreate(&stream, 1));
  DO(cuStreamCreate(&other, 1));
  DO(cuEventCreate(&event, 2));
  DO(cuMemAlloc_v2(&activations, 8 * ACTIVATIONS));
  DO(cuMemAlloc_v2(&weights, 8 * WEIGHTS));
  DO(cuMemAlloc_v2(&batch, 8 * BATCH));
  DO(cuMemAlloc_v2(&loss, 64));
  launch(fill, stream, weights, WEIGHTS, getenv("PROGRAM_FILL") ? 54321 : 12345);
  for (int step = 1; step <= steps; step++) {
    if (step == 2) {  // as optimisers do
      DO(cuMemAlloc_v2(&moments, 8 * MOMENTS));
      DO(cuMemsetD8Async(moments, 0, 8 * MOMENTS, stream));
      if (getenv("PROGRAM_PLACE")) moments += 8 * 64;  // as an allocator that goes by addresses may decide
    }
    if (step == 2 && getenv("PROGRAM_GRAPH")) {
      DO(cuStreamBeginCapture_v2(stream, 0));
      launch(mix, stream, moments + 8 * (P)atoi(getenv("PROGRAM_GRAPH")), weights, 64);
      DO(cuStreamEndCapture(stream, &graph));
      DO(cuGraphInstantiateWithFlags(&executable, graph, 0));
    }
    if (executable) DO(cuGraphLaunch(executable, stream));
    random_state = seen;
    for (int i = 0; i < BATCH; i++) host[i] = next();
    DO(cuMemcpyHtoDAsync_v2(batch, host, sizeof host, stream));
    launch(fill, stream, activations, ACTIVATIONS, seen);
    launch(mix, stream, activations, batch, BATCH);
    launch(mix, stream, weights + 8 * (seen % 1000), activations, ACTIVATIONS);
    if (seen % 3 == 0) launch(scatter, stream, weights, WEIGHTS, seen);
    if (step >= 2) {
      DO(cuEventRecord(event, stream));
      DO(cuStreamWaitEvent(other, event, 0));
      launch(mix, other, moments, weights, MOMENTS / 64);
      DO(cuEventRecord(event, other));
      DO(cuStreamWaitEvent(stream, event, 0));
    }
    if (step % 5 == 0) {  // a cache that grows
      P larger;
      DO(cuMemAllocAsync(&larger, 8 * (MOMENTS + 1024 * (step % 64)), stream));
      DO(cuMemsetD8Async(larger, 0, 8 * (MOMENTS + 1024 * (step % 64)), stream));
      if (extra) {
        DO(cuMemcpyDtoDAsync_v2(larger, extra, 8 * MOMENTS, stream));
        DO(cuMemFreeAsync(extra, stream));
      }
      extra = larger;
    }
    if (extra) launch(axpy, stream, extra, weights, 2048);
    launch(update, stream, weights, step >= 2 ? moments : activations, 1024);
    if (step == kill_at) raise(SIGKILL);
    launch(sum, stream, loss, weights, 4096);
    if (extra) launch(sum, stream, loss + 8, extra, 1024);
    memset(got, 0, sizeof got);
    if (step % 2) DO(cuMemcpyDtoHAsync_v2(got, loss, 16, stream));
    DO(cuStreamSynchronize(stream));
    if (step % 2 == 0) DO(cuMemcpyDtoH_v2(got, loss, 16));
    seen = seen * 31 + got[0] + (extra ? got[1] : 0);
    printf("%d %lx\n", step, seen);
    fflush(stdout);
  }
  return 0;
}

enum { REGIONS = 4, WRITTEN = 3 };  // the last one has tables of pointers, which nothing else writes
static const size_t region_bytes[REGIONS] = {8 * WEIGHTS, 8 * MOMENTS, (1 << 20) + 12 * 4096 + 512, 8 * MOMENTS};

struct end2 { size_t x, y; int type; void *host; P device; void *array; size_t pitch; };
struct copy2 { struct end2 source, target; size_t width, height; };
struct end3 { size_t x, y, z, level; int type; void *host; P device; void *array, *context; size_t pitch, height; };
struct copy3 { struct end3 source, target; size_t width, height, depth; };

// Appends all regions to the file; "device" memory is this process's own.
static void snapshot(const P *region) {
  static FILE *file;
  if (!file) file = fopen(getenv("PROGRAM_SNAPSHOTS"), "wb");
  for (int i = 0; i < REGIONS; i++)
    if (fwrite((void *)(uintptr_t)region[i], 1, region_bytes[i], file) != region_bytes[i]) exit(3);
  fflush(file);
}

static int dirty(int steps) {
  P region[REGIONS], tables[2], outside;
  H stream[3] = {NULL}, graph, executable = NULL, event;
  static unsigned char host[1 << 16];
  DO(cuStreamCreate(&stream[1], 1));
  DO(cuStreamCreate(&stream[2], 1));
  DO(cuEventCreate(&event, 2));
  for (int i = 0; i < REGIONS; i++) DO(cuMemAlloc_v2(&region[i], region_bytes[i]));
  DO(cuMemAlloc_v2(&tables[0], 4096));
  tables[1] = region[WRITTEN] + 4096;
  DO(cuMemAlloc_v2(&outside, 1 << 16));
  for (int i = 0; i < REGIONS; i++) DO(cuMemsetD32_v2(region[i], 7, region_bytes[i] / 4));
  DO(cuMemsetD32_v2(outside, 9, 1 << 14));
  for (int i = 0; i < 2; i++)
    for (int k = 0; k < 16; k++) DO(cuMemcpyHtoD_v2(tables[i] + 8 * (P)k, &region[k % WRITTEN], 8));
  DO(cuCtxSynchronize());
  for (int step = 1; step <= steps; step++) {
    int count = (int)(next() % 6);
    for (int i = 0; i < count; i++) {
      int which = (int)(next() % WRITTEN);
      size_t room = region_bytes[which], bytes = 8 + next() % 30000, at = next() % (room - 60000) / 8 * 8;
      P to = region[which] + at, from = region[next() % WRITTEN] + next() % 500000 / 8 * 8;
      H on = stream[next() % 3];
      for (int k = 0; k < 64; k++) host[next() % sizeof host] = (unsigned char)next();
      switch (next() % 19) {
        case 0: DO(cuMemcpyHtoD_v2(to, host, bytes)); break;
        case 1: DO(cuMemcpyHtoDAsync_v2(to, host, bytes, on)); break;
        case 2: DO(cuMemcpyDtoDAsync_v2(to, outside, bytes, on)); break;
        case 3: DO(cuMemcpyAsync(to, (P)(uintptr_t)host, bytes, on)); break;
        case 4: DO(cuMemcpyPeerAsync(to, NULL, outside, NULL, bytes, on)); break;
        case 5: DO(cuMemsetD8Async(to, (unsigned char)next(), bytes, on)); break;
        case 6: DO(cuMemsetD16Async(to, (unsigned short)next(), bytes / 2, on)); break;
        case 7: DO(cuMemsetD2D32Async(to, 4096, (unsigned)next(), 1 + next() % 1000, 1 + next() % 12, on)); break;
        case 8: launch(fill, on, to, bytes / 8, next()); break;
        case 9: launch(scatter, on, region[which], room / 8, next()); break;
        case 10: {
          P targets[16], table = tables[next() % 2];
          for (int k = 0; k < 16; k++) targets[k] = region[next() % WRITTEN] + next() % 100000 * 8;
          DO(cuMemcpyHtoDAsync_v2(table, targets, sizeof targets, on));
          launch(indirect, on, table, 16, 0);
          break;
        }
        case 11: {
          struct copy2 copy = {{0, 0, 1, host, 0, NULL, 64}, {8, 1, 2, NULL, to, NULL, 4096}, 8 + next() % 1000 / 8 * 8 % 64, 1 + next() % 10};
          DO(cuMemcpy2DAsync_v2(&copy, on));
          break;
        }
        case 12: {
          struct copy3 copy = {{0, 0, 0, 0, 1, host, 0, NULL, NULL, 64, 4}, {8, 1, 0, 0, 2, NULL, to, NULL, NULL, 1024, 8}, 48, 3, 1 + next() % 5};
          DO(cuMemcpy3DAsync_v2(&copy, on));
          break;
        }
        case 13: {
          P targets[2] = {to, region[0] + 64}, sources[2] = {outside, (P)(uintptr_t)host};
          size_t sizes[2] = {bytes, 100};
          DO(cuMemcpyBatchAsync_v2(targets, sources, sizes, 2, NULL, NULL, 0, on));
          break;
        }
        case 14: case 15: {
          H live = stream[1 + next() % 2];
          DO(cuStreamBeginCapture_v2(live, 0));
          if (next() % 3) launch(scatter, live, region[which], room / 8, next());
          else launch(indirect, live, tables[next() % 2], 16, 0);
          if (next() % 2) DO(cuMemsetD8Async(to, (unsigned char)next(), bytes, live));
          if (next() % 2) DO(cuMemcpyDtoDAsync_v2(from, outside, bytes, live));
          DO(cuStreamEndCapture(live, &graph));
          if (executable && next() % 2) DO(cuGraphExecUpdate_v2(executable, graph, NULL));
          else {
            if (executable) DO(cuGraphExecDestroy(executable));
            DO(cuGraphInstantiateWithFlags(&executable, graph, 0));
          }
          DO(cuGraphLaunch(executable, on));
          break;
        }
        case 16: if (executable) DO(cuGraphLaunch(executable, on)); break;
        case 17: {
          P a = to, n = bytes / 8, v = next();
          uint64_t buffer[3] = {a, n, v};
          size_t size = sizeof buffer;
          void *extra[] = {(void *)1, buffer, (void *)2, &size, NULL};
          DO(cuLaunchKernel(fill, 1, 1, 1, 1, 1, 1, 0, on, NULL, extra));
          break;
        }
        case 18: {  // its work goes on when it has gone
          H brief;
          DO(cuStreamCreate(&brief, 1));
          for (int k = 0; k < 3; k++) launch(scatter, brief, region[which], room / 8, next());
          DO(cuStreamDestroy_v2(brief));
          break;
        }
      }
    }
    // what the regions hold at the point: nothing more is in flight, and only this thread gives work
    H on = stream[next() % 3];
    if (next() % 8 == 0) {  // beside a capture, of a stream whose work may be in flight
      launch(scatter, stream[1], region[next() % WRITTEN], 1 << 17, next());
      DO(cuStreamBeginCapture_v2(stream[1], 0));
      launch(update, stream[2], outside, outside + 4096, 16);
      DO(cuStreamEndCapture(stream[1], &graph));
      DO(cuCtxSynchronize());
      snapshot(region);
    } else if (next() % 3 == 0) {
      DO(cuCtxSynchronize());
      snapshot(region);
      launch(update, on, outside, outside + 4096, 16);
    } else {
      launch(update, on, outside, outside + 4096, 16);  // work may be in flight: it must come before
      DO(cuCtxSynchronize());
      snapshot(region);
    }
  }
  return 0;
}

enum { PLACES = 96 };

static int place(int steps) {
  static struct { P at; size_t bytes; unsigned char byte; } held[PLACES];
  static unsigned char host[4 << 20];
  for (int step = 1; step <= steps; step++) {
    int i = (int)(next() % PLACES);
    // each hundred steps all of them go, and their memory with them
    for (int k = step % 100 ? i : 0; k < (step % 100 ? i + 1 : PLACES); k++) {
      if (!held[k].at) continue;
      const unsigned char *here = (const unsigned char *)(uintptr_t)held[k].at;  // "device" memory is this process's own
      for (size_t b = 0; b < held[k].bytes; b++)
        if (here[b] != held[k].byte) { printf("step %d: byte %zu of %lx is another's\n", step, b, held[k].at); return 1; }
      DO(cuMemFree_v2(held[k].at));
      held[k].at = 0;
    }
    held[i].bytes = next() % 8 ? 1 + next() % (1 << (4 + next() % 16)) : (1 << 20) - 1 + next() % 3 * next() % (1 << 21);
    held[i].byte = (unsigned char)next();
    DO(cuMemAlloc_v2(&held[i].at, held[i].bytes));
    memset(host, held[i].byte, held[i].bytes);
    DO(cuMemcpyHtoD_v2(held[i].at, host, held[i].bytes));
    printf("%lx %zu\n", held[i].at, held[i].bytes);
  }
  return 0;
}

int main(int count, char **words) {
  alarm(400);  // a test that was cut off leaves nothing that runs on
  const char *seed = getenv("PROGRAM_SEED");
  random_state = seed ? strtoull(seed, NULL, 10) : 1;
  start();
  if (count > 2 && !strcmp(words[1], "train")) return train(atoi(words[2]), count > 3 ? atoi(words[3]) : 0);
  if (count > 2 && !strcmp(words[1], "place")) return place(atoi(words[2]));
  if (count > 2 && !strcmp(words[1], "dirty")) return dirty(atoi(words[2]));
  return 2;
}
