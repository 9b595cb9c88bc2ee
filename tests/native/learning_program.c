// A program on a GPU whose handles mean one thing and later another, for tests: learning_program MODE.
//
//   reload   a module that marks what it stores is unloaded, and one that does not gets its handles; "twice": and then the first again
//   tensor   a kernel is given where it writes inside a large parameter; "fork": and at the end there is a child that loads a module
//   part     a kernel writes across the begin of a region that is the upper half of an allocation, as "axpy" names it; "graph": in a graph
//   pieces   likewise, from one mapping into the next; "first": the other way round they were mapped
//   device   a graph is made that the GPU may launch
//   virtual  memory is mapped before it may be accessed, and unmapped right behind a point
//   newer    functions are asked for by their names: PROGRAM_NAMES, with blanks between them
//   closed   the program closes what it does not know, and opens a file of its own, PROGRAM_FILE
//   host     a graph calls a function of the program
// Between two points it waits until what was fired is answered, so that each is one checkpoint.
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "program.h"

R cuModuleUnload(H);

enum { PAGE = 1 << 16, REGION = 1 << 21, SETTLE_S = 20 };

R cuGetProcAddress_v2(const char *, void **, int, uint64_t, int *);
R cuMemAddressReserve(P *, size_t, size_t, P, unsigned long long), cuMemMap(P, size_t, size_t, uint64_t, unsigned long long), cuMemUnmap(P, size_t), cuMemSetAccess(P, size_t, const void *, size_t);
R cuStreamBeginCapture_v2(H, int), cuStreamEndCapture(H, H *), cuGraphInstantiateWithFlags(H *, H, unsigned long long), cuGraphLaunch(H, H), cuLaunchHostFunc(H, void (*)(void *), void *);

static H module, fill, update, tensor, axpy, stream;
static P first, second, outside;

static void load(const char *image) {
  DO(cuModuleLoadData(&module, image));
  DO(cuModuleGetFunction(&fill, module, "fill"));
  DO(cuModuleGetFunction(&update, module, "update"));
  DO(cuModuleGetFunction(&tensor, module, "tensor"));
  DO(cuModuleGetFunction(&axpy, module, "axpy"));
}
static void launch(H function, P a, P b, P c) {
  void *parameters[] = {&a, &b, &c};
  DO(cuLaunchKernel(function, 4, 1, 1, 32, 1, 1, 0, stream, parameters, NULL));
}
// At once, or by a graph.
static void launch_somehow(int is_graph, P a, P b, P c) {
  H graph, executable;
  if (is_graph) DO(cuStreamBeginCapture_v2(stream, 0));
  launch(fill, a, b, c);
  if (!is_graph) return;
  DO(cuStreamEndCapture(stream, &graph));
  DO(cuGraphInstantiateWithFlags(&executable, graph, 0));
  DO(cuGraphLaunch(executable, stream));
}
// Two pieces of memory side by side, each mapped for itself.
static P pieces(int is_last_first) {
  struct { int type, id, flags; } access = {1, 0, 3};
  P at;
  DO(cuMemAddressReserve(&at, 2 * REGION, 0, 0, 0));
  for (int i = 0; i < 2; i++) {
    P piece = at + REGION * (P)(i ^ is_last_first);
    DO(cuMemMap(piece, REGION, 0, 0, 0));
    DO(cuMemSetAccess(piece, REGION, &access, 1));
  }
  return at;
}
static void handled(int number) { (void)number; }
static void nothing(void *unused) { (void)unused; }
static const volatile uint64_t *board;  // words of it: posted, taken at 16, 24; fired at 104
static void settle(time_t end) {
  while (board[3] != board[13])
    if (time(NULL) > end) { fprintf(stderr, "point: %lu of %lu\n", board[3], board[13]); exit(3); }
    else sched_yield();
}
static void point(void) {
  char path[4096];
  snprintf(path, sizeof path, "%s/board", getenv("CONCORDIA_PROTECT"));
  int file = board ? -1 : open(path, O_RDONLY);
  if (!board) board = mmap(NULL, 4096, PROT_READ, MAP_SHARED, file, 0);
  time_t end = time(NULL) + SETTLE_S;
  uint64_t fired = board[13];
  do {  // one that comes before the one before is off its way is only counted
    launch(update, outside, outside + 4096, 16);
    DO(cuCtxSynchronize());
  } while (board[13] == fired && time(NULL) < end);
  settle(end);
}

