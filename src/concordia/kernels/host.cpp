// What Python calls: submission, completions, control words, and the executor of the CPU device.
//
// Owns: the threads of the CPU executor, their sleep and their launches. Promises: calls named
// concordia_* take plain words, check what they are given and never throw; nothing here waits
// without a bound. A GPU device uses the submitting half only and launches by itself. Called
// through ctypes by device/host.py and runtime/ring.py. Does not know handlers or regions.
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>

#include "executor.h"

// Everything an executor is made of; filled by Python, the same for a GPU, where the addresses are
// the device's.
struct ExecutorPlan {
  uint64_t ring;
  uint64_t pool, pool_bytes, segment_bytes, control;
  uint64_t stage, stage_bytes, ids, digests, digest_bytes;
  uint64_t lanes;
};

struct Host {
  RingHeader* ring;
  Executor* executor;
  uint64_t lanes;
  pthread_mutex_t mutex;
  pthread_cond_t launched, returned;
  uint64_t return_count;  // lanes that came back from a launch, ever
  uint64_t park_depth;
  // work found without an executor by the bounded sleep: the leave protocol failed
  uint64_t rescue_count;
  bool is_closing;
  pthread_t* threads;
};

struct Lane {
  Host* host;
  uint64_t lane;
};

// an idle lane looks this often, although it is woken for every launch
constexpr uint64_t kSleepNs = 100000000;
// a waiter spins this long before it sleeps: most tasks are done by then
constexpr uint64_t kSpinNs = 20000;

