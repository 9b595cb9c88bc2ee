// Stress of the ring and the CPU executor, to be built with ThreadSanitizer or AddressSanitizer.
//
// Checks: every task handed in runs exactly once, with the arguments that its producer gave, whatever laps, full rings, leaves, parks and
// swaps come in between; every answer is its own task's; nobody is woken by the bounded sleep instead of by the protocol (rescues are 0).
// The executor is made to leave at a task boundary, and to lose its core, between any two of its steps, by a generator with a given seed.
//
//   ring_stress TASKS SEED LANES SLOTS flood|turns   -> one line of JSON; exit 1 and a reason on the first broken promise
//
// flood: four producers fill the ring. turns: one producer that waits for each answer before the next task, and an executor that gives up
// at once: a task that nobody was woken for stays alone, so that the two looks at each other's word cannot be skipped unnoticed.
#include <stdint.h>

static bool step(int place);
#define CONCORDIA_STEP(place) step(place)
#include "host.cpp"

#include <stdio.h>

constexpr uint64_t kProducers = 4, kWindow = 256, kLaps = 8, kSwapEvery = 500;

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
};

static Random executor_random;  // leader's thread only
static __thread bool is_leader;
static uint64_t leave_count, yield_count;
static bool is_calm;  // turns: the executor is never forced out, it only dawdles on its way

static void fail(const char* reason, uint64_t a, uint64_t b) {
  fprintf(stderr, "ring_stress: %s (%lu, %lu)\n", reason, a, b);
  _Exit(1);
}

static bool step(int place) {
  if (place == 2) is_leader = true;  // only the leader polls
  if (is_calm) {
    if (place != 0) return false;
    // On the doorstep: the producer has seen "inside", and only the second look can find what it publishes now.
    const uint64_t until_ns = now_ns() + executor_random.next() % 2000;
    while (now_ns() < until_ns) {
    }
    return false;
  }
  if (!is_leader) return false;
  const uint64_t dice = executor_random.next();
  if (dice % 128 == 1) {
    yield_count += 1;
    sched_yield();
  }
  if (dice % 4096 == 2) {  // long enough for every producer to run into "left", or into a full ring
    const struct timespec nap = {0, 20000};
    nanosleep(&nap, nullptr);
  }
  const bool leaves = place == 2 && dice % 32 == 3;
  leave_count += leaves;
  return leaves;
}

// What task `id` carries: any part of it can be made again from the id.
static uint64_t mixed(uint64_t id, uint64_t salt) { return Random{id * 0x2545f4914f6cdd1dull + salt}.next(); }
static uint64_t id_count_of(uint64_t id) { return mixed(id, 1) % 5; }
static uint64_t payload_bytes_of(uint64_t id) { return mixed(id, 2) % 8 == 0 ? mixed(id, 3) % (3 * kWindow) : 0; }

static uint8_t* run_count;  // per task; lane 0 writes

struct Swap {
  alignas(64) Operator op;
  uint64_t is_retired;  // plain on purpose: the acknowledgement must order it
};
static Swap swaps[2];

static void check_task(Call* call, uint64_t lane) {
  const Task* task = &call->task;
  const uint64_t id = task->arg;
  if (lane != 0) return;
  const Swap* swap = reinterpret_cast<const Swap*>(call->op->handler_hash);
  if (swap->is_retired) fail("an operator ran after its successor was acknowledged", id, call->op->generation);
  if (task->incarnation != mixed(id, 4) || task->block_count != id_count_of(id)) fail("a slot of another task", id, task->block_count);
  const uint32_t* ids = reinterpret_cast<const uint32_t*>(call->arena + task->blocks);
  for (uint64_t i = 0; i < task->block_count; ++i)
    if (ids[i] != (uint32_t)(id + i)) fail("arguments of another task", id, ids[i]);
  const uint64_t bytes = payload_bytes_of(id);
  if (bytes != 0) {
    const uint8_t* payload = reinterpret_cast<const uint8_t*>(task->source);
    if (task->source_bytes != bytes) fail("length of another payload", id, task->source_bytes);
    for (uint64_t i = 0; i < bytes; ++i)
      if (payload[i] != (uint8_t)(id + i)) fail("payload of another task", id, i);
  }
  if (run_count[id]++ != 0) fail("a task ran twice", id, run_count[id]);
  call->result = mixed(id, 5);
}

struct Producer {
  RingHeader* ring;
  Host* host;
  uint64_t first, end;
  uint64_t full_count, forgotten_count;
  bool takes_turns;
  uint64_t pause_ns, launches;
};

