// Which pages of the regions may have changed, as the host sees it.
//
// Owns: the marks of calls that write (copies, fills) and of launches whose stores do not mark.
// Promises: marked pages are a superset of what changed: a mark is set after the call that writes
// was given to the driver, so a point that takes marks has the writes of all that it takes before
// it; what is not understood marks everything. Work that is being captured marks when its graph is
// launched. Called by copies.c, graphs.c and, as an observer, by launch.c.
//
// A launch of unmarked stores reaches all regions: where an argument points to there may lie more
// pointers, in a region as well as elsewhere (tables of batches, of caches, of groups). A kernel
// that the policy trusts writes through its arguments only: it reaches the allocations that they
// point into, and the pages that their tensor maps lead to. What of an allocation is a region is
// marked as a whole and not from the address on: an argument may be the end of what is written. So
// are those of a trusted kernel that marks its plain stores and uses maps besides: one that it
// makes itself, or finds in memory, leads where an argument points to.
#define _GNU_SOURCE
#include "protect.h"

int is_capturing(CUstream stream, int is_per_thread) {
  int status = CU_STREAM_CAPTURE_STATUS_NONE;
  CUresult result = STREAM_CALL(is_per_thread, cuStreamIsCapturing, stream, &status);
  // The legacy stream beside one that is captured and waits for it: nothing may be put into it.
  if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) return 1;
  return result == CUDA_SUCCESS && status != CU_STREAM_CAPTURE_STATUS_NONE;
}

void marks_range(uint64_t address, uint64_t bytes) {
  for (int i = 0; bytes && i < region_count; i++) {
    struct region *region = regions[i];
    uint64_t end = address + bytes, last = region->address + region->bytes;
    uint64_t from = address > region->address ? address : region->address;
    uint64_t to = end < last ? end : last;
    if (from >= to || region->is_whole) continue;
    if (from == region->address && to == last) {  // a large one is dear to go through
      region->is_whole = 1;
      continue;
    }
    for (uint64_t page = (from - region->address) >> MARK_SHIFT;
         page <= (to - 1 - region->address) >> MARK_SHIFT; page++)
      region->marks[page] = 1;
  }
}

void marks_wrote(uint64_t address, uint64_t bytes, CUstream stream, int is_per_thread) {
  if (!IS_PROTECTED() || is_capturing(stream, is_per_thread)) return;
  streams_seen(stream, is_per_thread);
  protect_lock();
  marks_range(address, bytes);
  protect_unlock();
}

static void mark_all(void) {
  for (int i = 0; i < region_count; i++) regions[i]->is_whole = 1;
}

void marks_all(CUstream stream, int is_per_thread) {
  if (!IS_PROTECTED() || is_capturing(stream, is_per_thread)) return;
  streams_seen(stream, is_per_thread);
  protect_lock();
  mark_all();
  protect_unlock();
}

static void see(uint64_t word, uint64_t at, void *context) {
  (void)at;
  struct allocation found;
  if (!allocation_reach(word, &found)) return;
  for (int i = 0; i < region_count; i++) {
    if (regions[i]->address - found.address >= found.bytes) continue;
    regions[i]->is_whole = 1;
    *(enum unseen *)context = UNSEEN_POINTER;
  }
}

static void see_range(uint64_t address, uint64_t bytes, void *unused) {
  (void)unused;
  marks_range(address, bytes);
}

// With the lock: what a kernel with these arguments may write.
static void mark_kernel(const struct kernel *kernel, void **parameters, void **extra) {
  int is_marking = window_map && kernel->is_marking;
  for (int i = 0; is_marking && i < region_count; i++)
    if (regions[i]->is_outside) regions[i]->is_whole = 1;
  if (is_marking && !kernel->has_maps) return;
  enum unseen pointed = UNSEEN_NOTHING, why = UNSEEN_UNTRUSTED;
  const struct seer seer = {see, see_range, &pointed};
  if (kernel->is_trusted) why = arguments_reach(kernel, parameters, extra, &seer);
  if (why != UNSEEN_NOTHING) mark_all();
  if (region_count) unseen_count(kernel, why != UNSEEN_NOTHING ? why : pointed);
}

static __thread const struct kernel *launched;  // between before and after
static __thread uint64_t entered;  // a bit for each launch under way: one call may be several

void marks_before(const struct launch *launch) {
  launched = NULL;
  entered <<= 1;
  if (!IS_PROTECTED()) return;
  entered |= (uint64_t)streams_before(launch->stream, launch->is_per_thread);
  if (launch->kind == LAUNCH_GRAPH || launch->kind == LAUNCH_LEGACY) return;
  launched = kernel_of(launch->function);
  if (launched->rules) rules_launched(launched, launch);
}

// Whether it may be a point.
static int marked(const struct launch *launch, CUresult result, uint64_t *hash) {
  if (!IS_PROTECTED() || result != CUDA_SUCCESS) return 0;
  if (is_capturing(launch->stream, launch->is_per_thread)) return 0;
  if (launch->kind == LAUNCH_LEGACY) {
    marks_all(launch->stream, launch->is_per_thread);
    return 0;
  }
  if (!launched && launch->kind != LAUNCH_GRAPH) return 0;  // protected only since the call began
  streams_seen(launch->stream, launch->is_per_thread);
  protect_lock();
  if (launch->kind != LAUNCH_GRAPH)
    mark_kernel(launched, launch->parameters, launch->extra);
  else if (!graph_marks(launch->function, hash)) mark_all();
  protect_unlock();
  return 1;
}

void marks_after(const struct launch *launch, CUresult result) {
  uint64_t hash = 0;
  int was_inside = entered & 1, is_point = marked(launch, result, &hash);
  entered >>= 1;
  streams_after(&was_inside);  // a point waits until nobody is
  if (is_point) points_launched(launch, launched, hash);
}