static struct timespec at_ns(uint64_t ns) {
  return {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
}

static uint64_t launched_of(const Host* host) {
  return load<kAcquire, kSystem>(&host->ring->launched);
}

// Under the mutex: sends the executor in, unless it is in, or parked.
static void launch_locked(Host* host) {
  if (load<kRelaxed, kSystem>(&host->ring->stop) != 0 ||
      load_full(&host->ring->left) != launched_of(host))
    return;
  store<kRelease, kSystem>(&host->ring->launched, launched_of(host) + 1);
  pthread_cond_broadcast(&host->launched);
}

static void launch(Host* host) {
  pthread_mutex_lock(&host->mutex);
  launch_locked(host);
  pthread_mutex_unlock(&host->mutex);
}

// Sleeps until there is a launch that this lane has not run; 0 when there will be none.
static uint64_t next_launch(Host* host, uint64_t lane, uint64_t last) {
  pthread_mutex_lock(&host->mutex);
  while (launched_of(host) == last && !host->is_closing) {
    const struct timespec until = at_ns(now_ns() + kSleepNs);
    if (pthread_cond_timedwait(&host->launched, &host->mutex, &until) != ETIMEDOUT || lane != 0)
      continue;
    if (load<kRelaxed, kSystem>(&host->ring->stop) == 0 && needs_launch(host->ring)) {
      host->rescue_count += 1;
      launch_locked(host);
    }
  }
  const uint64_t found = launched_of(host);
  pthread_mutex_unlock(&host->mutex);
  return found == last ? 0 : found;
}

static void* run_lane(void* argument) {
  const Lane mine = *static_cast<Lane*>(argument);
  free(argument);
  Host* host = mine.host;
  uint64_t last = 0;
  for (;;) {
    const uint64_t now = next_launch(host, mine.lane, last);
    if (now == 0) return nullptr;
    last = now;
    // all lanes are out of the launch before: a GPU's stream order gives the same
    grid_sync(&host->executor->call);
    run_executor(host->executor, mine.lane, last);
    pthread_mutex_lock(&host->mutex);
    host->return_count += 1;
    pthread_cond_broadcast(&host->returned);
    pthread_mutex_unlock(&host->mutex);
    // The lease may have ended with work waiting, and no producer will look again.
    if (mine.lane == 0 && needs_launch(host->ring)) launch(host);
  }
}

static void fill_executor(Executor* executor, const ExecutorPlan* plan) {
  memset(static_cast<void*>(executor), 0, sizeof(*executor));
  executor->ring = reinterpret_cast<RingHeader*>(plan->ring);
  executor->table_generation = &executor->ring->generation;
  Journal* journal = &executor->journal;
  journal->pool = reinterpret_cast<uint8_t*>(plan->pool);
  journal->pool_bytes = plan->pool_bytes;
  journal->segment_bytes = plan->segment_bytes;
  journal->offset = plan->segment_bytes;
  journal->control = reinterpret_cast<StreamControl*>(plan->control);
  Call* call = &executor->call;
  call->arena = reinterpret_cast<const uint8_t*>(executor->ring->arena);
  call->arena_bytes = executor->ring->arena_bytes;
  call->journal = journal;
  call->stage = reinterpret_cast<uint8_t*>(plan->stage);
  call->stage_bytes = plan->stage_bytes;
  call->ids = reinterpret_cast<uint32_t*>(plan->ids);
  call->id_capacity = plan->stage_bytes / kLeafBytes * kIdsPerLeaf;
  call->digests = reinterpret_cast<uint8_t*>(plan->digests);
  call->digest_bytes = plan->digest_bytes;
  call->lanes = plan->lanes;
}

// Every processor that some thread of this process may use. An engine binds the thread that opens
// us to one core, and its compute threads to one each: lanes that inherited that would share a core
// with the work that they protect.
static cpu_set_t usable_processors() {
  cpu_set_t all, one;
  CPU_ZERO(&all);
  DIR* tasks = opendir("/proc/self/task");
  while (const struct dirent* entry = tasks != nullptr ? readdir(tasks) : nullptr)
    if (sched_getaffinity(atoi(entry->d_name), sizeof(one), &one) == 0 && entry->d_name[0] != '.')
      CPU_OR(&all, &all, &one);
  if (tasks != nullptr) closedir(tasks);
  return all;
}

static bool start_lanes(Host* host) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the process's own threads
  const cpu_set_t processors = usable_processors();
  uint64_t started = 0;
  for (; started < host->lanes; ++started) {
    Lane* lane = static_cast<Lane*>(malloc(sizeof(Lane)));
    if (lane == nullptr) break;
    *lane = {host, started};
    if (pthread_create(&host->threads[started], nullptr, run_lane, lane) == 0) {
      // Only a wish: where it fails, or finds no processor, the lane stays where it was started.
      (void)pthread_setaffinity_np(host->threads[started], sizeof(processors), &processors);
      continue;
    }
    free(lane);
    break;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (started == host->lanes) return true;
  pthread_mutex_lock(&host->mutex);
  host->is_closing = true;
  pthread_cond_broadcast(&host->launched);
  pthread_mutex_unlock(&host->mutex);
  for (uint64_t i = 0; i < started; ++i) pthread_join(host->threads[i], nullptr);
  return false;
}

static void free_host(Host* host) {
  pthread_cond_destroy(&host->launched);
  pthread_cond_destroy(&host->returned);
  pthread_mutex_destroy(&host->mutex);
  free(host->threads);
  free(host->executor);
  free(host);
}

EXPORT uint64_t concordia_abi() { return kAbiVersion; }

EXPORT uint64_t concordia_executor_bytes() { return sizeof(Executor); }

// An executor as it starts, to be copied to `target`, where it will run. The ring of the plan must
// be filled in already.
EXPORT void concordia_executor_image(void* image_ptr, const ExecutorPlan* plan, uint64_t target) {
  Executor* executor = static_cast<Executor*>(image_ptr);
  fill_executor(executor, plan);
  executor->call.journal = reinterpret_cast<Journal*>(target + offsetof(Executor, journal));
}

// Starts the CPU executor; null when the system refuses memory or a thread.
EXPORT Host* concordia_open(const ExecutorPlan* plan) {
  Host* host = static_cast<Host*>(calloc(1, sizeof(Host)));
  if (host == nullptr) return nullptr;
  host->ring = reinterpret_cast<RingHeader*>(plan->ring);
  host->lanes = plan->lanes;
  host->executor = static_cast<Executor*>(
      aligned_alloc(alignof(Executor), align_up(sizeof(Executor), alignof(Executor))));
  host->threads = static_cast<pthread_t*>(calloc(plan->lanes, sizeof(pthread_t)));
  pthread_condattr_t monotonic;
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_mutex_init(&host->mutex, nullptr);
  pthread_cond_init(&host->launched, &monotonic);
  pthread_cond_init(&host->returned, &monotonic);
  pthread_condattr_destroy(&monotonic);
  if (host->executor != nullptr && host->threads != nullptr) {
    fill_executor(host->executor, plan);
    if (start_lanes(host)) return host;
  }
  free_host(host);
  return nullptr;
}

// Asks the executor to leave and waits until every lane is out; false when it did not within the
// bound, and then it is not parked.
EXPORT bool concordia_park(Host* host, uint64_t timeout_ns) {
  const struct timespec until = at_ns(now_ns() + timeout_ns);
  pthread_mutex_lock(&host->mutex);
  host->park_depth += 1;
  store<kRelease, kSystem>(&host->ring->stop, 1);
  int waited = 0;
  // Not ring->left: the executor may still take that word back.
  while (host->return_count != launched_of(host) * host->lanes && waited != ETIMEDOUT)
    waited = pthread_cond_timedwait(&host->returned, &host->mutex, &until);
  const bool is_parked = host->return_count == launched_of(host) * host->lanes;
  if (!is_parked && --host->park_depth == 0) store<kRelease, kSystem>(&host->ring->stop, 0);
  pthread_mutex_unlock(&host->mutex);
  return is_parked;
}

EXPORT void concordia_unpark(Host* host) {
  pthread_mutex_lock(&host->mutex);
  if (host->park_depth > 0 && --host->park_depth == 0) {
    store<kRelease, kSystem>(&host->ring->stop, 0);
    if (needs_launch(host->ring)) launch_locked(host);
  }
  pthread_mutex_unlock(&host->mutex);
}

// Ends the threads. False when they did not leave within the bound; then nothing is freed, for they
// may still run.
EXPORT bool concordia_close(Host* host, uint64_t timeout_ns) {
  if (!concordia_park(host, timeout_ns)) return false;
  pthread_mutex_lock(&host->mutex);
  host->is_closing = true;
  pthread_cond_broadcast(&host->launched);
  pthread_mutex_unlock(&host->mutex);
  for (uint64_t i = 0; i < host->lanes; ++i) pthread_join(host->threads[i], nullptr);
  free_host(host);
  return true;
}

EXPORT uint64_t concordia_rescues(Host* host) {
  pthread_mutex_lock(&host->mutex);
  const uint64_t count = host->rescue_count;
  pthread_mutex_unlock(&host->mutex);
  return count;
}

// Hands in a task. With a host it is launched here; without one, kSubmittedNeedsLaunch is the
// caller's to act on.
EXPORT int concordia_submit(RingHeader* ring, Host* host, const Task* task, const void* ids_ptr,
                            uint64_t id_count, const void* payload_ptr, uint64_t payload_bytes,
                            uint64_t* position_ptr) {
  const int submitted =
      submit(ring, task, {ids_ptr, id_count, payload_ptr, payload_bytes}, position_ptr);
  if (submitted != kSubmittedNeedsLaunch || host == nullptr) return submitted;
  launch(host);
  return kSubmitted;
}

// Hands in tasks one after the other, each with as many of the ids as its block_count says, until
// one is refused; *count_ptr says how many were accepted. One launch at the end is enough for all.
EXPORT int concordia_submit_many(RingHeader* ring, Host* host, const Task* tasks,
                                 const uint32_t* ids, uint64_t count, uint64_t* positions,
                                 uint64_t* count_ptr) {
  bool needs_launch = false;
  int said = kSubmitted;
  uint64_t done = 0;
  for (; done < count; ++done) {
    const uint64_t id_count = tasks[done].block_count;
    said = submit(ring, tasks + done, {ids, id_count, nullptr, 0}, positions + done);
    if (said != kSubmitted && said != kSubmittedNeedsLaunch) break;
    needs_launch |= said == kSubmittedNeedsLaunch;
    ids += id_count;
  }
  *count_ptr = done;
  if (needs_launch && host == nullptr) return kSubmittedNeedsLaunch;
  if (needs_launch) launch(host);
  return done < count ? said : kSubmitted;
}

EXPORT int concordia_read(const RingHeader* ring, uint64_t position, Completion* found_ptr) {
  return read_completion(ring, position, found_ptr);
}

// Waits for a completion: a short spin, then naps that grow, because the executor does not signal
// (a GPU cannot).
EXPORT int concordia_wait(const RingHeader* ring, uint64_t position, uint64_t timeout_ns,
                          Completion* found_ptr) {
  const uint64_t started_ns = now_ns();
  uint64_t nap_ns = 10000;
  for (;;) {
    const int found = read_completion(ring, position, found_ptr);
    const uint64_t waited_ns = now_ns() - started_ns;
    if (found != kPending || waited_ns >= timeout_ns) return found;
    if (waited_ns < kSpinNs) {
      pause_lane();
      continue;
    }
    const struct timespec nap = at_ns(smaller(nap_ns, timeout_ns - waited_ns));
    nanosleep(&nap, nullptr);
    nap_ns = smaller(nap_ns * 2, 500000);
  }
}

EXPORT bool concordia_needs_launch(const RingHeader* ring) { return needs_launch(ring); }

EXPORT uint64_t concordia_load(const uint64_t* word_ptr) {
  return load<kAcquire, kSystem>(word_ptr);
}

EXPORT void concordia_store(uint64_t* word_ptr, uint64_t value) {
  store<kRelease, kSystem>(word_ptr, value);
}

// The table entry first, then the generation: an executor that acknowledges the generation has the
// new operator.
EXPORT void concordia_publish_operator(RingHeader* ring, uint64_t opcode, uint64_t operator_address,
                                       uint64_t generation) {
  if (opcode >= kOperatorCapacity) return;
  store<kRelease, kSystem>(reinterpret_cast<uint64_t*>(ring->operators) + opcode, operator_address);
  store<kRelease, kSystem>(&ring->generation, generation);
}

// How a GPU's executor is sent in: the driver's own functions, and what it gives to each launch.
struct Relaunch {
  int (*query)(void* stream);
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream,
                void** arguments, void** extra);
  void *function, *stream;
  void** arguments;
  uint64_t* launch_number;  // what arguments name the launch by
  uint64_t ctas, threads;
};
constexpr int kDriverNotReady = 600;  // CUDA_ERROR_NOT_READY
constexpr int kStillInside = -1;
constexpr uint64_t kDriverParkNs = 1000000000;  // a resident executor's lease

