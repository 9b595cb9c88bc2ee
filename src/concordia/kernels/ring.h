// The ring between host threads (producers) and one executor (consumer).
//
// Owns: claiming, filling and publishing a slot; reading a completion. Promises: positions are
// 64-bit and only grow; a slot is valid when its publish word is position + 1, so nothing is ever
// cleared; a slot, and the arena window of the same index, are written again only after the
// executor published the completion and moved head past them; full is an answer, never a wait.
// Every word has one writing side. Called by host.cpp and the native tests (producers) and by
// executor.h (consumer). Does not start or wake the executor.
//
//   position p -> slot p % slot_count, completion p % completion_count,
//                 arena window of arena_bytes / slot_count bytes
//   A task whose arguments need k windows takes k positions (its span), and the rest of the lap too
//   when the k do not lie in one piece:
//     slots   [ ... | p: task, span 2+3 | skipped | 0 of next lap: arguments | arguments | ... ]
#pragma once
#include "portable.h"

FUNCTION Task* slot_at(const RingHeader* ring, uint64_t position) {
  return reinterpret_cast<Task*>(ring->slots) + (position & (ring->slot_count - 1));
}
FUNCTION Completion* completion_at(const RingHeader* ring, uint64_t position) {
  return reinterpret_cast<Completion*>(ring->completions) +
         (position & (ring->completion_count - 1));
}

// The second word of a slot whose task is empty and occupies one position: with the publish word
// all that there is to know of it, in 16 bytes. It names the position, so that no other task of the
// slot, older or newer, can be taken for it, whatever order the two words are seen in.
FUNCTION uint64_t empty_word(uint64_t position) {
  return (uint64_t)kTaskNoop << 32 | (uint32_t)(position + 1);
}

// Marks the publish word of an empty task's answer: it says all by itself, the other words are
// those of an older one.
constexpr uint64_t kEmptyAnswer = 1ull << 63;

// Whether the executor has, or is about to have, something to do. Either side may ask, after its
// own store_full.
FUNCTION bool is_published(const RingHeader* ring, uint64_t position) {
  return load_full(&slot_at(ring, position)->publish) == position + 1;
}

#if !CONCORDIA_CUDA
enum Submitted {
  kSubmitted = 0,
  kSubmittedNeedsLaunch = 1,
  kRefusedFull = 2,
  kRefusedTooLarge = 3
};

struct Arguments {
  const void* ids;  // u32 block ids
  uint64_t id_count;
  const void* payload;
  uint64_t payload_bytes;
};

// Claims positions for one task: the claim is one compare-and-swap, so producers never wait for
// each other here.
FUNCTION int claim(RingHeader* ring, uint64_t windows, uint64_t* position_ptr, uint64_t* span_ptr,
                   uint64_t* index_ptr) {
  const uint64_t count = ring->slot_count;
  if (windows > count / 2) return kRefusedTooLarge;
  uint64_t tail = __atomic_load_n(&ring->tail, __ATOMIC_RELAXED);
  for (;;) {
    const uint64_t index = tail & (count - 1), rest = count - index;
    const uint64_t span = windows <= rest ? windows : rest + windows;
    // A GPU takes head's line from us whenever it writes it, so it is read anew only where what was
    // read before gives no room. Acquire pairs with the store below, and through it, as the second
    // one by itself, with the executor's release of head: it has read slot and arguments that we
    // are about to write over.
    uint64_t head = __atomic_load_n(&ring->head_seen, __ATOMIC_ACQUIRE);
    if (tail + span - head > count) {
      head = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE);
      // Another producer's may be newer than ours: an older one is as true, only looked up earlier.
      __atomic_store_n(&ring->head_seen, head, __ATOMIC_RELEASE);
    }
    if (tail + span - head > count) {
      const uint64_t again = __atomic_load_n(&ring->tail, __ATOMIC_RELAXED);
      if (again == tail) return kRefusedFull;
      tail = again;  // head may be newer than our tail, which makes the ring look overfull
      continue;
    }
    if (!__atomic_compare_exchange_n(&ring->tail, &tail, tail + span, true, __ATOMIC_RELAXED,
                                     __ATOMIC_RELAXED))
      continue;
    *position_ptr = tail;
    *span_ptr = span;
    *index_ptr = windows <= rest ? index : 0;
    return kSubmitted;
  }
}

