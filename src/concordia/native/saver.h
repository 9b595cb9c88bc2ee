// What a point at hand is, for the two files that bring it to the agent.
//
// Owns: the layout of `point`. Promises: one thread at a time has it, by saver_take(): the one that
// comes to the point until its copies are in the stream, then the saver's until the agent has
// answered. Included by saver.c and bring.c alone.
#pragma once
#include "protect.h"

enum { MAP_BYTES = WINDOW_BYTES >> MARK_SHIFT };

struct point {
  uint64_t ordinal, digest, reads_end, generation;
  uint64_t map_first, map_count;  // bytes of the map that lie beside regions
  uint64_t is_audited;
  struct region *held[REGIONS_MAX];
  int held_count;
  CUdeviceptr map_copy;
  uint8_t *map, *page_copy;
};
extern struct point point;  // of saver.c while nothing is on its way, else of bring.c

int bring_failed(CUresult result, const char *doing);
int bring_point(CUstream stream);  // to the agent, and its answer; 0: protection is over
