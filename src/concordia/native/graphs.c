// What executable graphs write.
//
// Owns: the hooks of instantiation and update, and a note for each executable graph. Promises: a
// note covers every node; a node of a kind that is not understood, or a change of one, makes it
// "all regions"; a graph that copies to the host ends the protection when it is launched, because
// what it reads is not logged. Called by the program, and by marks.c for a launch.
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "copies.h"

enum { NODE_KERNEL, NODE_MEMCPY, NODE_MEMSET, NODE_HOST, NODE_GRAPH, NODE_EMPTY, NODE_WAIT,
      NODE_RECORD };
enum { NODES_MAX = 1 << 16, DEPTH_MAX = 8, REACHED_MAX = 2048, NOTES_MAX = 4096, BUCKETS = 1024 };

struct kernel_node {
  void *function;
  unsigned int grid[3], block[3], shared_bytes;
  void **parameters, **extra;
  void *kernel, *context;
};
struct fill_node {
  CUdeviceptr target;
  size_t pitch;
  unsigned int value, element;
  size_t width, height;
};
struct note {
  struct note *next;
  void *graph;
  uint64_t hash;
  int is_all, reads_host, calls_host, count;
  int has_marking;  // kernels that mark their stores, inside the window
  struct {
    uint64_t address, bytes;
  } reached[REACHED_MAX];
};

static struct note *notes[BUCKETS];
static int note_count;

static struct note **bucket_of(void *graph) {
  return &notes[((uintptr_t)graph >> 4) % BUCKETS];
}

static void reach(struct note *note, uint64_t address, uint64_t bytes) {
  for (int i = 0; i < note->count; i++)
    if (note->reached[i].address == address && note->reached[i].bytes == bytes) return;
  if (note->count == REACHED_MAX) {
    note->is_all = 1;
    return;
  }
  note->reached[note->count].address = address;
  note->reached[note->count++].bytes = bytes;
}

static void see(uint64_t word, uint64_t at, void *context) {
  (void)at;
  struct note *note = context;
  struct allocation found;
  // All of it: regions may be named in it later.
  if (allocation_of(word, &found)) reach(note, found.address, found.bytes);
}

static void see_range(uint64_t address, uint64_t bytes, void *context) {
  reach(context, address, bytes);
}

static uint64_t mixed(uint64_t hash, uint64_t word) {
  return (hash ^ word) * 0x100000001b3ull + (hash >> 29);
}

// With the lock.
static void mix_place(uint64_t word, uint64_t at, void *context) {
  struct note *note = context;
  uint64_t place = regions_place(word, at);
  if (place) note->hash = mixed(note->hash, place);
}

static void note_kernel(struct note *note, void *node) {
  struct kernel_node found = {0};
  if (REAL(cuGraphKernelNodeGetParams_v2, node, &found) != CUDA_SUCCESS) {
    note->is_all = 1;
    return;
  }
  void *function = found.function ? found.function : found.kernel;
  const struct kernel *kernel = kernel_of(function);
  note->hash = mixed(mixed(note->hash, kernel->hash),
                     found.grid[0] ^ (uint64_t)found.block[0] << 32);
  protect_lock();
  arguments_small_words(kernel, found.parameters, found.extra, mix_place, note);
  protect_unlock();
  int is_marking = window_map && kernel->is_marking;
  note->has_marking |= is_marking;
  if (is_marking && !kernel->has_maps) return;
  enum unseen why = UNSEEN_UNTRUSTED;  // nobody knows where it writes: marks.c says why
  const struct seer seer = {is_marking ? NULL : see, see_range, note};
  protect_lock();
  if (kernel->is_trusted) why = arguments_reach(kernel, found.parameters, found.extra, &seer);
  protect_unlock();
  unseen_count(kernel, why);
  if (why != UNSEEN_NOTHING) note->is_all = 1;
}

static void note_write(struct note *note, uint64_t address, uint64_t bytes) {
  protect_lock();
  mix_place(address, 0, note);
  protect_unlock();
  reach(note, address, bytes);
}

static void note_copy(struct note *note, void *node) {
  CUDA_MEMCPY3D copy = {0};
  uint64_t bytes = 0;
  if (REAL(cuGraphMemcpyNodeGetParams, node, &copy) != CUDA_SUCCESS) {
    note->is_all = 1;
    return;
  }
  if (copy.target.type == MEMORY_ARRAY) return;
  uint64_t start = written_3d(&copy, &bytes);
  if (start && is_device_memory(start)) note_write(note, start, bytes);
  else note->reads_host = 1;
}

static void note_fill(struct note *note, void *node) {
  struct fill_node fill = {0};
  if (REAL(cuGraphMemsetNodeGetParams, node, &fill) != CUDA_SUCCESS) {
    note->is_all = 1;
    return;
  }
  uint64_t row = fill.width * fill.element;
  note_write(note, fill.target, fill.height > 1 ? (fill.height - 1) * fill.pitch + row : row);
}

static void note_graph(struct note *note, void *graph, int depth) {
  size_t count = 0;
  if (REAL(cuGraphGetNodes, graph, NULL, &count) != CUDA_SUCCESS || count > NODES_MAX ||
      depth == DEPTH_MAX) {
    note->is_all = 1;
    return;
  }
  void **nodes = calloc(count + 1, sizeof *nodes);
  if (!nodes || REAL(cuGraphGetNodes, graph, nodes, &count) != CUDA_SUCCESS) {
    note->is_all = 1;
    count = 0;
  }
  for (size_t i = 0; i < count; i++) {
    int type = -1;
    void *child = NULL;
    REAL(cuGraphNodeGetType, nodes[i], &type);
    note->hash = mixed(note->hash, (uint64_t)type);
    if (type == NODE_KERNEL) note_kernel(note, nodes[i]);
    else if (type == NODE_MEMCPY) note_copy(note, nodes[i]);
    else if (type == NODE_MEMSET) note_fill(note, nodes[i]);
    else if (type == NODE_GRAPH &&
             REAL(cuGraphChildGraphNodeGetGraph, nodes[i], &child) == CUDA_SUCCESS)
      note_graph(note, child, depth + 1);
    else if (type == NODE_HOST) note->calls_host = 1;
    else if (type < NODE_HOST || type > NODE_RECORD || type == NODE_GRAPH) note->is_all = 1;
  }
  free(nodes);
}