int main(int count, char **words) {
  H context;
  if (count < 2) return 2;
  if (getenv("PROGRAM_SIGNAL")) signal(atoi(getenv("PROGRAM_SIGNAL")), handled);
  enter(&context);
  DO(cuStreamCreate(&stream, 1));
  load(".version 8.0");
  DO(cuMemAlloc_v2(&first, REGION));
  if (!strcmp(words[1], "closed")) {
    for (int i = 3; i < 64; i++) close(i);
    for (int i = 0; i < 60; i++) if (open(getenv("PROGRAM_FILE"), O_RDWR) < 0) return 4;
  }
  DO(cuMemAlloc_v2(&second, REGION));
  DO(cuMemAlloc_v2(&outside, PAGE));
  if (!strcmp(words[1], "part")) launch(axpy, first + REGION / 2, outside, 16);
  launch(fill, first, REGION / 8, 1);
  launch(fill, second, REGION / 8, 2);
  point();
  launch(fill, first + 5 * PAGE, 100, 3);
  point();
  if (!strcmp(words[1], "reload")) {
    DO(cuModuleUnload(module));
    load(".version 8.1");
    launch(fill, first + 9 * PAGE, 100, 4);
    if (count > 2) {
      DO(cuModuleUnload(module));
      load(".version 8.0");
      launch(fill, first + 9 * PAGE, 100, 4);
    }
  }
  if (!strcmp(words[1], "tensor")) {
    P map[16] = {(second + 3 * PAGE - 0x600000000000) / 512}, y = first;
    void *parameters[] = {map, &y};
    DO(cuLaunchKernel(tensor, 1, 1, 1, 1, 1, 1, 0, stream, parameters, NULL));
  }
  if (!strcmp(words[1], "newer")) {
    char *names = strdup(getenv("PROGRAM_NAMES"));
    void *found;
    for (char *name = strtok(names, " "); name; name = strtok(NULL, " "))
      if (cuGetProcAddress_v2(name, &found, 13000, 0, NULL) || !found) return 5;
  } else if (!strcmp(words[1], "virtual")) {
    struct { int type, id, flags; } access = {1, 0, 3};
    P mapped;
    DO(cuMemAddressReserve(&mapped, REGION, 0, 0, 0));
    DO(cuMemMap(mapped, REGION, 0, 0, 0));
    point();
    DO(cuMemSetAccess(mapped, REGION, &access, 1));
    point();
    launch(fill, mapped, REGION / 8, 6);
    DO(cuCtxSynchronize());
    for (int i = 0; i < 200; i++) launch(fill, second, REGION / 8, 5);
    uint64_t fired = board[13];
    while (board[13] == fired) launch(update, outside, outside + 4096, 16);  // its copies wait behind all that
    DO(cuMemUnmap(mapped, REGION));
    settle(time(NULL) + SETTLE_S);
  } else if (!strcmp(words[1], "part")) {
    launch_somehow(count > 2, first + REGION / 2 - 2 * PAGE, 4 * PAGE / 8, 6);
    point();
  } else if (!strcmp(words[1], "pieces")) {
    P at = pieces(count > 2 && !strcmp(words[count - 1], "first"));
    launch(fill, at, 2 * REGION / 8, 5);
    point();
    point();
    launch_somehow(count > 2 && !strcmp(words[2], "graph"), at + REGION - 2 * PAGE, 4 * PAGE / 8, 6);
    point();
  } else if (!strcmp(words[1], "device")) {
    H graph, executable;
    DO(cuStreamBeginCapture_v2(stream, 0));
    launch(fill, first, 100, 5);
    DO(cuStreamEndCapture(stream, &graph));
    DO(cuGraphInstantiateWithFlags(&executable, graph, 4));
    point();
  } else if (!strcmp(words[1], "host")) {
    H graph, executable;
    DO(cuStreamBeginCapture_v2(stream, 0));
    launch(fill, first, 100, 5);
    DO(cuLaunchHostFunc(stream, nothing, NULL));
    DO(cuStreamEndCapture(stream, &graph));
    DO(cuGraphInstantiateWithFlags(&executable, graph, 0));
    DO(cuGraphLaunch(executable, stream));
  } else {
    point();
  }
  if (count > 2 && !strcmp(words[2], "fork")) {
    pid_t child = fork();
    int status = 1;
    if (!child) {
      load(".version 8.2");
      exit(0);
    }
    if (waitpid(child, &status, 0) != child || status) return 6;
  }
  printf("done\n");
  return 0;
}
