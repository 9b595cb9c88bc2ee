// The executor as GPU kernels: a stay of its own, and a visit in a stream of the framework.
//
// Owns: where the executor's state lies meanwhile, and whose turn it is. Promises: one CTA works on
// a copy in shared memory (what one lane does alone is a chain of small reads, eight times quicker
// there) and puts it back before it ends; several CTAs share the state in device memory; of those
// that take turns only one at a time is inside, whatever streams they come in. GPU only. Launched
// by device/launches.py and device/stream_launch.py. Does not know tasks.
#include "executor.h"

// The executor's own launch has a lease of 2 ms: a place waits for it ten times as long, and then
// lets the framework's stream go on. What it was handed runs at the next place.
constexpr uint64_t kTurnWaitNs = 20000000;
constexpr uint64_t kStateWords = sizeof(Executor) / 8, kJournalWords = sizeof(Journal) / 8;
static_assert(sizeof(Executor) % 8 == 0 && sizeof(Executor) <= 16384,
              "the state is copied in words and leaves room for a neighbour");
static_assert(sizeof(Journal) % 8 == 0, "the journal's place is copied in words");

FUNCTION void copy_words(void* target_ptr, const void* source_ptr, uint64_t count) {
  for (uint64_t i = threadIdx.x; i < count; i += blockDim.x)
    static_cast<uint64_t*>(target_ptr)[i] = static_cast<const uint64_t*>(source_ptr)[i];
}

// One lane. Whoever has the turn is running and leaves by its lease: the wait is as long as that.
FUNCTION void take_turn(uint64_t* turn_ptr) {
  while (exchange_device(turn_ptr, 1) != 0) pause_lane();  // pairs with give_turn's release
}
// The same with a bound, for a stream that is not ours: a handler may hang. False without a turn.
FUNCTION bool try_turn(uint64_t* turn_ptr) {
  const uint64_t since_ns = now_ns();
  while (exchange_device(turn_ptr, 1) != 0) {  // pairs with give_turn's release
    if (now_ns() - since_ns > kTurnWaitNs) return false;
    pause_lane();
  }
  return true;
}
FUNCTION void give_turn(uint64_t* turn_ptr) { store<kRelease, kDevice>(turn_ptr, 0); }

// One CTA: a stay on a copy in shared memory, which continues the journal at `journal`.
FUNCTION void run_near(Executor* executor, Journal* journal, const uint64_t* table_generation,
                       uint64_t* state, uint64_t launch) {
  Executor* near = reinterpret_cast<Executor*>(state);
  const bool is_own = journal == &executor->journal;
  copy_words(near, executor, kStateWords);
  __syncthreads();
  if (!is_own) copy_words(&near->journal, journal, kJournalWords);
  if (threadIdx.x == 0) {
    near->call.journal = &near->journal;
    near->table_generation = table_generation;
  }
  __syncthreads();
  run_executor(near, threadIdx.x, launch);
  __syncthreads();
  if (!is_own) copy_words(journal, &near->journal, kJournalWords);
  if (threadIdx.x == 0) near->call.journal = journal;
  __syncthreads();
  copy_words(executor, near, kStateWords);
  __syncthreads();
}

// `launch` is the number that ring->launched was raised to for it. `turn`: null where nothing but
// these launches, which are in stream order, ever runs the executor's tasks.
extern "C" __global__ void __launch_bounds__(512)
    concordia_executor(Executor* executor, uint64_t launch, uint64_t* turn) {
  alignas(128) __shared__ uint64_t state[kStateWords];
  const uint64_t lane = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
  // Other CTAs wait for the leading one at the first grid_sync; nobody else uses that barrier.
  if (lane == 0 && turn != nullptr) take_turn(turn);
  __syncthreads();
  if (gridDim.x == 1)
    run_near(executor, &executor->journal, &executor->ring->generation, state, launch);
  else
    run_executor(executor, lane, launch);
  if (lane == 0 && turn != nullptr) give_turn(turn);
}

// One CTA, as work of a stream or as a node of a graph: runs the tasks of a ring of its own, with
// `tasks` as its state, and appends for `executor`, of which it needs the journal only.
//   bell[0]: how often tasks were handed in, as the stream has it by now: gates hold back the rest
//   bell[1]: up to where they were served
extern "C" __global__ void __launch_bounds__(512)
    concordia_stream_tasks(Executor* tasks, Executor* executor, uint64_t* bell, uint64_t* turn) {
  alignas(128) __shared__ uint64_t state[kStateWords];
  __shared__ uint64_t launch;
  if (threadIdx.x == 0) {
    launch = load<kAcquire, kSystem>(bell);
    if (launch == load<kRelaxed, kDevice>(bell + 1) ||
        load<kRelaxed, kSystem>(&tasks->ring->stop) != 0 || !try_turn(turn))
      launch = 0;
  }
  __syncthreads();
  if (launch == 0) return;  // a replay for which nothing was handed in costs one look
  run_near(tasks, &executor->journal, &executor->ring->generation, state, launch);
  if (threadIdx.x != 0) return;
  // Whom the lease cut short goes on when the graph is replayed next, rung for or not.
  const Task* next = slot_of(tasks, tasks->position);
  const bool is_closed = next->kind == kTaskGate && next->arg > launch;
  if (is_closed || !is_published(tasks->ring, tasks->position))
    store<kRelaxed, kDevice>(bell + 1, launch);
  give_turn(turn);
}
