// Whose launches had more marked than they write, and why.
//
// Owns: the reasons, and a count of each beside each kernel. Promises: a launch of a kernel that is
// known and marks all regions, or a region as a whole, is counted, a node of a graph once for each
// graph that is made; at the end of the process the most frequent are said, a bounded number; a
// child says nothing of its parent. Not counted, because no kernel is to be named: launches of
// graphs that are not known, were changed, reach too much, or whose nodes the GPU may change, those
// of long ago, and those of kernels without a name. Called by marks.c and graph_notes.c; read by
// `concordia modules`. It decides nothing.
#define _GNU_SOURCE
#include <string.h>

#include "protect.h"

enum { ROWS_MAX = 64 };

static const char *const reasons[UNSEEN_REASONS] = {
    [UNSEEN_NOTHING] = "nothing",
    [UNSEEN_UNTRUSTED] = "all regions: it does not mark, and is not trusted",
    [UNSEEN_PARAMETERS] = "all regions: its parameters are not known",
    [UNSEEN_MAP] = "all regions: an argument may be a tensor map that is not known",
    [UNSEEN_NO_MAP] = "all regions: it writes through tensor maps, and has none in its arguments",
    [UNSEEN_LOST_MAP] = "all regions: an argument may be a tensor map that was forgotten",
    [UNSEEN_POINTER] = "a region as a whole: an argument points to it",
};

struct row {
  const struct kernel *kernel;
  int reason;
  uint64_t count;
};
struct rows {
  struct row row[ROWS_MAX];  // the largest first
  int used;
};

static _Atomic int is_used;
static uint64_t lost_before;  // tensor maps, by a parent

static void clear(const struct kernel *kernel, void *unused) {
  (void)unused;
  for (int reason = 0; kernel->unseen && reason < UNSEEN_REASONS; reason++)
    if (atomic_load(&kernel->unseen[reason])) atomic_store(&kernel->unseen[reason], 0);
}

void unseen_forked(void) {
  lost_before = tensor_maps_lost();
  if (atomic_exchange(&is_used, 0)) kernels_each(clear, NULL);
}

void unseen_count(const struct kernel *kernel, enum unseen reason) {
  if (!kernel->unseen || reason == UNSEEN_NOTHING) return;
  atomic_fetch_add_explicit(&kernel->unseen[reason], 1, memory_order_relaxed);
  if (!atomic_load_explicit(&is_used, memory_order_relaxed)) atomic_store(&is_used, 1);
}

// The same code that was loaded again is one.
static void merge(struct rows *rows, struct row *row) {
  int at = 0;
  while (at < rows->used && (rows->row[at].reason != row->reason ||
                             rows->row[at].kernel->hash != row->kernel->hash))
    at++;
  if (at == rows->used) return;
  row->count += rows->row[at].count;
  rows->used--;
  memmove(&rows->row[at], &rows->row[at + 1], (size_t)(rows->used - at) * sizeof *row);
}

static void insert(struct rows *rows, struct row row) {
  merge(rows, &row);
  int at = rows->used;
  while (at > 0 && rows->row[at - 1].count < row.count) at--;
  if (at == ROWS_MAX) return;
  int moved = (rows->used < ROWS_MAX ? rows->used : ROWS_MAX - 1) - at;
  memmove(&rows->row[at + 1], &rows->row[at], (size_t)moved * sizeof row);
  rows->row[at] = row;
  if (rows->used < ROWS_MAX) rows->used++;
}

static void see(const struct kernel *kernel, void *context) {
  for (int reason = 0; kernel->unseen && reason < UNSEEN_REASONS; reason++) {
    uint64_t count = atomic_load_explicit(&kernel->unseen[reason], memory_order_relaxed);
    if (count) insert(context, (struct row){kernel, reason, count});
  }
}

void unseen_told(void) {
  static struct rows rows;  // once in a process
  char name[KERNEL_START_BYTES + 1];
  kernels_each(see, &rows);
  for (int i = 0; i < rows.used; i++) {  // its whole name went with its module, perhaps
    memcpy(name, rows.row[i].kernel->start, KERNEL_START_BYTES);
    name[KERNEL_START_BYTES] = 0;
    coverage_unseen(name, reasons[rows.row[i].reason], rows.row[i].count);
  }
  uint64_t lost = tensor_maps_lost() - lost_before;
  if (lost) coverage_count("tensor maps forgotten", lost);
}
