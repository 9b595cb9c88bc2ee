// Where kernels mark what they store.
//
// Owns: the words of the control block that say so. Promises: the map is there before the window
// opens; it opens once and never moves. Without a control block, or with pages of another size,
// there is no window, and no launch counts as one that marks. Called by regions.c.
#include "control.h"
#include "protect.h"

int window_open(uint64_t base, uint64_t bytes, CUdeviceptr map) {
  uint64_t control = control_address(), words[3] = {base, bytes, map};
  if (!control || process_number("page_shift", CONTROL_PAGE_SHIFT) != MARK_SHIFT) return 0;
  // The size last: until then every test fails.
  return REAL(cuMemcpyHtoD_v2, control + offsetof(struct concordia_control, map), &words[2], 8) ==
             CUDA_SUCCESS &&
         REAL(cuMemcpyHtoD_v2, control + offsetof(struct concordia_control, window_base),
              &words[0], 8) == CUDA_SUCCESS &&
         REAL(cuCtxSynchronize) == CUDA_SUCCESS &&
         REAL(cuMemcpyHtoD_v2, control + offsetof(struct concordia_control, window_bytes),
              &words[1], 8) == CUDA_SUCCESS;
}
