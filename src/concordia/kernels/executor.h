// The executor: takes tasks from a ring in order and runs each with all its lanes.
//
// Owns: the consumer's side of the ring, and the leader's part in residency: leave when idle, when
// the lease is over, or when asked to. Promises: every published task is run exactly once; the
// operator is read when its task starts, once, for all lanes; a task that names no operator is
// answered with kStatusBadTask; nothing here waits without looking at stop. Called by executor.cu
// (GPU) and host.cpp. Does not relaunch itself: who launched it looks at the ring once more after
// it left.
#pragma once
#include "journal.h"
#include "ring.h"

// Tasks that are fetched together: on a GPU eight trips over the bus take as long as one. A CPU has
// the ring in its cache. The host's compiler makes the state that a GPU starts with, so its size is
// the same for both.
constexpr uint64_t kFetchAhead = kDeviceShape ? kFetchedMost : 1;
constexpr uint64_t kFetchedNs = 50000;  // fetched tasks run without a look at `stop` for so long
constexpr uint64_t kKeptOperators = 16;

struct Executor {
  RingHeader* ring;
  uint64_t position;  // next to take; survives leaving
  uint64_t has_task;  // the leader's decision for all lanes, until the next grid_sync but one
  HandlerFunction handler;  // 0: nothing to run
  uint64_t started_ns;
  // Copies of what the ring says: reading it there costs a GPU a trip over the bus each time.
  uint64_t lease_ns, idle_ns;
  uint64_t slots, slot_mask, window;
  uint64_t heartbeat, busy_ns, done_count;
  uint64_t fetched_from, fetched_ns;
  const uint64_t* table_generation;  // the ring's; a ring in streams has its executor's
  uint64_t generation;  // of the operator table, as this launch or this task found it
  uint64_t kept_generation;  // of the operators kept below
  uint64_t kept_opcode[kKeptOperators];
  Operator kept[kKeptOperators];
  Region kept_region[kKeptOperators];
  alignas(16) Fetched fetched[kFetchedMost];
  Journal journal;
  Call call;
};

// Leader: says that this launch is over, then looks at the ring once more. True: really left.
// False: a task came in between and the word is taken back; if its producer saw it and launched
// once more, that launch comes after this one and finds the ring empty.
FUNCTION bool leave(Executor* executor, uint64_t launch, bool is_forced) {
  RingHeader* ring = executor->ring;
  (void)CONCORDIA_STEP(0);
  store_full(&ring->left, launch);  // before the look below; pairs with submit() in ring.h
  (void)CONCORDIA_STEP(1);
  if (is_forced || !is_published(ring, executor->position)) return true;
  store<kRelease, kSystem>(&ring->left, launch - 1);
  return false;
}

FUNCTION const Task* slot_of(const Executor* executor, uint64_t position) {
  return reinterpret_cast<const Task*>(executor->slots) + (position & executor->slot_mask);
}

// Which of the next slots are published, and which of those hold an empty task: a bit each.
struct Ahead {
  uint32_t there, empty;
};

#if CONCORDIA_CUDA
// A task and its first ids come in pieces of 16 bytes, each lane one piece of four slots: all of
// them are asked for before the first is waited for, so eight tasks take one trip over the bus.
constexpr uint32_t kTaskPieces = sizeof(Task) / 16, kPieces = kTaskPieces + kNearIds / 4;
constexpr uint32_t kSlotsAtOnce = kTeamLanes / kPieces, kTurns = kFetchAhead / kSlotsAtOnce;
static_assert(sizeof(Task) % 16 == 0 && kTeamLanes % kPieces == 0, "a lane has the same piece");

FUNCTION void copy_slots(Executor* executor, uint32_t lane, uint32_t there) {
  const uint32_t piece = lane % kPieces, first = lane / kPieces;
  const bool is_task = piece < kTaskPieces;
  const uint64_t position = executor->position;
  Wide found[kTurns];
#pragma unroll
  for (uint32_t turn = 0; turn < kTurns; ++turn) {
    const uint32_t ahead = first + turn * kSlotsAtOnce;
    const uint64_t index = (position + ahead) & executor->slot_mask;
    const uint8_t* from =
        is_task ? reinterpret_cast<const uint8_t*>(slot_of(executor, position + ahead)) + piece * 16
                : executor->call.arena + index * executor->window + (piece - kTaskPieces) * 16;
    if (there >> ahead & 1) found[turn] = *reinterpret_cast<const Wide*>(from);
  }
#pragma unroll
  for (uint32_t turn = 0; turn < kTurns; ++turn) {
    const uint32_t ahead = first + turn * kSlotsAtOnce;
    Fetched* fetched = &executor->fetched[ahead];
    uint8_t* to = is_task ? reinterpret_cast<uint8_t*>(&fetched->task) + piece * 16
                          : reinterpret_cast<uint8_t*>(fetched->ids) + (piece - kTaskPieces) * 16;
    if (there >> ahead & 1) *reinterpret_cast<Wide*>(to) = found[turn];
    if (piece == 0) fetched->mark = there >> ahead & 1 ? position + ahead + 1 : 0;
  }
}

