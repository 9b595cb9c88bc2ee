// A program whose threads give work to a GPU while another comes to points. For tests.
//
//   race PHASES own|made kernel|fill   a thread writes each page of a region once, in a stream of its own or one that it made, while the main thread comes to points;
//                          then, with nothing in flight, the region and the points that find it so are written to PROGRAM_SNAPSHOTS
//   long                a thread is in a call that lasts a while, again and again, when the main thread comes to points; likewise
//   together THREADS       threads make the first regions at the same moment, and fill them; likewise
//   capture                the first region comes while a stream that waits for the null stream is captured
//   many STREAMS           so many streams work between two points
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "program.h"

R cuMemFree_v2(P), cuMemsetD8Async(P, unsigned char, size_t, H), cuMemsetD8Async_ptsz(P, unsigned char, size_t, H), cuMemcpyDtoHAsync_v2(void *, P, size_t, H), cuMemcpyHtoD_v2(P, const void *, size_t);
R cuStreamDestroy_v2(H), cuStreamSynchronize(H), cuStreamSynchronize_ptsz(H), cuStreamBeginCapture_v2(H, int), cuStreamEndCapture(H, H *);
R cuLaunchKernel_ptsz(H, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, H, void **, void **);

enum { PAGE = 1 << 16, PAGES = 32, BYTES = PAGE * PAGES, THREADS_MAX = 8, QUIET = 40 };
static H context, fill, update;
static P regions[THREADS_MAX], outside;
static int region_count;
static uint64_t points, random_state;
static int is_own, is_kernel;
static _Atomic int is_writing;

static uint64_t next(void) { random_state = random_state * 6364136223846793005ull + 1442695040888963407ull; return random_state >> 33; }
static void launch(H function, H stream, P a, P b, P c, int own) {
  void *parameters[] = {&a, &b, &c};
  DO((own ? cuLaunchKernel_ptsz : cuLaunchKernel)(function, 4, 1, 1, 32, 1, 1, 0, stream, parameters, NULL));
}
static void come_to_point(H stream) {
  launch(update, stream, outside, outside + 4096, 16, 0);
  points++;
}
// Nothing is in flight: these points have what the regions hold now.
static void quiet(H stream) {
  FILE *file = fopen(getenv("PROGRAM_SNAPSHOTS"), "ab");
  DO(cuCtxSynchronize());
  uint64_t first = points + 1;
  for (int i = 0; i < QUIET; i++) {
    come_to_point(stream);
    DO(cuCtxSynchronize());
    usleep(500);  // for the agent
  }
  fwrite(&first, 8, 1, file);
  fwrite(&points, 8, 1, file);
  for (int i = 0; i < region_count; i++) fwrite((void *)(uintptr_t)regions[i], 1, BYTES, file);
  fclose(file);
}
static void *write_pages(void *order) {
  H stream = NULL;
  DO(cuCtxSetCurrent(context));
  if (!is_own) DO(cuStreamCreate(&stream, 1));
  for (int i = 0; i < PAGES; i++) {
    P page = regions[0] + PAGE * (P)((int *)order)[i] + 4096;
    if (is_kernel) launch(fill, stream, page, 8 + 512 * (P)(i % 3), 1000 + (P)i + points, is_own);
    else DO((is_own ? cuMemsetD8Async_ptsz : cuMemsetD8Async)(page, (unsigned char)next(), 512, stream));
    usleep(50);
  }
  DO((is_own ? cuStreamSynchronize_ptsz : cuStreamSynchronize)(stream));
  if (!is_own) DO(cuStreamDestroy_v2(stream));
  is_writing = 0;
  return NULL;
}
// A stream, and the first region, all zero.
static H begin(void) {
  H stream;
  DO(cuStreamCreate(&stream, 1));
  DO(cuMemAlloc_v2(&regions[region_count++], BYTES));
  DO(cuMemsetD8Async(regions[0], 0, BYTES, stream));
  quiet(stream);
  return stream;
}
static int race(int phases) {
  int order[PAGES];
  pthread_t thread;
  H stream = begin();
  for (int phase = 0; phase < phases; phase++) {
    for (int i = 0; i < PAGES; i++) order[i] = i;
    for (int i = PAGES - 1; i > 0; i--) { int at = (int)(next() % (uint64_t)(i + 1)), kept = order[i]; order[i] = order[at]; order[at] = kept; }
    is_writing = 1;
    pthread_create(&thread, NULL, write_pages, order);
    while (is_writing) { come_to_point(stream); DO(cuStreamSynchronize(stream)); usleep(100); }
    pthread_join(thread, NULL);
    quiet(stream);
  }
  return 0;
}