static void expect_answer(Producer* mine, uint64_t position, uint64_t id) {
  Completion found;
  const int said = concordia_wait(mine->ring, position, 60ull * 1000000000u, &found);
  if (said == kPending) fail("a task was never done", id, position);
  if (said == kForgotten) mine->forgotten_count += 1;
  else if (found.status != kStatusOk || found.result != mixed(id, 5)) fail("the answer of another task", id, found.result);
}

// Spins for the answer, then pauses until about the moment at which the executor leaves: longer when it was still inside at the last
// submission, shorter when it had left, with some jitter. So both sides cross that moment together most of the time.
static void take_turn(Producer* mine, uint64_t position, uint64_t id) {
  Completion found;
  for (uint64_t spins = 0; concordia_read(mine->ring, position, &found) == kPending && spins < 20000; ++spins) pause_lane();
  expect_answer(mine, position, id);
  const uint64_t launches = concordia_load(&mine->ring->launched);
  if (launches == mine->launches) mine->pause_ns += 20;
  else if (mine->pause_ns > 40) mine->pause_ns -= 20;
  mine->launches = launches;
  const uint64_t until_ns = now_ns() + mine->pause_ns + mixed(id, 6) % 100;
  while (now_ns() < until_ns) {
  }
}

static void* produce(void* argument) {
  Producer* mine = static_cast<Producer*>(argument);
  uint8_t payload[3 * kWindow];
  uint32_t ids[8];
  for (uint64_t id = mine->first; id < mine->end; ++id) {
    Task task = {};
    task.opcode = 1;
    task.kind = kTaskCheckpoint;
    task.incarnation = mixed(id, 4);
    task.arg = id;
    const uint64_t id_count = id_count_of(id), bytes = payload_bytes_of(id);
    for (uint64_t i = 0; i < id_count; ++i) ids[i] = (uint32_t)(id + i);
    for (uint64_t i = 0; i < bytes; ++i) payload[i] = (uint8_t)(id + i);
    uint64_t position;
    for (;;) {
      const int said = concordia_submit(mine->ring, mine->host, &task, ids, id_count, bytes ? payload : nullptr, bytes, &position);
      if (said == kSubmitted) break;
      if (said != kRefusedFull) fail("a task was refused", id, said);
      mine->full_count += 1;
      sched_yield();
    }
    if (mine->takes_turns) take_turn(mine, position, id);
    else if (id % 997 == 0) expect_answer(mine, position, id);
  }
  return nullptr;
}

static bool is_done;  // under no lock: read and written with atomics

// Swaps the operator's code back and forth, and parks the executor now and then, while tasks flow.
static void* disturb(void* argument) {
  Producer* shared = static_cast<Producer*>(argument);
  uint64_t generation = 1, parks = 0;
  while (!__atomic_load_n(&is_done, __ATOMIC_ACQUIRE)) {
    Swap* next = &swaps[++generation % 2];
    next->is_retired = 0;
    next->op.generation = (uint32_t)generation;
    concordia_publish_operator(shared->ring, 1, reinterpret_cast<uint64_t>(&next->op), generation);
    while (concordia_load(&shared->ring->generation_seen) < generation && !__atomic_load_n(&is_done, __ATOMIC_ACQUIRE)) sched_yield();
    if (concordia_load(&shared->ring->generation_seen) >= generation) swaps[(generation + 1) % 2].is_retired = 1;
    if (generation % 4 == 0) {
      if (!concordia_park(shared->host, 60ull * 1000000000u)) fail("the executor did not park", generation, parks);
      const uint64_t head = concordia_load(&shared->ring->head);
      sched_yield();
      if (concordia_load(&shared->ring->head) != head) fail("a task ran while parked", head, generation);
      concordia_unpark(shared->host);
      parks += 1;
    }
    const struct timespec nap = {0, 200000};
    nanosleep(&nap, nullptr);
  }
  shared->full_count = generation;
  shared->forgotten_count = parks;
  return nullptr;
}