FUNCTION Ahead look_ahead(const Executor* executor, uint64_t lane) {
  const uint64_t position = executor->position + lane;
  Two words = {};
  // pairs with submit(): slot and arguments are there
  if (lane < kFetchAhead) words = load_two(&slot_of(executor, position)->publish);
  const bool is_there = lane < kFetchAhead && words.first == position + 1;
  return {team_bits(is_there), team_bits(is_there && words.second == empty_word(position))};
}
FUNCTION void read_generation(Executor*) {}  // operators change only while nobody is inside
#else
// After the acquire of the slots; the entry that it counts is acquired when it is used.
FUNCTION void read_generation(Executor* executor) {
  executor->generation = load<kRelaxed, kSystem>(executor->table_generation);
}

FUNCTION void copy_slots(Executor* executor, uint32_t, uint32_t there) {
  for (uint64_t ahead = 0; ahead < kFetchAhead; ++ahead) {
    Fetched* fetched = &executor->fetched[ahead];
    fetched->mark = there >> ahead & 1 ? executor->position + ahead + 1 : 0;
    if (fetched->mark == 0) continue;
    fetched->task = *slot_of(executor, executor->position + ahead);
    if constexpr (kFetchAhead == 1) return;
    const uint64_t index = (executor->position + ahead) & executor->slot_mask;
    copy_bytes(reinterpret_cast<uint8_t*>(fetched->ids),
               executor->call.arena + index * executor->window,
               smaller(sizeof(fetched->ids), executor->window));
  }
}

FUNCTION Ahead look_ahead(const Executor* executor, uint64_t) {
  Ahead found = {};
  for (uint64_t ahead = 0; ahead < kFetchAhead; ++ahead) {
    const uint64_t position = executor->position + ahead;
    const uint64_t* words = &slot_of(executor, position)->publish;
    if (load<kAcquire, kSystem>(words) != position + 1) break;
    found.there |= 1u << ahead;
    if (words[1] == empty_word(position)) found.empty |= 1u << ahead;
  }
  return found;
}
#endif

// Leading team: notes tasks that are all empty, without another trip to their slots.
FUNCTION void note_empty(Executor* executor, uint64_t lane, uint32_t there) {
  for (uint64_t ahead = lane; ahead < kFetchAhead; ahead += kTeamLanes) {
    Fetched* fetched = &executor->fetched[ahead];
    fetched->task.kind = kTaskNoop;
    fetched->task.span = 1;
    fetched->mark = there >> ahead & 1 ? executor->position + ahead + 1 : 0;
  }
}

// Leading team: copies the tasks that are published from executor->position on. True if the first
// of them is there.
FUNCTION bool fetch_tasks(Executor* executor, uint64_t lane) {
  const Ahead ahead = look_ahead(executor, lane);
  if ((ahead.there & 1) == 0) return false;
  read_generation(executor);
  team_sync();  // what each lane acquired is there for all of them
  if (ahead.empty == ahead.there) note_empty(executor, lane, ahead.there);
  else copy_slots(executor, (uint32_t)lane, ahead.there);
  if (lane == 0) executor->fetched_from = executor->position;
  team_sync();
  return true;
}

// Whether the block ids of the task at `position` are those that were fetched with it.
FUNCTION bool is_near(const Executor* executor, const Task* task, uint64_t position) {
  return kFetchAhead > 1 && task->blocks == (position & executor->slot_mask) * executor->window;
}

// Leader: how many of the fetched tasks from this one on a handler may run together.
FUNCTION uint64_t count_group(const Executor* executor, uint64_t ahead) {
  const Fetched* first = &executor->fetched[ahead];
  uint64_t count = 0;
  while (ahead + count < kFetchAhead) {
    const uint64_t position = executor->position + count;
    const Fetched* one = first + count;
    if (one->mark != position + 1 || one->task.kind != kTaskAppend || one->task.span > 1 ||
        one->task.opcode != first->task.opcode || !is_near(executor, &one->task, position))
      break;
    count += 1;
  }
  return count == 0 ? 1 : count;
}

