// What plain kernels reach of the work of a page scan and of an append, each alone.
//
// Owns: the rows of kernel_limits.py. Promises: page_hash.h and stream.h are the project's own as
// they stand; who reads leaves the XOR of all words, who hashes notes the pages that differ from
// the table: neither is right without its work; a wait ends. GPU only, from sm_90 on.
#include "page_hash.h"

#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

struct Work {
  const Region* region;  // of the pages, with the table that hashes are compared with
  const uint8_t* from;
  uint64_t leaves;
  uint64_t* hashes;  // two for each leaf: the table of a scan, or what a store leaves
  uint8_t* to;       // of a store; null: only hashes
  uint64_t* answer;  // the XOR of what was read | not 0: a bounded wait ended
};

constexpr uint32_t kAccesses = kLeafBytes / 512;  // of a warp, for a leaf

FUNCTION uint32_t my_warp() { return blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }
FUNCTION uint32_t all_warps() { return gridDim.x * (blockDim.x / 32); }
FUNCTION uint64_t place_of(uint64_t leaf) { return leaf * kLeafBytes + threadIdx.x % 32 * 16; }
FUNCTION void fold(uint64_t* sum, Wide data) { *sum ^= data.word[0] ^ data.word[1]; }
FUNCTION void give_sum(uint64_t sum, uint64_t* answer) {
  for (uint32_t bit = 1; bit < 32; bit *= 2) sum ^= exchange_lanes(sum, bit);
  if (threadIdx.x % 32 == 0) atomicXor(reinterpret_cast<unsigned long long*>(answer), sum);
}

// Holds the stream until the host has asked for what comes behind: no launch is measured.
KERNEL(32) hold(Work) {
  const uint64_t start = now_ns();
  for (uint32_t i = 0; i < 100'000 && now_ns() - start < 200'000; ++i) pause_lane();
}

// find_dirty's walk without its hash: the same pages by the same lanes, as many loads under way.
KERNEL(512) read_as_page_hash(Work work) {
  constexpr uint32_t kPageWides = kLeafBytes / sizeof(Wide);
  const uint32_t t = threadIdx.x % 32, stride = all_warps() * kPagesEach;
  const uint32_t first = my_warp() * kPagesEach + t / kPageLanes;
  const Wide* at = reinterpret_cast<const Wide*>(work.from) + first * kPageWides + t % kPageLanes;
  uint64_t sum = 0;
  Wide near[kLoads], far[kLoads];
  load_block(at, near);
#pragma unroll 1
  for (uint32_t left = (uint32_t)work.leaves / stride; left != 0; --left) {
    // behind the last page its own blocks are loaded again
    const uint32_t step = left > 1 ? stride * kPageWides : 0;
#pragma unroll 1
    for (uint32_t block = 0; block < kBlocks; block += 2) {
      const bool is_end = block == kBlocks - 2;
      load_block(at + kBlockWides, far);
#pragma unroll
      for (uint32_t k = 0; k < kLoads; ++k) fold(&sum, near[k]);
      at += is_end ? (int32_t)(step - (kBlocks - 2) * kBlockWides) : 2 * (int32_t)kBlockWides;
      load_block(at, near);
#pragma unroll
      for (uint32_t k = 0; k < kLoads; ++k) fold(&sum, far[k]);
    }
  }
  give_sum(sum, work.answer);
}

KERNEL(512) hash_as_page_hash(Work work) {
  find_dirty([=] { return work.region; }, 0, work.leaves, my_warp(), all_warps());
}

FUNCTION Wide load_once(const uint8_t* from) {
  Wide data;
  asm volatile("ld.global.L1::no_allocate.v2.u64 {%0, %1}, [%2];"
               : "=l"(data.word[0]), "=l"(data.word[1]) : "l"(from));
  return data;
}

// A warp has a leaf under way at any time: each access is asked for again once it was folded.
KERNEL(1024) read_leaves(Work work) {
  const uint32_t teams = all_warps();
  const uint8_t* at = work.from + place_of(my_warp());
  uint64_t sum = 0;
  Wide data[kAccesses];
#pragma unroll
  for (uint32_t k = 0; k < kAccesses; ++k) data[k] = load_once(at + 512 * k);
#pragma unroll 1
  for (uint32_t left = (uint32_t)work.leaves / teams; left > 1; --left) {
    at += (uint64_t)teams * kLeafBytes;
#pragma unroll
    for (uint32_t k = 0; k < kAccesses; ++k) {
      fold(&sum, data[k]);
      data[k] = load_once(at + 512 * k);
      if (k % 2 == 1) team_sync();  // or the compiler waits for all before it asks again
    }
  }
#pragma unroll
  for (uint32_t k = 0; k < kAccesses; ++k) fold(&sum, data[k]);
  give_sum(sum, work.answer);
}

// Of a warp: places for leaves in shared memory, each with the barrier that its copy ends at.
constexpr uint32_t kRingWarps = 16, kRingPlaces = 2;
constexpr uint32_t kRingBytes = kRingWarps * kRingPlaces * kLeafBytes;  // the barriers lie behind
constexpr uint32_t kTries = 1 << 16;  // a copy takes some tens of them

