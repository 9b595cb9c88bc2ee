// A program on a GPU whose driver stays where it should not, for tests: waits_program MODE. It prints what its calls said and how many milliseconds they took.
//
//   unmap     the copies of a point never end; then memory is unmapped, again and again
//   allocate  the copies of a point never get to the host; then there is no memory, again and again
//   ends      protection ends while the program is on its way to a point; then it needs the memory that protection took
//   freed     the only region is freed, and no point comes that would free its copy; then there is no memory but that
//   kept      as unmap, but memory at a kept address is freed
//   middle    another thread is in the middle of a point as a region is freed; says whether the free was done before the point was over
//   begin     another thread begins a capture as memory at a kept address is freed; says how the capture ended
//   inside    a thread stays in a call: points until a second one has waited for it, and one more when the call is over
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "program.h"

R cuMemFree_v2(P), cuStreamBeginCapture_v2(H, int), cuStreamEndCapture(H, H *), cuMemcpyHtoD_v2(P, const void *, size_t);
R cuMemAddressReserve(P *, size_t, size_t, P, unsigned long long), cuMemMap(P, size_t, size_t, uint64_t, unsigned long long), cuMemUnmap(P, size_t), cuMemSetAccess(P, size_t, const void *, size_t);
void fake_visited(int (*)(const char *));

enum { REGION = 1 << 21, TIMES = 3, LIFE_S = 50 };
enum { POSTED = 2, LOST = 4, POINTS = 12, FIRED = 13, REASON = 32 };  // words of the board

static H context, update, stream;
static P outside;
static volatile uint64_t *board;
static _Atomic int is_there, is_over;

static uint64_t now_ms(void) { struct timespec time; clock_gettime(CLOCK_MONOTONIC, &time); return (uint64_t)time.tv_sec * 1000 + (uint64_t)time.tv_nsec / 1000000; }
static void a_moment(void) { usleep(20000); }
static void point(void) {
  P a = outside, b = outside + 4096, c = 16;
  void *parameters[] = {&a, &b, &c};
  DO(cuLaunchKernel(update, 4, 1, 1, 32, 1, 1, 0, stream, parameters, NULL));
}
static void start(void) {
  H module;
  char path[4096];
  enter(&context);
  DO(cuStreamCreate(&stream, 1));
  DO(cuModuleLoadData(&module, ".version 8.0"));
  DO(cuModuleGetFunction(&update, module, "update"));
  DO(cuMemAlloc_v2(&outside, 1 << 16));
  snprintf(path, sizeof path, "%s/board", getenv("CONCORDIA_PROTECT"));
  board = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, open(path, O_RDWR), 0);
}
static R allocated(size_t bytes) {
  P made;
  return cuMemAlloc_v2(&made, bytes);
}

static int without_words(const char *call) { return !strcmp(call, "cuStreamWriteValue64_v2"); }
static int unmap(void) {
  struct { int type, id, flags; } access = {1, 0, 3};
  P mapped;
  fake_visited(without_words);
  DO(cuMemAddressReserve(&mapped, TIMES * REGION, 0, 0, 0));
  for (P i = 0; i < TIMES; i++) DO(cuMemMap(mapped + i * REGION, REGION, 0, 0, 0));
  DO(cuMemSetAccess(mapped, TIMES * REGION, &access, 1));
  point();
  if (board[FIRED] != 1) return 3;
  for (P i = 0; i < TIMES; i++) {
    uint64_t began = now_ms();
    R result = cuMemUnmap(mapped + i * REGION, REGION);
    printf("%d %lu\n", result, now_ms() - began);
  }
  return 0;
}

static int kept(void) {
  P regions[TIMES];
  fake_visited(without_words);
  for (int i = 0; i < TIMES; i++) DO(cuMemAlloc_v2(&regions[i], REGION));
  point();
  if (board[FIRED] != 1) return 3;
  for (int i = 0; i < TIMES; i++) {
    uint64_t began = now_ms();
    R result = cuMemFree_v2(regions[i]);
    printf("%d %lu\n", result, now_ms() - began);
  }
  return 0;
}

// Until somebody is through with what it does, or should be and is not.
static void give_time_to(_Atomic int *is_through, uint64_t bound_ms) {
  for (uint64_t end = now_ms() + bound_ms; !*is_through && now_ms() < end;) usleep(1000);
}
static int was_through;
static int stays_in_the_middle(const char *call) {
  if (strcmp(call, "cuMemcpyDtoDAsync_v2") || is_there) return 0;
  is_there = 1;
  give_time_to(&is_over, 300);
  was_through = is_over;
  return 0;
}
static void *come_to_point(void *unused) {
  DO(cuCtxSetCurrent(context));
  point();
  return unused;
}
static int middle(void) {
  P region;
  pthread_t thread;
  DO(cuMemAlloc_v2(&region, REGION));
  fake_visited(stays_in_the_middle);
  pthread_create(&thread, NULL, come_to_point, NULL);
  while (!is_there) a_moment();
  R result = cuMemFree_v2(region);
  is_over = 1;
  pthread_join(thread, NULL);
  printf("%d %d\n", result, was_through);
  return 0;
}