static void *copy_slowly(void *unused) {
  static unsigned char host[PAGE];
  DO(cuCtxSetCurrent(context));
  for (int i = 0; i < 8; i++) {
    for (int k = 0; k < PAGE; k++) host[k] = (unsigned char)(i + k);
    DO(cuMemcpyHtoD_v2(regions[0] + PAGE * (P)i + 512, host, PAGE));
  }
  is_writing = 0;
  return unused;
}
static int be_long(void) {
  pthread_t thread;
  H stream = begin();
  is_writing = 1;
  pthread_create(&thread, NULL, copy_slowly, NULL);
  while (is_writing) { come_to_point(stream); usleep(100); }
  pthread_join(thread, NULL);
  quiet(stream);
  return 0;
}

static pthread_barrier_t barrier;
static void *make_region(void *which) {
  P *region = which;
  H stream;
  DO(cuCtxSetCurrent(context));
  DO(cuStreamCreate(&stream, 1));
  uint64_t word;
  pthread_barrier_wait(&barrier);
  if (region == regions) DO(cuMemcpyDtoHAsync_v2(&word, outside, sizeof word, stream));  // the first read, too
  DO(cuMemAlloc_v2(region, BYTES));
  launch(fill, stream, *region, BYTES / 8, (P)(region - regions), 0);
  DO(cuStreamSynchronize(stream));
  return NULL;
}
static int together(int count) {
  H stream;
  pthread_t threads[THREADS_MAX];
  DO(cuStreamCreate(&stream, 1));
  region_count = count;
  pthread_barrier_init(&barrier, NULL, (unsigned)count);
  for (int i = 0; i < count; i++) pthread_create(&threads[i], NULL, make_region, &regions[i]);
  for (int i = 0; i < count; i++) pthread_join(threads[i], NULL);
  quiet(stream);
  for (int i = 0; i < count; i++) launch(fill, stream, regions[i] + PAGE * (P)i, 8, 77, 0);
  quiet(stream);
  return 0;
}

static int capture(void) {
  H stream, quiet_stream, graph;
  DO(cuStreamCreate(&stream, 0));
  DO(cuStreamCreate(&quiet_stream, 1));
  DO(cuStreamBeginCapture_v2(stream, 2));
  DO(cuMemAlloc_v2(&regions[0], (1 << 20) + 512));
  launch(fill, stream, regions[0], 1 << 17, 5, 0);
  DO(cuStreamEndCapture(stream, &graph));
  for (int i = 0; i < QUIET; i++) { come_to_point(quiet_stream); DO(cuCtxSynchronize()); usleep(500); }
  return 0;
}

static int many(int count) {
  H streams[300], stream;
  DO(cuStreamCreate(&stream, 1));
  DO(cuMemAlloc_v2(&regions[0], BYTES));
  for (int i = 0; i < count; i++) DO(cuStreamCreate(&streams[i], 1));
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < count; i++) launch(fill, streams[i], regions[0], 8, 1, 0);
    DO(cuCtxSynchronize());
    come_to_point(stream);
    usleep(20000);  // for the agent
  }
  return 0;
}

int main(int count, char **words) {
  H module;
  const char *seed = getenv("PROGRAM_SEED");
  random_state = seed ? strtoull(seed, NULL, 10) : 1;
  int number = count > 2 ? atoi(words[2]) : 0, result = 2;
  is_own = count > 3 && !strcmp(words[3], "own");
  is_kernel = count > 4 && !strcmp(words[4], "kernel");
  enter(&context);
  DO(cuModuleLoadData(&module, ".version 8.0"));
  DO(cuModuleGetFunction(&fill, module, "fill"));
  DO(cuModuleGetFunction(&update, module, "update"));
  DO(cuMemAlloc_v2(&outside, 1 << 16));
  if (count > 2 && !strcmp(words[1], "race")) result = race(number);
  if (count > 2 && !strcmp(words[1], "together")) result = together(number);
  if (count > 1 && !strcmp(words[1], "long")) result = be_long();
  if (count > 1 && !strcmp(words[1], "capture")) result = capture();
  if (count > 2 && !strcmp(words[1], "many")) result = many(number);
  return result;
}