// `stop` of a GPU's ring is two words: the low one is whether somebody of ours parks the executor,
// the high one counts calls of the framework that wait for the whole GPU. The kernel reads both as
// one, so it leaves for either.
static uint32_t* stop_word(RingHeader* ring, int is_high) {
  return reinterpret_cast<uint32_t*>(&ring->stop) + is_high;
}

EXPORT void concordia_store_stop(RingHeader* ring, uint64_t value) {
  __atomic_store_n(stop_word(ring, 0), (uint32_t)value, __ATOMIC_RELEASE);
}

// Told of such a call by the shim (native/park.c), in the thread that makes it: no interpreter takes
// part. Waits until nobody is inside; an executor that does not leave within the bound makes the
// call late by its lease, as without us.
EXPORT void concordia_driver_park(void* context) {
  RingHeader* ring = static_cast<RingHeader*>(context);
  const uint64_t started_ns = now_ns();
  __atomic_fetch_add(stop_word(ring, 1), 1, __ATOMIC_ACQ_REL);
  while (load<kAcquire, kSystem>(&ring->left) != load<kAcquire, kSystem>(&ring->launched) &&
         now_ns() - started_ns < kDriverParkNs)
    pause_lane();
}

// It is sent in again by its keeper.
EXPORT void concordia_driver_unpark(void* context) {
  __atomic_fetch_sub(stop_word(static_cast<RingHeader*>(context), 1), 1, __ATOMIC_ACQ_REL);
}