int main(int count, char** words) {
  if (count != 6) return 2;
  const bool takes_turns = strcmp(words[5], "turns") == 0;
  const uint64_t tasks = strtoull(words[1], nullptr, 10), seed = strtoull(words[2], nullptr, 10);
  const uint64_t lanes = strtoull(words[3], nullptr, 10), slots = strtoull(words[4], nullptr, 10);
  executor_random = {seed};
  is_calm = takes_turns;
  run_count = static_cast<uint8_t*>(calloc(tasks, 1));
  uint64_t* operators = static_cast<uint64_t*>(calloc(kOperatorCapacity, 8));
  RingHeader* ring = static_cast<RingHeader*>(aligned_alloc(128, sizeof(RingHeader)));
  memset(ring, 0, sizeof(*ring));
  ring->slot_count = slots;
  ring->completion_count = slots * kLaps;
  ring->slots = reinterpret_cast<uint64_t>(aligned_alloc(128, slots * sizeof(Task)));
  memset(reinterpret_cast<void*>(ring->slots), 0, slots * sizeof(Task));
  ring->completions = reinterpret_cast<uint64_t>(aligned_alloc(128, slots * kLaps * sizeof(Completion)));
  memset(reinterpret_cast<void*>(ring->completions), 0, slots * kLaps * sizeof(Completion));
  ring->arena_bytes = slots * kWindow;
  ring->arena = reinterpret_cast<uint64_t>(aligned_alloc(128, ring->arena_bytes));
  ring->lease_ns = 2000000;
  ring->idle_ns = takes_turns ? 1000 : 20000;
  ring->operators = reinterpret_cast<uint64_t>(operators);
  for (Swap& swap : swaps) {
    swap.op.function = reinterpret_cast<uint64_t>(check_task);
    swap.op.handler_hash = reinterpret_cast<uint64_t>(&swap);  // the way back: a task sees copies of operator and region
  }
  swaps[1].op.generation = 1;
  concordia_publish_operator(ring, 1, reinterpret_cast<uint64_t>(&swaps[1].op), 1);

  ExecutorPlan plan = {};
  plan.ring = reinterpret_cast<uint64_t>(ring);
  plan.lanes = lanes;
  const uint64_t started_ns = now_ns();
  Host* host = concordia_open(&plan);
  if (host == nullptr) fail("no executor", lanes, 0);
  Producer producers[kProducers];
  pthread_t threads[kProducers], disturber;
  Producer shared = {ring, host, 0, 0, 0, 0, false, 0, 0};
  if (!takes_turns) pthread_create(&disturber, nullptr, disturb, &shared);
  const uint64_t producer_count = takes_turns ? 1 : kProducers;
  for (uint64_t i = 0; i < producer_count; ++i) {
    producers[i] = {ring, host, tasks * i / producer_count, tasks * (i + 1) / producer_count, 0, 0, takes_turns, 0, 0};
    pthread_create(&threads[i], nullptr, produce, &producers[i]);
  }
  uint64_t full = 0, forgotten = 0;
  for (uint64_t i = 0; i < producer_count; ++i) {
    pthread_join(threads[i], nullptr);
    full += producers[i].full_count;
    forgotten += producers[i].forgotten_count;
  }
  Task last = {};
  uint64_t position;
  Completion found;
  while (concordia_submit(ring, host, &last, nullptr, 0, nullptr, 0, &position) != kSubmitted) sched_yield();
  if (concordia_wait(ring, position, 60ull * 1000000000u, &found) != kDone) fail("the last task was never done", position, 0);
  const double seconds = (double)(now_ns() - started_ns) / 1e9;
  __atomic_store_n(&is_done, true, __ATOMIC_RELEASE);
  if (!takes_turns) pthread_join(disturber, nullptr);
  const uint64_t rescues = concordia_rescues(host), launches = ring->launched, positions = position;
  if (!concordia_close(host, 60ull * 1000000000u)) fail("the executor did not end", 0, 0);
  for (uint64_t id = 0; id < tasks; ++id)
    if (run_count[id] != 1) fail("a task did not run once", id, run_count[id]);
  if (rescues != 0) fail("work waited for nobody", rescues, launches);
  printf("{\"tasks\": %lu, \"seed\": %lu, \"lanes\": %lu, \"slots\": %lu, \"seconds\": %.2f, \"laps\": %lu, \"full\": %lu, \"launches\": %lu, "
         "\"forced_leaves\": %lu, \"yields\": %lu, \"swaps\": %lu, \"parks\": %lu, \"forgotten\": %lu}\n",
         tasks, seed, lanes, slots, seconds, positions / slots, full, launches, leave_count, yield_count, shared.full_count,
         shared.forgotten_count, forgotten);
  free(run_count);
  free(operators);
  free(reinterpret_cast<void*>(ring->slots));
  free(reinterpret_cast<void*>(ring->completions));
  free(reinterpret_cast<void*>(ring->arena));
  free(ring);
  return 0;
}
