// What graphs.c and graph_notes.c know of each other.
//
// Owns: the note of an executable graph.
#pragma once
#include "protect.h"

enum { REACHED_MAX = 2048 };

struct note {
  struct note *next;
  void *graph;
  uint64_t hash;
  int is_all, reads_host, calls_host, count;
  int has_marking;  // kernels that mark their stores, inside the window
  enum unseen pointed;  // of the node at hand
  struct {
    uint64_t address, bytes;
  } reached[REACHED_MAX];
};

void note_graph(struct note *note, void *graph);  // empty but for its name; without the lock