// Between two stays of a GPU's executor: asks it to leave, publishes the operator once its stream
// is empty, sends it in again where work waits, or in any case (`stays`). Under the lock of whoever
// launches it, which is why it only spins, for `timeout_ns`. 0, a status of the driver, or
// kStillInside: then nothing was published.
EXPORT int concordia_swap_operator(RingHeader* ring, uint64_t opcode, uint64_t operator_address,
                                   uint64_t generation, const Relaunch* relaunch, bool stays,
                                   uint64_t timeout_ns) {
  const uint64_t started_ns = now_ns();
  concordia_store_stop(ring, 1);
  int status = relaunch->query(relaunch->stream);
  while (status == kDriverNotReady && now_ns() - started_ns < timeout_ns) {
    pause_lane();
    status = relaunch->query(relaunch->stream);
  }
  if (status == 0) concordia_publish_operator(ring, opcode, operator_address, generation);
  concordia_store_stop(ring, 0);
  if (status != 0) return status == kDriverNotReady ? kStillInside : status;
  const uint64_t launched = load<kAcquire, kSystem>(&ring->launched);
  const bool is_out = load_full(&ring->left) == launched;
  if (!is_out || !(stays || needs_launch(ring))) return 0;
  // the count first: the kernel may be over before the call that launched it is
  store<kRelease, kSystem>(&ring->launched, launched + 1);
  *relaunch->launch_number = launched + 1;
  return relaunch->launch(relaunch->function, (unsigned)relaunch->ctas, 1, 1,
                          (unsigned)relaunch->threads, 1, 1, 0, relaunch->stream,
                          relaunch->arguments, nullptr);
}