static R capture_result = -1;
static int stays_before_it_looks(const char *call) {
  if (strcmp(call, "cuCtxSynchronize") || is_there) return 0;
  is_there = 1;
  give_time_to(&is_over, 30);
  return 0;
}
static void *capture_one(void *unused) {
  H graph;
  DO(cuCtxSetCurrent(context));
  while (!is_there) usleep(100);
  DO(cuStreamBeginCapture_v2(stream, 2));
  is_over = 1;
  a_moment();
  capture_result = cuStreamEndCapture(stream, &graph);
  return unused;
}
static int begin(void) {
  P memory;
  pthread_t thread;
  DO(cuMemAlloc_v2(&memory, REGION));
  fake_visited(stays_before_it_looks);
  pthread_create(&thread, NULL, capture_one, NULL);
  R result = cuMemFree_v2(memory);
  pthread_join(thread, NULL);
  printf("%d %d\n", result, capture_result);
  return 0;
}

static int stays_on_its_way(const char *call) {
  if (strcmp(call, "cuMemcpyDtoHAsync_v2")) return 0;
  is_there = 1;
  for (;;) a_moment();
}
static int allocate(void) {
  fake_visited(stays_on_its_way);
  DO(allocated(REGION));
  point();
  while (!is_there) a_moment();
  for (int i = 0; i < TIMES; i++) {
    uint64_t began = now_ms();
    R result = allocated(1 << 30);
    printf("%d %lu\n", result, now_ms() - began);
  }
  return 0;
}

static int threads(void) {
  int found = 0;
  DIR *all = opendir("/proc/self/task");
  for (struct dirent *one; (one = readdir(all));) found += one->d_name[0] != '.';
  closedir(all);
  return found;
}
// The agent's word that it is over comes now, and the thread that waits for the agent goes.
static int ends_here(const char *call) {
  if (strcmp(call, "cuStreamIsCapturing") || board[POINTS] != 2 || is_over) return 0;
  int before = threads();
  is_over = 1;
  strcpy((char *)(uintptr_t)&board[REASON], "the agent has gone");
  board[LOST] = 1;
  while (threads() != before - 1) a_moment();
  return 0;
}
static int ends(void) {
  DO(allocated(REGION));
  point();
  while (board[POSTED] != 1) a_moment();
  fake_visited(ends_here);
  point();
  uint64_t began = now_ms();
  R result = allocated(REGION);
  printf("%d %lu\n", result, now_ms() - began);
  return is_over ? 0 : 3;
}

static int freed(void) {
  P region;
  DO(cuMemAlloc_v2(&region, REGION));
  DO(cuMemFree_v2(region));
  uint64_t began = now_ms();
  R result = allocated(2 * REGION);
  printf("%d %lu\n", result, now_ms() - began);
  return 0;
}

static int stays_inside(const char *call) {
  if (strcmp(call, "cuMemcpyHtoD_v2")) return 0;
  is_there = 1;
  while (!is_over) a_moment();
  return 0;
}
static void *call_long(void *unused) {
  static char host[64];
  DO(cuCtxSetCurrent(context));
  DO(cuMemcpyHtoD_v2(outside + 8192, host, sizeof host));
  return unused;
}
static int inside(uint64_t bound_ms) {
  pthread_t thread;
  int waited = 0;
  DO(allocated(REGION));
  fake_visited(stays_inside);
  pthread_create(&thread, NULL, call_long, NULL);
  while (!is_there) a_moment();
  for (uint64_t began = now_ms(); waited < 2; a_moment()) {
    uint64_t from = now_ms();
    point();
    if (now_ms() - from < bound_ms) continue;
    waited++;
    printf("%lu %lu\n", board[FIRED], now_ms() - began);
  }
  is_over = 1;
  pthread_join(thread, NULL);
  point();
  printf("%lu 0\n", board[FIRED]);
  return 0;
}

int main(int count, char **words) {
  if (count < 2) return 2;
  alarm(LIFE_S);  // the bound of each wait here
  start();
  int result = 2;
  if (!strcmp(words[1], "unmap")) result = unmap();
  if (!strcmp(words[1], "kept")) result = kept();
  if (!strcmp(words[1], "middle")) result = middle();
  if (!strcmp(words[1], "begin")) result = begin();
  if (!strcmp(words[1], "allocate")) result = allocate();
  if (!strcmp(words[1], "ends")) result = ends();
  if (!strcmp(words[1], "freed")) result = freed();
  if (count > 2 && !strcmp(words[1], "inside")) result = inside(strtoull(words[2], NULL, 10));
  return result;
}
