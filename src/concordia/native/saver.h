// What a point at hand is, for the two files that bring it to the agent.
//
// Owns: the layout of `point`. Promises: one thread at a time has it, by saver_take(): the one that
// comes to the point until its copies are in the stream, then the saver's until the agent has
// answered. Included by saver.c and bring.c alone.
#pragma once
#include "control.h"
#include "protect.h"

_Static_assert(CONTROL_PAGE_SHIFT == MARK_SHIFT, "a byte of the map is of a page");
// Rows of a snapshot begin at multiples of it, as the driver's pitches do.
enum { MAP_ROW = 512, MAP_ROW_WORDS = MAP_ROW / sizeof(uint64_t) };
_Static_assert(CONTROL_MAP_STRIDE % MAP_ROW == 0, "a pitch");
// The largest snapshot: the whole window.
#define SNAPSHOT_BYTES ((uint64_t)CONTROL_MAP_COPIES * CONTROL_MAP_BYTES)

struct point {
  uint64_t ordinal, digest, reads_end, generation;
  uint64_t map_first, map_count;  // bytes of a copy of the map that lie beside regions
  uint64_t map_row;               // and of one's row in the snapshot
  uint64_t is_audited;
  struct region *held[REGIONS_MAX];
  int held_count;
  CUdeviceptr map_copy;  // on the device: the snapshot, a row for each copy of the map
  uint8_t *map, *page_copy;  // the same here; its first row is all of them once they are joined
};
extern struct point point;  // of saver.c while nothing is on its way, else of bring.c

int bring_failed(CUresult result, const char *doing);
int bring_point(CUstream stream);  // to the agent, and its answer; 0: protection is over
