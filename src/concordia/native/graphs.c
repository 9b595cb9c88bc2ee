// What executable graphs write.
//
// Owns: the hooks of instantiation and update, and a note for each executable graph. Promises: a
// note covers every node; a node of a kind that is not understood, or a change of one, makes it
// "all regions", and so does a node that the GPU may change; a graph that copies to the host ends
// the protection when it is launched, because what it reads is not logged, and one that the GPU may
// launch when it is made, because its launches pass nobody. Called by the program, and by marks.c
// for a launch.
#define _GNU_SOURCE
#include <stdlib.h>

#include "graph_notes.h"

enum { NOTES_MAX = 4096, BUCKETS = 1024 };

static struct note *notes[BUCKETS];
static int note_count;

static struct note **bucket_of(void *graph) {
  return &notes[((uintptr_t)graph >> 4) % BUCKETS];
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
  note_graph(note, graph);
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

static void made(void *executable, void *graph, uint64_t flags) {
  remember(executable, graph);
  if (IS_PROTECTED() && flags & CUDA_GRAPH_INSTANTIATE_FLAG_DEVICE_LAUNCH)
    protect_lose("a graph may be launched by the GPU itself: what it writes then is not marked");
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

#define INSTANTIATED(flags, call)                              \
  do {                                                         \
    CUresult result = call;                                    \
    if (result == CUDA_SUCCESS) made(*executable, graph, flags); \
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
  INSTANTIATED(0, REAL(cuGraphInstantiate, executable, graph, node, log, bytes));
}

CUresult cuGraphInstantiate_v2(CUgraphExec *executable, CUgraph graph, void **node, char *log,
                               size_t bytes) {
  INSTANTIATED(0, REAL(cuGraphInstantiate_v2, executable, graph, node, log, bytes));
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph,
                                     unsigned long long flags) {
  INSTANTIATED(flags, REAL(cuGraphInstantiateWithFlags, executable, graph, flags));
}

static uint64_t flags_of(const void *parameters) { return word_at(parameters); }  // come first

CUresult cuGraphInstantiateWithParams(CUgraphExec *executable, CUgraph graph, void *parameters) {
  INSTANTIATED(flags_of(parameters),
               REAL(cuGraphInstantiateWithParams, executable, graph, parameters));
}

CUresult cuGraphInstantiateWithParams_ptsz(CUgraphExec *executable, CUgraph graph,
                                           void *parameters) {
  INSTANTIATED(flags_of(parameters),
               REAL(cuGraphInstantiateWithParams_ptsz, executable, graph, parameters));
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