static void forget(void *graph) {
  protect_lock();
  for (struct note **at = bucket_of(graph); *at;) {
    struct note *gone = *at;
    if (gone->graph != graph) {
      at = &gone->next;
      continue;
    }
    *at = gone->next;
    free(gone);
    note_count--;
  }
  protect_unlock();
}

static void remember(void *executable, void *graph) {
  if (!IS_PROTECTED()) return;
  struct note *note = calloc(1, sizeof *note);
  forget(executable);
  if (!note) return;
  note->graph = executable;
  note_graph(note, graph, 0);
  protect_lock();
  int has_room = note_count < NOTES_MAX;
  if (has_room) {
    note->next = *bucket_of(executable);
    *bucket_of(executable) = note;
    note_count++;
  }
  protect_unlock();
  if (!has_room) free(note);
}

// With the lock.
int graph_marks(void *graph, uint64_t *hash) {
  struct note *note = *bucket_of(graph);
  while (note && note->graph != graph) note = note->next;
  if (!note) return 0;
  *hash = note->hash;
  if (note->calls_host)
    protect_lose("a graph calls the host: a resumed program, whose graphs are left out, would not");
  if (note->reads_host) protect_lose("a graph copies to the host: what it reads is not logged");
  for (int i = 0; i < note->count; i++) marks_range(note->reached[i].address,
                                                    note->reached[i].bytes);
  for (int i = 0; i < region_count; i++)
    if (note->has_marking && regions[i]->is_outside) regions[i]->is_whole = 1;
  return !note->is_all;
}

#define INSTANTIATED(call)                                     \
  do {                                                         \
    CUresult result = call;                                    \
    if (result == CUDA_SUCCESS) remember(*executable, graph);  \
    return result;                                             \
  } while (0)
// A changed node may write anything from here on.
#define CHANGED(call)                          \
  do {                                         \
    if (IS_PROTECTED()) forget(executable);    \
    return call;                               \
  } while (0)

CUresult cuGraphInstantiate(CUgraphExec *executable, CUgraph graph, void **node, char *log,
                            size_t bytes) {
  INSTANTIATED(REAL(cuGraphInstantiate, executable, graph, node, log, bytes));
}

CUresult cuGraphInstantiate_v2(CUgraphExec *executable, CUgraph graph, void **node, char *log,
                               size_t bytes) {
  INSTANTIATED(REAL(cuGraphInstantiate_v2, executable, graph, node, log, bytes));
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph,
                                     unsigned long long flags) {
  INSTANTIATED(REAL(cuGraphInstantiateWithFlags, executable, graph, flags));
}

CUresult cuGraphInstantiateWithParams(CUgraphExec *executable, CUgraph graph, void *parameters) {
  INSTANTIATED(REAL(cuGraphInstantiateWithParams, executable, graph, parameters));
}

CUresult cuGraphInstantiateWithParams_ptsz(CUgraphExec *executable, CUgraph graph,
                                           void *parameters) {
  INSTANTIATED(REAL(cuGraphInstantiateWithParams_ptsz, executable, graph, parameters));
}

CUresult cuGraphExecDestroy(CUgraphExec executable) {
  CHANGED(REAL(cuGraphExecDestroy, executable));
}

CUresult cuGraphExecUpdate(CUgraphExec executable, CUgraph graph, void **node, int *reason) {
  CUresult result = REAL(cuGraphExecUpdate, executable, graph, node, reason);
  if (result == CUDA_SUCCESS) remember(executable, graph);
  else if (IS_PROTECTED()) forget(executable);
  return result;
}

CUresult cuGraphExecUpdate_v2(CUgraphExec executable, CUgraph graph, void *information) {
  CUresult result = REAL(cuGraphExecUpdate_v2, executable, graph, information);
  if (result == CUDA_SUCCESS) remember(executable, graph);
  else if (IS_PROTECTED()) forget(executable);
  return result;
}

CUresult cuGraphExecKernelNodeSetParams(CUgraphExec executable, void *node, const void *to) {
  CHANGED(REAL(cuGraphExecKernelNodeSetParams, executable, node, to));
}

CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec executable, void *node, const void *to) {
  CHANGED(REAL(cuGraphExecKernelNodeSetParams_v2, executable, node, to));
}

CUresult cuGraphExecMemcpyNodeSetParams(CUgraphExec executable, void *node, const void *to,
                                        CUcontext context) {
  CHANGED(REAL(cuGraphExecMemcpyNodeSetParams, executable, node, to, context));
}

CUresult cuGraphExecMemsetNodeSetParams(CUgraphExec executable, void *node, const void *to,
                                        CUcontext context) {
  CHANGED(REAL(cuGraphExecMemsetNodeSetParams, executable, node, to, context));
}

CUresult cuGraphExecChildGraphNodeSetParams(CUgraphExec executable, void *node, CUgraph child) {
  CHANGED(REAL(cuGraphExecChildGraphNodeSetParams, executable, node, child));
}

CUresult cuGraphExecNodeSetParams(CUgraphExec executable, void *node, void *to) {
  CHANGED(REAL(cuGraphExecNodeSetParams, executable, node, to));
}
