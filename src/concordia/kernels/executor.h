// The executor: takes tasks from a ring in order and runs each with all its lanes.
//
// Owns: the consumer's side of the ring, and the leader's part in residency: leave when idle, when the lease is over, or when asked to.
// Promises: every published task is run exactly once; the operator is read when its task starts, once, for all lanes; a task that names
// no operator is answered with kStatusBadTask; nothing here waits without looking at stop. Called by executor.cu (GPU) and host.cpp.
// Does not relaunch itself: who launched it looks at the ring once more after it left.
#pragma once
#include "journal.h"
#include "ring.h"

constexpr uint64_t kKeptOperators = 16;

struct Executor {
  RingHeader* ring;
  uint64_t position;  // next to take; survives leaving
  uint64_t has_task;  // the leader's decision for all lanes, until the next grid_sync but one
  HandlerFunction handler;  // 0: nothing to run
  uint64_t started_ns;
  uint64_t lease_ns, idle_ns;  // of this launch
  uint64_t heartbeat, busy_ns, done_count;  // kept here: reading the ring back costs a GPU a trip over the bus
  uint64_t generation;  // of the operators kept below
  uint64_t kept_opcode[kKeptOperators];
  Operator kept[kKeptOperators];
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

// Leader: waits for the next task and copies it; false when this launch is over.
FUNCTION bool next_task(Executor* executor, uint64_t launch, uint64_t entered_ns) {
  RingHeader* ring = executor->ring;
  const Task* slot = slot_at(ring, executor->position);
  const uint64_t idle_since_ns = now_ns();
  for (;;) {
    store<kRelaxed, kSystem>(&ring->heartbeat, ++executor->heartbeat);
    // Both words before a look at either: on a GPU each is a trip over the bus, and so they travel together.
    const uint64_t stop = load<kRelaxed, kSystem>(&ring->stop);
    const uint64_t published = load<kAcquire, kSystem>(&slot->publish);  // pairs with the producer's publish: slot and arguments are there
    const uint64_t at_ns = now_ns();
    if (stop != 0 || at_ns - entered_ns > executor->lease_ns || CONCORDIA_STEP(2)) break;
    if (published == executor->position + 1) {
      executor->call.task = *slot;
      // A closed gate ends the launch: the one that may pass was put behind a framework's work, and looks at the ring when that is done.
      const Task* task = &executor->call.task;
      if (task->kind != kTaskGate || task->arg <= launch) return true;
      break;
    }
    if (at_ns - idle_since_ns > executor->idle_ns && leave(executor, launch, false)) return false;
    pause_lane();
  }
  (void)leave(executor, launch, true);
  return false;
}

// Leader: what an opcode means now. Operators are kept until the table changes.
FUNCTION const Operator* find_operator(Executor* executor, uint64_t opcode) {
  RingHeader* ring = executor->ring;
  if (load<kRelaxed, kSystem>(&ring->generation) != executor->generation) {
    executor->generation = load<kAcquire, kSystem>(&ring->generation);  // pairs with publish_operator: the entries are there
    for (uint64_t i = 0; i < kKeptOperators; ++i) executor->kept_opcode[i] = 0;  // 0 is no operator
    // Older operators run no more, nor will any start: whoever sees this may unload them.
    store<kRelease, kSystem>(&ring->generation_seen, executor->generation);
  }
  if (opcode == 0 || opcode >= kOperatorCapacity) return nullptr;
  const uint64_t i = opcode % kKeptOperators;
  if (executor->kept_opcode[i] != opcode) {
    const uint64_t entry = load<kAcquire, kSystem>(reinterpret_cast<const uint64_t*>(ring->operators) + opcode);
    if (entry == 0) return nullptr;
    executor->kept[i] = *reinterpret_cast<const Operator*>(entry);
    executor->kept_opcode[i] = opcode;
  }
  return &executor->kept[i];
}

// Leader: makes the Call of the task at hand.
FUNCTION void start_task(Executor* executor) {
  Call* call = &executor->call;
  call->status = kStatusOk;
  call->sequence = kNotSealed;
  call->payload_hash[0] = call->payload_hash[1] = 0;
  call->result = 0;
  executor->handler = nullptr;
  executor->started_ns = now_ns();
  call->region = nullptr;
  const bool is_empty = call->task.kind == kTaskNoop || call->task.kind == kTaskGate;
  call->op = find_operator(executor, is_empty ? 0 : call->task.opcode);
  if (is_empty) return;
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
  const uint64_t position = executor->position, span = call->task.span;
  executor->position += span == 0 || span > ring->slot_count ? 1 : span;
  settle();  // the answer before publish; our last read of slot and arguments before head; records before their count
  // The counters first: whoever has the answer finds it counted.
  count_records(&executor->journal);
  executor->busy_ns += now_ns() - executor->started_ns;
  store<kRelaxed, kSystem>(&ring->busy_ns, executor->busy_ns);
  store<kRelaxed, kSystem>(&ring->done_count, ++executor->done_count);
  store<kRelaxed, kSystem>(&ring->appended_bytes, executor->journal.committed_bytes);
  store_settled(&completion->publish, position + 1);  // pairs with the acquire in read_completion()
  (void)CONCORDIA_STEP(3);
  store_settled(&ring->head, executor->position);  // pairs with the acquire in claim()
}

// All lanes: one launch, from entering to leaving.
FUNCTION void run_executor(Executor* executor, uint64_t lane, uint64_t launch) {
  Call* call = &executor->call;
  const uint64_t entered_ns = now_ns();
  if (lane == 0) {
    executor->lease_ns = load<kRelaxed, kSystem>(&executor->ring->lease_ns);
    executor->idle_ns = load<kRelaxed, kSystem>(&executor->ring->idle_ns);
  }
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
