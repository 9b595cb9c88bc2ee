// What is known of the pages of an opaque region, where whoever scans or appends them finds it.
//
// Owns: the layout of Region.page_hashes. Promises: a page is noted once a scan by each who notes
// it; the list has room for every page. Called by page_scan.cu and page_burst.cu.
//
// page_hashes:  two u64 for each page | u64 count | u32 numbers of `count` pages that a scan found
// dirty
#pragma once
#include "call.h"

// A region's pages, and the list of those to append.
struct Pages {
  const uint8_t* base_ptr;
  uint64_t* table;
  uint64_t* found_count;
  uint32_t* found;
};

FUNCTION Pages pages_of(const Region* region) {
  uint64_t* table = reinterpret_cast<uint64_t*>(region->page_hashes);
  uint64_t* count = table + 2 * region->block_count;
  return {reinterpret_cast<const uint8_t*>(*reinterpret_cast<const uint64_t*>(region->bases)),
          table, count, reinterpret_cast<uint32_t*>(count + 1)};
}

// One lane: a page to append. Any order will do.
FUNCTION void note_page(const Pages& pages, uint64_t page) {
  pages.found[add_device(pages.found_count, 1)] = (uint32_t)page;
}
