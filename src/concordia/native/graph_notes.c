// What the nodes of a graph write.
//
// Owns: how a note of a graph is made. Promises: it covers every node; a node of a kind that is not
// understood, or that the GPU may change, makes it "all regions"; a kernel that trusted arguments
// do not bound is counted, once for each note. Called by graphs.c, which keeps notes. It changes no
// graph.
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "copies.h"
#include "graph_notes.h"

enum { NODE_KERNEL, NODE_MEMCPY, NODE_MEMSET, NODE_HOST, NODE_GRAPH, NODE_EMPTY, NODE_WAIT,
      NODE_RECORD };
enum { NODES_MAX = 1 << 16, DEPTH_MAX = 8 };

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
union attribute {
  char room[64];
  int is_updatable;
};

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
  if (!allocation_reach(word, &found)) return;
  reach(note, found.address, found.bytes);  // all of it: regions may be named in it later
  for (int i = 0; i < region_count; i++)
    if (regions[i]->address - found.address < found.bytes) note->pointed = UNSEEN_POINTER;
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

// Drivers that do not know the attribute have no such nodes.
static int is_updatable(void *node) {
  union attribute found = {{0}};
  CUresult result = REAL(cuGraphKernelNodeGetAttribute, node,
                         CU_LAUNCH_ATTRIBUTE_DEVICE_UPDATABLE_KERNEL_NODE, &found);
  return result == CUDA_SUCCESS && found.is_updatable;
}

static void note_kernel(struct note *note, void *node) {
  struct kernel_node found = {0};
  note->is_all |= is_updatable(node);
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
  const struct seer seer = {see, see_range, note};
  note->pointed = UNSEEN_NOTHING;
  protect_lock();
  if (kernel->is_trusted) why = arguments_reach(kernel, found.parameters, found.extra, &seer);
  protect_unlock();
  unseen_count(kernel, why != UNSEEN_NOTHING ? why : note->pointed);
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

static void look_at(struct note *note, void *graph, int depth) {
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
      look_at(note, child, depth + 1);
    else if (type == NODE_HOST) note->calls_host = 1;
    else if (type < NODE_HOST || type > NODE_RECORD || type == NODE_GRAPH) note->is_all = 1;
  }
  free(nodes);
}

void note_graph(struct note *note, void *graph) { look_at(note, graph, 0); }
