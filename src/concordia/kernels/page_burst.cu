// A kernel of its own: notes the dirty pages of a region with all multiprocessors, for page_scan to
// append. Pages of one leaf, GPU only.
//
// Owns: nothing; it writes the list of page_table.h, whose count its launcher has set to zero.
// Promises: it waits for nobody, so it can never hold a neighbour up longer than its own reading
// takes. Launched by device/burst.py in the executor's stream, between two stays.
#include "page_hash.h"

extern "C" __global__ void __launch_bounds__(512)
    concordia_page_burst(const Region* region, uint64_t first, uint64_t end) {
  const uint64_t lane = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
  find_dirty([=] { return region; }, first, end, lane / 32, (uint64_t)gridDim.x * blockDim.x / 32);
}
