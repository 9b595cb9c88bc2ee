// A program on a GPU whose kernels write through tensor maps, for tests: tensor_program MODE. Regions "first" and "second" are 32 pages each.
//
// Between two points one kernel writes a word through each map that it is given, and one where an argument points to.
//   tiled, im2col, wide, packed, huge   a map of second, pages 3 to 6, made in this way
//   elsewhere  both of memory that is no region      replaced  another's, with its address replaced
//   changed    one byte of it is changed             moved     its address is changed by hand
//   twice      two of second, pages 3 to 6 and "lower", 1 to 4, or "upper", 20 to 23
//   struct     maps of second, page 5, and of no region, among words; "words": which may be a map, too; "buffer": given as a buffer; "pointer": into first
//   graph      in a graph; "set": whose node is changed; "pointer": into first
//   forgotten  maps were made until it is forgotten; "used": but it was used meanwhile; threads   by many threads, each with maps of its own
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "program.h"

R cuStreamBeginCapture_v2(H, int), cuStreamEndCapture(H, H *), cuGraphInstantiateWithFlags(H *, H, unsigned long long), cuGraphLaunch(H, H), cuGraphGetNodes(H, H *, size_t *), cuGraphExecKernelNodeSetParams_v2(H, H, const void *);
R cuTensorMapEncodeTiled(void *, int, uint32_t, void *, const P *, const P *, const uint32_t *, const uint32_t *, int, int, int, int), cuTensorMapReplaceAddress(void *, void *);
R cuTensorMapEncodeIm2col(void *, int, uint32_t, void *, const P *, const P *, const int *, const int *, uint32_t, uint32_t, const uint32_t *, int, int, int, int);
R cuTensorMapEncodeIm2colWide(void *, int, uint32_t, void *, const P *, const P *, int, int, uint32_t, uint32_t, const uint32_t *, int, int, int, int, int);

enum { PAGE = 1 << 16, REGION = 1 << 21, SETTLE_S = 20, WORDS = 16, U8 = 0, F16 = 6, PACKED = 14, THREADS = 8, TURNS = 60 };
struct operands { P pointer, words[7], first[WORDS], second[WORDS], more[WORDS]; };  // maps at 64 and 192

static H update, tensor, tensors, stream;
static P first, second, outside;

static const volatile uint64_t *board;  // words of it: posted, taken at 16, 24; fired at 104
static void point(void) {
  char path[4096];
  snprintf(path, sizeof path, "%s/board", getenv("CONCORDIA_PROTECT"));
  if (!board) board = mmap(NULL, 4096, PROT_READ, MAP_SHARED, open(path, O_RDONLY), 0);
  time_t end = time(NULL) + SETTLE_S;
  uint64_t fired = board[13];
  P a = outside, b = outside + 4096, c = 16;
  void *parameters[] = {&a, &b, &c};
  do {  // one that comes before the one before is off its way is only counted
    DO(cuLaunchKernel(update, 4, 1, 1, 32, 1, 1, 0, stream, parameters, NULL));
    DO(cuCtxSynchronize());
  } while (board[13] == fired && time(NULL) < end);
  while (board[3] != board[13])
    if (time(NULL) > end) exit(3);
    else sched_yield();
}

// `rows` rows of 256 bytes, a page apart.
static void tiled(P *map, P at, P rows) {
  P sizes[2] = {128, rows}, strides[1] = {PAGE};
  uint32_t box[2] = {16, 1}, steps[2] = {1, 1};
  DO(cuTensorMapEncodeTiled(map, F16, 2, (void *)at, sizes, strides, box, steps, 0, 0, 0, 0));
}
static void other(const char *mode, P *map, P at) {
  P sizes[4] = {128, 2, 2, 1}, strides[3] = {PAGE, 2 * PAGE, 4 * PAGE}, most[2] = {128, (1ull << 33) + 1}, far[1] = {1ull << 31};  // their product is 2^64
  uint32_t steps[4] = {1, 1, 1, 1};
  int corner[2] = {0, 0};
  if (!strcmp(mode, "im2col")) DO(cuTensorMapEncodeIm2col(map, F16, 4, (void *)at, sizes, strides, corner, corner, 16, 2, steps, 0, 0, 0, 0));
  else if (!strcmp(mode, "wide")) DO(cuTensorMapEncodeIm2colWide(map, F16, 4, (void *)at, sizes, strides, 0, 0, 16, 2, steps, 0, 0, 0, 0, 0));
  else if (!strcmp(mode, "packed")) DO(cuTensorMapEncodeTiled(map, PACKED, 2, (void *)at, sizes, strides, steps, steps, 0, 0, 0, 0));
  else DO(cuTensorMapEncodeTiled(map, F16, 2, (void *)at, most, far, steps, steps, 0, 0, 0, 0));
}
static void launch_tensor(P *map, P pointer) {
  void *parameters[] = {map, &pointer};
  DO(cuLaunchKernel(tensor, 1, 1, 1, 1, 1, 1, 0, stream, parameters, NULL));
}
static void launch_tensors(struct operands *given, int is_buffer) {
  P count = 1;
  struct { struct operands given; P count; } buffer = {*given, count};
  size_t size = sizeof buffer;
  void *parameters[] = {given, &count}, *extra[] = {(void *)1, &buffer, (void *)2, &size, NULL};
  DO(cuLaunchKernel(tensors, 1, 1, 1, 1, 1, 1, 0, stream, is_buffer ? NULL : parameters, is_buffer ? extra : NULL));
}