// Leader: makes a fetched task the one at hand; false when it was not fetched, or too long ago.
FUNCTION bool take_fetched(Executor* executor, uint64_t at_ns) {
  Call* call = &executor->call;
  const uint64_t ahead = executor->position - executor->fetched_from;
  if (ahead >= kFetchAhead || executor->fetched[ahead].mark != executor->position + 1 ||
      at_ns - executor->fetched_ns > kFetchedNs)
    return false;
  call->task = executor->fetched[ahead].task;
  call->near_ids = executor->fetched[ahead].ids;
  call->near_id_count = is_near(executor, &call->task, executor->position) ? kNearIds : 0;
  call->group = &executor->fetched[ahead];
  call->group_count = count_group(executor, ahead);
  return true;
}

// Leading team: waits for the next task; false when this launch is over.
FUNCTION bool next_task(Executor* executor, uint64_t lane, uint64_t launch, uint64_t entered_ns) {
  RingHeader* ring = executor->ring;
  const uint64_t idle_since_ns = now_ns();
  for (;;) {
    if (from_leader(lane == 0 && take_fetched(executor, now_ns()))) {
      // A closed gate ends the launch: the one that may pass was put behind a framework's work, and
      // looks at the ring when that is done. Only the leader, who wrote the task just now, reads it:
      // the others may from the next grid_sync on, for a shuffle orders no memory.
      const Task* task = &executor->call.task;
      if (from_leader(lane == 0 && (task->kind != kTaskGate || task->arg <= launch))) return true;
      break;
    }
    uint64_t stop = 0;
    if (lane == 0) {
      settle_answer(&executor->call);  // nothing comes that could bring its fence along
      store<kRelaxed, kSystem>(&ring->heartbeat, ++executor->heartbeat);
      stop = load<kRelaxed, kSystem>(&ring->stop);
    }
    const bool is_there = fetch_tasks(executor, lane);
    const uint64_t at_ns = now_ns();
    if (lane == 0) executor->fetched_ns = at_ns;
    if (from_leader(stop != 0 || at_ns - entered_ns > executor->lease_ns || CONCORDIA_STEP(2)))
      break;
    if (is_there) continue;
    if (from_leader(lane == 0 && at_ns - idle_since_ns > executor->idle_ns &&
                    leave(executor, launch, false)))
      return false;
    pause_lane();
  }
  if (lane == 0) {
    settle_answer(&executor->call);
    (void)leave(executor, launch, true);
  }
  return false;
}