FUNCTION uint32_t shared_at(const void* ptr) { return (uint32_t)__cvta_generic_to_shared(ptr); }
FUNCTION void copy_leaf(uint32_t to, const uint8_t* from, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(barrier), "r"(kLeafBytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(kLeafBytes), "r"(barrier) : "memory");
}
FUNCTION bool is_copied(uint32_t barrier, uint32_t parity) {
  uint32_t is_done = 0;
#pragma unroll 1
  for (uint32_t tries = 0; is_done == 0 && tries < kTries; ++tries)
    asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t}"
                 : "=r"(is_done) : "r"(barrier), "r"(parity) : "memory");
  return is_done != 0;
}

template <bool kIsHashed>
FUNCTION void scan_copies(const Work& work) {
  extern __shared__ __align__(128) uint8_t ring[];
  const uint32_t t = threadIdx.x % 32, own = threadIdx.x / 32 * kRingPlaces;
  const uint8_t* leaves = ring + own * kLeafBytes;
  const uint32_t barriers = shared_at(ring) + kRingBytes + own * 8;
  const uint32_t team = my_warp(), teams = all_warps(), count = (uint32_t)work.leaves / teams;
  auto leaf_of = [=](uint32_t i) { return (uint64_t)i * teams + team; };
  auto ask = [=](uint32_t i) {
    const uint32_t place = i % kRingPlaces;
    copy_leaf(shared_at(leaves) + place * kLeafBytes, work.from + leaf_of(i) * kLeafBytes,
              barriers + 8 * place);
  };
  auto known_of = [=](uint32_t i) {  // asked for two turns ahead: a turn is as long as a load
    return kIsHashed && i < count ? work.hashes[2 * leaf_of(i) + (t == kHighLane)] : 0;
  };
  if (t == 0) {
    for (uint32_t i = 0; i < kRingPlaces; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + 8 * i) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;\n\t"
                 "fence.proxy.async.shared::cta;" ::: "memory");
    for (uint32_t i = 0; i < kRingPlaces && i < count; ++i) ask(i);
  }
  team_sync();
  uint64_t sum = 0, next = known_of(0), second = known_of(1);
#pragma unroll 1
  for (uint32_t i = 0; i < count; ++i) {
    const uint64_t known = next;
    next = second;
    second = known_of(i + 2);
    const uint32_t place = i % kRingPlaces;
    const uint8_t* leaf = leaves + place * kLeafBytes;
    if (!is_copied(barriers + 8 * place, i / kRingPlaces % 2)) {
      work.answer[1] = 1;
      return;
    }
    bool is_other = false;
    if constexpr (kIsHashed) {
      uint64_t hash[2] = {};
      hash_whole_leaf(MemoryWords{leaf, kLeafBytes}, 0, nullptr, hash);
      const uint32_t differ = team_bits(known != (t == kHighLane ? hash[1] : hash[0]));
      is_other = (differ & (1 | 1 << kHighLane)) != 0;
    } else {
#pragma unroll
      for (uint32_t k = 0; k < kAccesses; ++k)
        fold(&sum, *reinterpret_cast<const Wide*>(leaf + 512 * k + 16 * t));
    }
    team_sync();  // every lane has read its words: the next leaf may go over them
    if (t == 0 && i + kRingPlaces < count) ask(i + kRingPlaces);
    if (t == 0 && is_other) note_page(pages_of(work.region), leaf_of(i));
  }
  if constexpr (!kIsHashed) give_sum(sum, work.answer);
}
KERNEL(512) read_copies(Work work) { scan_copies<false>(work); }
KERNEL(512) hash_copies(Work work) { scan_copies<true>(work); }

template <bool kIsRead>
FUNCTION void store_leaves(const Work& work) {
#pragma unroll 1
  for (uint64_t leaf = my_warp(); leaf < work.leaves; leaf += all_warps()) {
    const Wide* source = reinterpret_cast<const Wide*>(work.from + place_of(leaf));
    Wide* target = reinterpret_cast<Wide*>(work.to + place_of(leaf));
    Wide data[kAccesses];
#pragma unroll
    for (uint32_t k = 0; k < kAccesses; ++k)
      data[k] = kIsRead ? source[32 * k] : Wide{{leaf, leaf}};
#pragma unroll
    for (uint32_t k = 0; k < kAccesses; ++k) target[32 * k] = data[k];
  }
}
KERNEL(512) store_constants(Work work) { store_leaves<false>(work); }
KERNEL(512) read_and_store(Work work) { store_leaves<true>(work); }

// As stream_whole_leaves calls it.
KERNEL(512) hash_and_store(Work work) {
  const MemoryWords words = {work.from, work.leaves * kLeafBytes};
#pragma unroll 1
  for (uint32_t leaf = my_warp(); leaf < work.leaves; leaf += all_warps())
    hash_whole_leaf(words, leaf * kLeafBytes, work.to, work.hashes + 2ull * leaf);
}