// Any host thread: hands a task in. The caller's task gives all words but publish, span, stamp and
// the places of its arguments.
FUNCTION int submit(RingHeader* ring, const Task* task, const Arguments& arguments,
                    uint64_t* position_ptr) {
  const uint64_t window = ring->arena_bytes / ring->slot_count;
  const uint64_t id_bytes = align_up(arguments.id_count * 4, 16);
  if (arguments.id_count > ring->arena_bytes || arguments.payload_bytes > ring->arena_bytes)
    return kRefusedTooLarge;
  const uint64_t bytes = id_bytes + arguments.payload_bytes;
  const uint64_t windows = bytes == 0 ? 1 : (bytes + window - 1) / window;
  uint64_t position, span, index;
  const int refused = claim(ring, windows, &position, &span, &index);
  if (refused != kSubmitted) return refused;
  uint8_t* arena = reinterpret_cast<uint8_t*>(ring->arena);
  uint8_t* place = arena + index * window;
  if (arguments.id_count != 0) memcpy(place, arguments.ids, arguments.id_count * 4);
  if (arguments.payload_bytes != 0)
    memcpy(place + id_bytes, arguments.payload, arguments.payload_bytes);
  Task* slot = slot_at(ring, position);
  Task filled = *task;
  // In the opcode's place, which an empty task has no use for; never another word there meanwhile.
  if (filled.kind == kTaskNoop)
    filled.opcode = (uint32_t)(span == 1 ? empty_word(position) : ~empty_word(position));
  memcpy(reinterpret_cast<uint8_t*>(slot) + sizeof(slot->publish),
         reinterpret_cast<const uint8_t*>(&filled) + sizeof(filled.publish),
         sizeof(Task) - sizeof(filled.publish));
  slot->blocks = index * window;
  slot->block_count = (uint32_t)arguments.id_count;
  if (arguments.payload != nullptr) {
    slot->source = ring->arena + index * window + id_bytes;
    slot->source_bytes = arguments.payload_bytes;
  }
  slot->stamp_ns = now_ns();
  slot->span = (uint32_t)span;
  // Publish, then look whether the executor left: the store must be seen before our look. Pairs
  // with leave() in executor.h, which says "left" and then looks at the ring; at least one of the
  // two sees the other.
  store_full(&slot->publish, position + 1);
  *position_ptr = position;
  return load_full(&ring->left) == __atomic_load_n(&ring->launched, __ATOMIC_ACQUIRE)
             ? kSubmittedNeedsLaunch
             : kSubmitted;
}

enum Found { kPending = 0, kDone = 1, kForgotten = 2 };

// Any host thread: the completion of a position, while it is kept. The executor writes completion p
// + completion_count only once head has reached it; a lap of slots as margin makes sure that what
// was read was not being written over.
FUNCTION int read_completion(const RingHeader* ring, uint64_t position, Completion* found_ptr) {
  const Completion* completion = completion_at(ring, position);
  // pairs with flush_answer() of journal.h and answer_empty() of executor.h
  const uint64_t word = __atomic_load_n(&completion->publish, __ATOMIC_ACQUIRE);
  const uint64_t published = word & ~kEmptyAnswer;
  if (published < position + 1) return kPending;
  if (word != published) {
    *found_ptr = {};
    found_ptr->publish = published;
    found_ptr->status = kStatusOk;
    found_ptr->sequence = kNotSealed;
  } else {
    const uint64_t* words = reinterpret_cast<const uint64_t*>(completion);
    uint64_t* found = reinterpret_cast<uint64_t*>(found_ptr);
    for (uint64_t i = 0; i < sizeof(Completion) / 8; ++i)
      found[i] = __atomic_load_n(words + i, __ATOMIC_ACQUIRE);
  }
  const uint64_t head = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE);
  if (published != position + 1 || head + ring->slot_count > position + ring->completion_count)
    return kForgotten;
  return kDone;
}

// Whether published work waits with nobody inside to do it.
FUNCTION bool needs_launch(const RingHeader* ring) {
  const uint64_t head = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE);
  return is_published(ring, head) &&
         load_full(&ring->left) == __atomic_load_n(&ring->launched, __ATOMIC_ACQUIRE);
}
#endif