// Leader: what an opcode means now. Operators are kept until the table changes.
FUNCTION const Operator* find_operator(Executor* executor, uint64_t opcode) {
  RingHeader* ring = executor->ring;
  if (executor->generation != executor->kept_generation) {
    executor->kept_generation = executor->generation;
    for (uint64_t i = 0; i < kKeptOperators; ++i) executor->kept_opcode[i] = 0;  // 0 is no operator
    // Older operators run no more, nor will any start: whoever sees this may unload them.
    store<kRelease, kSystem>(&ring->generation_seen, executor->generation);
  }
  if (opcode == 0 || opcode >= kOperatorCapacity) return nullptr;
  const uint64_t i = opcode % kKeptOperators;
  if (executor->kept_opcode[i] != opcode) {
    const uint64_t entry =
        load<kAcquire, kSystem>(reinterpret_cast<const uint64_t*>(ring->operators) + opcode);
    if (entry == 0) return nullptr;
    const Operator found = *reinterpret_cast<const Operator*>(entry);
    executor->kept[i] = found;
    if (found.region != 0)
      executor->kept_region[i] = *reinterpret_cast<const Region*>(found.region);
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
  call->group_done = 1;
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
  // A step's tokens are done within microseconds, and the next of them brings a fence along. What
  // may take longer must not keep the answer of the task before.
  if (call->task.kind != kTaskAppend || call->task.block_count > 1) settle_answer(call);
  // Our copy of the region: it does not change while it is registered.
  if (call->op->region != 0) call->region = executor->kept_region + (call->op - executor->kept);
  executor->handler = reinterpret_cast<HandlerFunction>(call->op->function);
}

#if !defined(__CUDACC_RTC__)
static_assert(__builtin_offsetof(RingHeader, done_count) % 16 == 0, "stored with busy_ns");
static_assert(__builtin_offsetof(RingHeader, busy_ns) ==
                  __builtin_offsetof(RingHeader, done_count) + 8,
              "stored with done_count");
#endif

// Leader: an empty task's answer is one word, which needs no fence: the tasks before it had theirs,
// and its slot was read, or it would not be known to be empty. On a GPU its counters may be seen a
// moment later.
FUNCTION void answer_empty(const Executor* executor, uint64_t position) {
  const Call* call = &executor->call;
  Completion* completion =
      reinterpret_cast<Completion*>(call->completions) + (position & call->completion_mask);
  // pairs with the acquire in read_completion()
  store_settled(&completion->publish, (position + 1) | kEmptyAnswer);
  (void)CONCORDIA_STEP(3);
  store_settled(&executor->ring->head, executor->position);  // pairs with the acquire in claim()
}

// Leader: the words of the answers to the tasks at hand, from `position` on.
FUNCTION void put_answers(const Call* call, uint64_t position) {
  const uint64_t done = call->group_done;
  const uint64_t generation = call->op != nullptr ? call->op->generation : 0;
  for (uint64_t i = 0; i < done; ++i) {
    const uint64_t* hash = done > 1 ? call->group_hash[i] : call->payload_hash;
    const uint64_t sequence = done > 1 ? call->sequence - (done - 1 - i) : call->sequence;
    const uint64_t place = (position + i) & call->completion_mask;
    uint64_t* words =
        reinterpret_cast<uint64_t*>(reinterpret_cast<Completion*>(call->completions) + place);
    store<kRelaxed, kSystem>(words + 1, call->status | generation << 32);
    store_two(words + 2, {sequence, hash[0]});
    store_two(words + 4, {hash[1], call->result});
  }
}

// Leader: answers the tasks that were run, and gives their slots back, with the next fence: a
// record that follows brings one along.
FUNCTION void finish_task(Executor* executor) {
  RingHeader* ring = executor->ring;
  Call* call = &executor->call;
  settle_answer(call);
  const uint64_t position = executor->position, span = call->task.span, done = call->group_done;
  executor->position = position + (done > 1                                 ? done
                                   : span == 0 || span > executor->slot_mask ? 1
                                                                             : span);
  executor->busy_ns += now_ns() - executor->started_ns;
  executor->done_count += done;
  const bool is_empty = call->task.kind == kTaskNoop;
  if (!is_empty) put_answers(call, position);
  // The counters first: whoever has the answer finds it counted.
  store_two(&ring->done_count, {executor->done_count, executor->busy_ns});
  store<kRelaxed, kSystem>(&ring->appended_bytes, executor->journal.committed_bytes);
  if (is_empty) return answer_empty(executor, position);
  call->answer_first = position;
  call->answer_count = done;
  call->head_word = &ring->head;
  call->head_value = executor->position;
  if constexpr (!CONCORDIA_CUDA) settle_answer(call);
}

// Leader: what the ring says and does not change during a launch.
FUNCTION void read_ring(Executor* executor) {
  const RingHeader* ring = executor->ring;
  executor->lease_ns = load<kRelaxed, kSystem>(&ring->lease_ns);
  executor->idle_ns = load<kRelaxed, kSystem>(&ring->idle_ns);
  executor->slots = ring->slots;
  executor->slot_mask = ring->slot_count - 1;
  executor->call.completions = reinterpret_cast<uint8_t*>(ring->completions);
  executor->call.completion_mask = ring->completion_count - 1;
  executor->window = ring->arena_bytes / ring->slot_count;
  // A GPU's operators change only while nobody is inside.
  executor->generation = load<kAcquire, kSystem>(executor->table_generation);
  executor->fetched_ns = 0;  // what the launch before fetched and did not take is fetched again
  executor->fetched_from = executor->position + kFetchAhead;
}

// All lanes: one launch, from entering to leaving.
FUNCTION void run_executor(Executor* executor, uint64_t lane, uint64_t launch) {
  Call* call = &executor->call;
  const uint64_t entered_ns = now_ns();
  if (lane == 0) read_ring(executor);
  for (;;) {
    if (is_leading_team(lane)) {
      team_sync();
      const bool has_task = next_task(executor, lane, launch, entered_ns);
      if (lane == 0) {
        executor->has_task = has_task;
        if (has_task) start_task(executor);
      }
    }
    grid_sync(call);  // the leader's decision is released to all lanes
    if (!executor->has_task) return;
    const HandlerFunction handler = executor->handler;
    if (handler != nullptr) handler(call, lane);
    (void)CONCORDIA_STEP(4);
    // no lane is inside the handler any more, and none still reads what the leader changes next
    grid_sync(call);
    if (lane == 0) finish_task(executor);
  }
}
