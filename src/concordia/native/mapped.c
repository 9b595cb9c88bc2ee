// What is mapped side by side.
//
// Owns: a table of stretches of addresses, each of one mapping or of several without a gap.
// Promises: a stretch is as long as it can be; there are never more of them than mappings in the
// table of allocations, so that one's bound is this one's, too. Called by allocations.c, with the
// lock. It asks the driver nothing.
//
// Why: an allocator that grows maps piece behind piece in one range of addresses, and puts into
// them what is larger than one. So a pointer into a piece may mean what lies in the next.
#include <string.h>

#include "protect.h"

static struct {
  uint64_t start, end;
} runs[ALLOCATIONS_MAX];  // by address
static int count;

// The first that begins above.
static int above(uint64_t address) {
  int low = 0, high = count;
  while (low < high) {
    int middle = (low + high) / 2;
    if (runs[middle].start <= address) low = middle + 1;
    else high = middle;
  }
  return low;
}

static void insert(int at, uint64_t start, uint64_t end) {
  memmove(&runs[at + 1], &runs[at], (size_t)(count - at) * sizeof *runs);
  runs[at].start = start;
  runs[at].end = end;
  count++;
}

static void take_out(int at) {
  memmove(&runs[at], &runs[at + 1], (size_t)(count - at - 1) * sizeof *runs);
  count--;
}

void mapped_came(uint64_t address, uint64_t bytes) {
  uint64_t end = address + bytes;
  int at = above(address);
  int is_behind = at > 0 && runs[at - 1].end == address;
  int is_before = at < count && runs[at].start == end;
  if (is_behind) {
    runs[at - 1].end = is_before ? runs[at].end : end;
    if (is_before) take_out(at);
  } else if (is_before) {
    runs[at].start = address;
  } else {
    insert(at, address, end);
  }
}

void mapped_goes(uint64_t address, uint64_t bytes) {
  int at = above(address) - 1;
  if (at < 0 || runs[at].end < address + bytes) return;
  uint64_t start = runs[at].start, end = runs[at].end;
  take_out(at);
  if (address + bytes < end) insert(at, address + bytes, end);
  if (start < address) insert(at, start, address);
}

void mapped_around(uint64_t address, struct allocation *found) {
  int at = above(address) - 1;
  if (at < 0 || address >= runs[at].end) return;
  found->address = runs[at].start;
  found->bytes = runs[at].end - runs[at].start;
}