static void *write_some(void *number) {
  P map[WORDS] = {0}, start = (P)number < THREADS / 2 ? first : second, turn = (P)number % (THREADS / 2);
  for (int i = 0; i < TURNS; i++, turn = (turn * 5 + 3) % 29) {
    if (i % 3) tiled(map, start + turn * PAGE + 512 * (P)(i % 100), 1 + turn % 3);
    else DO(cuTensorMapReplaceAddress(map, (void *)(start + 512 * (P)i)));  // of one before, or of none
    launch_tensor(map, outside);
    if (i == 0) launch_tensor(map, outside);
  }
  return number;
}

static void act(const char *mode, const char *more) {
  P map[WORDS] = {0}, scrap[WORDS];
  struct operands given = {.pointer = outside};
  H graph, executable;
  if (!strcmp(mode, "twice")) {
    tiled(map, second + 3 * PAGE, 4);
    tiled(scrap, second + (!strcmp(more, "lower") ? 1 : 20) * PAGE, 4);
    if (memcmp(map, scrap, sizeof map)) exit(4);
  } else if (!strcmp(mode, "tiled") || !strcmp(mode, "changed") || !strcmp(mode, "moved") || !strcmp(mode, "graph")) tiled(map, second + 3 * PAGE, 4);
  else if (!strcmp(mode, "elsewhere")) tiled(map, outside, 1);
  else if (!strcmp(mode, "forgotten")) {
    tiled(map, second + 3 * PAGE, 4);
    for (int i = 0; i < 64; i++) {
      tiled(scrap, outside, 10 + (P)i);
      if (more && i % 8 == 0) launch_tensor(map, outside);
    }
  } else if (!strcmp(mode, "replaced")) {
    tiled(map, outside, 4);
    DO(cuTensorMapReplaceAddress(map, (void *)(second + 3 * PAGE)));
  } else if (!strcmp(mode, "struct")) {
    tiled(given.first, outside, 1);
    tiled(given.second, second + 5 * PAGE, 1);
    for (int i = 0; i < 7; i++) given.words[i] = 7;
    if (more && !strcmp(more, "pointer")) given.pointer = first + 7 * PAGE;
    if (more && !strcmp(more, "words")) given.more[3] = 0x1234;
    launch_tensors(&given, more && !strcmp(more, "buffer"));
    return;
  } else other(mode, map, second + 3 * PAGE);
  if (!strcmp(mode, "changed")) ((unsigned char *)map)[127] ^= 1;
  if (!strcmp(mode, "moved")) map[0] += 2 * PAGE / 512;
  if (strcmp(mode, "graph")) {
    launch_tensor(map, !strcmp(mode, "tiled") ? first : outside);
    return;
  }
  DO(cuStreamBeginCapture_v2(stream, 0));
  launch_tensor(map, more && !strcmp(more, "pointer") ? first : outside);
  DO(cuStreamEndCapture(stream, &graph));
  DO(cuGraphInstantiateWithFlags(&executable, graph, 0));
  if (more && !strcmp(more, "set")) {
    H node;
    size_t count = 1;
    P pointer = outside;
    void *parameters[] = {scrap, &pointer};
    struct { H function; unsigned sizes[7]; void **parameters, **extra; H kernel, context; } changed = {tensor, {1, 1, 1, 1, 1, 1, 0}, parameters, NULL, NULL, NULL};
    tiled(scrap, first + 20 * PAGE, 1);
    DO(cuGraphGetNodes(graph, &node, &count));
    DO(cuGraphExecKernelNodeSetParams_v2(executable, node, &changed));
  }
  memset(map, 0, sizeof map);  // the node has its own
  DO(cuGraphLaunch(executable, stream));
}

int main(int count, char **words) {
  H context, module;
  pthread_t threads[THREADS];
  if (count < 2) return 2;
  enter(&context);
  DO(cuStreamCreate(&stream, 1));
  DO(cuModuleLoadData(&module, ".version 8.0"));
  DO(cuModuleGetFunction(&update, module, "update"));
  DO(cuModuleGetFunction(&tensor, module, "tensor"));
  DO(cuModuleGetFunction(&tensors, module, "tensors"));
  DO(cuMemAlloc_v2(&outside, PAGE));
  DO(cuMemAlloc_v2(&first, REGION));
  DO(cuMemAlloc_v2(&second, REGION));
  point();
  point();
  if (!strcmp(words[1], "threads")) {
    for (P i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, write_some, (void *)i);
    for (P i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
  } else {
    act(words[1], count > 2 ? words[2] : NULL);
  }
  point();
  printf("done\n");
  return 0;
}