// Host words of a stream's control page, for the detector: details first, then the word that it
// polls.
EXPORT void concordia_announce_step(StreamControl* control, uint64_t step, uint64_t tokens) {
  store<kRelaxed, kSystem>(&control->step_tokens, tokens);
  store<kRelaxed, kSystem>(&control->step_started_ns, now_ns());
  store<kRelease, kSystem>(&control->step_started, step);
}

EXPORT void concordia_step_done(StreamControl* control, uint64_t step) {
  store<kRelaxed, kSystem>(&control->step_done_ns, now_ns());
  store<kRelease, kSystem>(&control->step_done, step);
}

EXPORT void concordia_heartbeat(StreamControl* control, uint64_t waiting_count) {
  store<kRelaxed, kSystem>(&control->waiting_count, waiting_count);
  store<kRelease, kSystem>(&control->heartbeat_ns, now_ns());
}

EXPORT void concordia_count_unprotected(StreamControl* control, uint64_t count) {
  // One host thread at a time writes this line, so load and store suffice; an add keeps it right if
  // two ever meet.
  __atomic_fetch_add(&control->unprotected_count, count, __ATOMIC_RELEASE);
}

// The payload hash of `bytes` bytes, for readers: leaf digests go into `digests_ptr`, which has room
// for root_bytes(leaf_count(bytes)).
EXPORT void concordia_hash_payload(const uint8_t* data_ptr, uint64_t bytes, uint8_t* digests_ptr,
                                   uint64_t* hash_ptr) {
  Call call = {};
  call.lanes = 1;
  call.digests = digests_ptr;
  hash_payload(&call, 0, data_ptr, bytes);
  hash_ptr[0] = call.payload_hash[0];
  hash_ptr[1] = call.payload_hash[1];
}

// A payload that a reader is about to rely on, and the hash that it was committed with.
struct Promised {
  const uint8_t* data_ptr;
  uint64_t bytes;
  uint64_t hash[2];
};

// How many of these payloads are, from the first on, what was promised; the hash of the one that is
// not goes to `hash_ptr`. One call for many: between two calls a reader would wait for the
// interpreter's lock, which an engine's own thread holds for milliseconds.
EXPORT uint64_t concordia_verify_payloads(const Promised* promised, uint64_t count,
                                          uint8_t* digests_ptr, uint64_t* hash_ptr) {
  for (uint64_t index = 0; index < count; ++index) {
    const Promised* one = &promised[index];
    concordia_hash_payload(one->data_ptr, one->bytes, digests_ptr, hash_ptr);
    if (hash_ptr[0] != one->hash[0] || hash_ptr[1] != one->hash[1]) return index;
  }
  return count;
}
