// The executor: takes tasks from a ring in order and runs each with all its lanes.
//
// Owns: the consumer's side of the ring, and the leader's part in residency: leave when idle, when the lease is over, or when asked to.
// Promises: every published task is run exactly once; the operator is read when its task starts, once, for all lanes; a task that names
// no operator is answered with kStatusBadTask; nothing here waits without looking at stop. Called by executor.cu (GPU) and host.cpp.
// Does not relaunch itself: who launched it looks at the ring once more after it left.
#pragma once
#include "journal.h"
#include "ring.h"

struct Executor {
  RingHeader* ring;
  uint64_t position;  // next to take; survives leaving
  uint64_t has_task;  // the leader's decision for all lanes, until the next grid_sync but one
  HandlerFunction handler;  // 0: nothing to run
  uint64_t started_ns;
  uint64_t heartbeat;
  Journal journal;
  Call call;
};

// Tests make the executor leave, or lose its core, between any two of its steps; a release kernel has no such thing.
#ifndef CONCORDIA_STEP
#define CONCORDIA_STEP(place) false
#endif

// Leader: says that this launch is over, then looks at the ring once more. True: really left. False: a task came in between and the word
// is taken back; if its producer saw it and launched once more, that launch comes after this one and finds the ring empty.
FUNCTION bool leave(Executor* executor, uint64_t launch, bool is_forced) {
  RingHeader* ring = executor->ring;
  (void)CONCORDIA_STEP(0);
  store_full(&ring->left, launch);  // before the look below; pairs with submit() in ring.h
  (void)CONCORDIA_STEP(1);
  if (is_forced || !is_published(ring, executor->position)) return true;
  store<kRelease, kSystem>(&ring->left, launch - 1);
  return false;
}

// Leader: waits for the next task; false when this launch is over.
FUNCTION bool next_task(Executor* executor, uint64_t launch, uint64_t entered_ns) {
  RingHeader* ring = executor->ring;
  const Task* slot = slot_at(ring, executor->position);
  const uint64_t lease_ns = load<kRelaxed, kSystem>(&ring->lease_ns), idle_ns = load<kRelaxed, kSystem>(&ring->idle_ns);
  const uint64_t idle_since_ns = now_ns();
  for (;;) {
    store<kRelaxed, kSystem>(&ring->heartbeat, ++executor->heartbeat);
    const uint64_t waited_ns = now_ns() - idle_since_ns;
    const bool is_over = load<kRelaxed, kSystem>(&ring->stop) != 0 || idle_since_ns + waited_ns - entered_ns > lease_ns;
    if (is_over || CONCORDIA_STEP(2)) return !leave(executor, launch, true);
    // Acquire pairs with the producer's publish: slot and arguments are there. A closed gate ends the launch: the one that may pass was
    // put behind a framework's work and looks at the ring when that work is done.
    if (load<kAcquire, kSystem>(&slot->publish) == executor->position + 1)
      return (slot->kind != kTaskGate || slot->arg <= launch) || !leave(executor, launch, true);
    if (waited_ns > idle_ns) return !leave(executor, launch, false);
    pause_lane();
  }
}

// Leader: makes the Call of the task at hand and reads its operator.
FUNCTION void start_task(Executor* executor) {
  RingHeader* ring = executor->ring;
  Call* call = &executor->call;
  call->task = *slot_at(ring, executor->position);
  call->status = kStatusOk;
  call->sequence = kNotSealed;
  call->payload_hash[0] = call->payload_hash[1] = 0;
  call->result = 0;
  call->is_bad = 0;
  executor->handler = nullptr;
  executor->started_ns = now_ns();
  // The acknowledgement comes before the operator is read: whoever sees it knows that older operators run no more.
  store<kRelease, kSystem>(&ring->generation_seen, load<kAcquire, kSystem>(&ring->generation));
  call->op = nullptr;
  call->region = nullptr;
  if (call->task.kind == kTaskNoop || call->task.kind == kTaskGate) return;
  if (call->task.opcode < kOperatorCapacity)
    call->op = reinterpret_cast<const Operator*>(
        load<kAcquire, kSystem>(reinterpret_cast<const uint64_t*>(ring->operators) + call->task.opcode));
  if (call->op == nullptr) {
    call->status = kStatusBadTask;
    return;
  }
  call->region = reinterpret_cast<const Region*>(call->op->region);
  executor->handler = reinterpret_cast<HandlerFunction>(call->op->function);
}

// Leader: answers the task, then gives its slot back.
FUNCTION void finish_task(Executor* executor) {
  RingHeader* ring = executor->ring;
  Call* call = &executor->call;
  Completion* completion = completion_at(ring, executor->position);
  uint64_t* words = reinterpret_cast<uint64_t*>(completion);
  const uint64_t generation = call->op != nullptr ? call->op->generation : 0;
  const uint64_t answer[] = {call->status | generation << 32, call->sequence, call->payload_hash[0], call->payload_hash[1], call->result};
  for (uint64_t i = 0; i < 5; ++i) store<kRelaxed, kSystem>(words + 1 + i, answer[i]);
  // Pairs with the acquire in read_completion().
  store<kRelease, kSystem>(&completion->publish, executor->position + 1);
  (void)CONCORDIA_STEP(3);
  store<kRelaxed, kSystem>(&ring->busy_ns, load<kRelaxed, kSystem>(&ring->busy_ns) + (now_ns() - executor->started_ns));
  store<kRelaxed, kSystem>(&ring->done_count, load<kRelaxed, kSystem>(&ring->done_count) + 1);
  store<kRelaxed, kSystem>(&ring->appended_bytes, executor->journal.committed_bytes);
  const uint64_t span = call->task.span;
  executor->position += span == 0 || span > ring->slot_count ? 1 : span;
  // After the completion, and after our last read of slot and arguments; pairs with the acquire in claim().
  store<kRelease, kSystem>(&ring->head, executor->position);
}

// All lanes: one launch, from entering to leaving.
FUNCTION void run_executor(Executor* executor, uint64_t lane, uint64_t launch) {
  Call* call = &executor->call;
  const uint64_t entered_ns = now_ns();
  for (;;) {
    if (lane == 0) {
      executor->has_task = next_task(executor, launch, entered_ns);
      if (executor->has_task) start_task(executor);
    }
    grid_sync(call);  // the leader's decision is released to all lanes
    if (!executor->has_task) return;
    const HandlerFunction handler = executor->handler;
    if (handler != nullptr) handler(call, lane);
    (void)CONCORDIA_STEP(4);
    grid_sync(call);  // no lane is inside the handler any more, and none still reads what the leader changes next
    if (lane == 0) finish_task(executor);
  }
}
