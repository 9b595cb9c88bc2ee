// Where kernels mark what they store.
//
// Owns: the words of the control block that say so. Promises: the map is there before the window
// opens; it opens once and never moves; nothing here disturbs a capture. Without a control block,
// or with pages of another size, there is no window, and no launch counts as one that marks. Called
// by regions.c.
#include "control.h"
#include "protect.h"

static int is_written(CUdeviceptr target, const uint64_t *words, uint64_t count, CUstream stream) {
  return REAL(cuMemcpyHtoDAsync_v2, target, words, count * sizeof *words, stream) ==
             CUDA_SUCCESS &&
         REAL(cuStreamSynchronize, stream) == CUDA_SUCCESS;
}

// The size last: until then every test fails. A kernel that runs meanwhile reads size and map in
// one word of 16 bytes, so where it sees the window open it has the map. Where the map's copies are
// it knows all along: that was written before the block's address was told to anybody.
int window_open(uint64_t base, uint64_t bytes, CUdeviceptr map, CUstream stream) {
  uint64_t control = control_address();
  if (!control || process_number("page_shift", CONTROL_PAGE_SHIFT) != MARK_SHIFT) return 0;
  return is_written(control + offsetof(struct concordia_control, map), &map, 1, stream) &&
         is_written(control + offsetof(struct concordia_control, window_base), &base, 1, stream) &&
         is_written(control + offsetof(struct concordia_control, window_bytes), &bytes, 1, stream);
}
