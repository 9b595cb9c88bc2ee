// The gate before launches: a pause brings the GPU to a kernel boundary and holds what comes next.
//
// Owns: who may launch. Promises: a pause returns once every launch that passed the gate is done on
// the GPU, or, at its bound, opens the gate again and says what it waited for; a launch is held for
// a bounded time, then all go on, loudly; the thread that paused is never held, nor is a launch
// that is only captured. Nobody waits for a stream that is being captured. Exports concordia_pause,
// concordia_resume, concordia_is_paused. Called by gate_page.c and by programs; observes launches.
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

enum { OPEN = 0, CLOSED = 1 };
#define SHARDS 16  // threads that launch at the same time do not share a line, most of the time
#define LOOK_NS 20000

struct shard {
  _Alignas(64) _Atomic int64_t inside;
};

static _Atomic uint32_t gate;        // OPEN or CLOSED; a futex
static _Atomic int pauser;           // thread that is never held; 0: none
static struct shard shards[SHARDS];  // launches between the gate and the driver's answer
static _Atomic uint64_t held;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // one pauses at a time
static struct gate_report last;

void gate_forked(void) {
  pthread_mutex_init(&lock, NULL);
  atomic_store(&gate, OPEN);
  atomic_store(&pauser, 0);
  for (int i = 0; i < SHARDS; i++) atomic_store(&shards[i].inside, 0);
}

static struct shard *shard_of(const struct launch *launch) {
  return &shards[(uintptr_t)launch >> 16 & (SHARDS - 1)];  // by the stack that it lies on
}

static void look_again_later(void) {
  struct timespec pause = {0, LOOK_NS};
  nanosleep(&pause, NULL);
}

static void open_gate(void) {
  atomic_store(&gate, OPEN);
  syscall(SYS_futex, &gate, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static int is_captured(const struct launch *launch) {
  int status = CU_STREAM_CAPTURE_STATUS_NONE;
  CUresult result = launch->is_per_thread
                        ? REAL(cuStreamIsCapturing_ptsz, launch->stream, &status)
                        : REAL(cuStreamIsCapturing, launch->stream, &status);
  return result == CUDA_SUCCESS && status != CU_STREAM_CAPTURE_STATUS_NONE;
}

// Until the gate is open; at the bound whoever waits opens it, for all.
static void wait_for_opening(void) {
  uint64_t bound_ns = process_number("gate_hold_ms", 30000) * 1000000u;
  uint64_t began = now_ns();
  atomic_fetch_add(&held, 1);
  while (atomic_load(&gate) == CLOSED) {
    uint64_t waited = now_ns() - began;
    if (waited >= bound_ns) {
      notice("concordia: a launch was held for %llu ms; the program goes on, unpaused",
             (unsigned long long)(waited / 1000000u));
      coverage_note("a pause was ended", "a launch was held for as long as one may be");
      open_gate();
      return;
    }
    uint64_t left = bound_ns - waited;
    struct timespec rest = {(time_t)(left / 1000000000u), (long)(left % 1000000000u)};
    syscall(SYS_futex, &gate, FUTEX_WAIT_PRIVATE, CLOSED, &rest, NULL, 0);
  }
}

// Announces itself, then looks: pairs with concordia_pause, which closes, then counts. Both orders
// are the sequentially consistent ones, so one of the two sees the other.
void gate_before(const struct launch *launch) {
  struct shard *shard = shard_of(launch);
  if (!process_is_active()) return;
  for (;;) {
    atomic_fetch_add(&shard->inside, 1);
    if (__builtin_expect(atomic_load(&gate) == OPEN, 1)) break;
    if (atomic_load(&pauser) == (int)syscall(SYS_gettid) || is_captured(launch)) break;
    atomic_fetch_sub(&shard->inside, 1);
    wait_for_opening();
  }
  streams_note(launch->stream, launch->is_per_thread);
}

void gate_after(const struct launch *launch, CUresult result) {
  (void)result;
  if (process_is_active()) atomic_fetch_sub(&shard_of(launch)->inside, 1);
}

static int64_t count_inside(void) {
  int64_t inside = 0;
  for (int i = 0; i < SHARDS; i++) inside += atomic_load(&shards[i].inside);
  return inside;
}

static int given_up(int code) {
  atomic_store(&pauser, 0);
  open_gate();
  return code;
}

static int is_driver_done(uint64_t deadline) {
  while (count_inside() > 0) {
    if (now_ns() >= deadline) return 0;
    look_again_later();
  }
  return 1;
}

static int pause_locked(uint64_t began, uint64_t deadline, struct gate_report *report) {
  if (atomic_load(&gate) == CLOSED) return GATE_ALREADY;
  atomic_store(&held, 0);
  atomic_store(&pauser, (int)syscall(SYS_gettid));
  atomic_store(&gate, CLOSED);
  if (!is_driver_done(deadline)) {
    snprintf(report->waited_for, sizeof report->waited_for, "a launch inside the driver");
    return given_up(GATE_LATE);
  }
  int code = streams_drain(deadline, report);
  if (code == GATE_DONE && atomic_load(&gate) != CLOSED) {  // a resume, or a launch held too long
    snprintf(report->waited_for, sizeof report->waited_for, "a gate that was opened meanwhile");
    code = GATE_LATE;
  }
  if (code != GATE_DONE) return given_up(code);
  report->latency_ns = now_ns() - began;
  return GATE_DONE;
}

EXPORTED int concordia_pause(uint64_t timeout_ms) {
  uint64_t began = now_ns(), deadline = began + timeout_ms * 1000000u;
  struct gate_report report = {0};
  if (!process_is_active()) return GATE_NOT_ACTIVE;
  if (pthread_mutex_trylock(&lock) != 0) return GATE_ALREADY;
  int code = pause_locked(began, deadline, &report);
  if (code != GATE_ALREADY) last = report;
  pthread_mutex_unlock(&lock);
  return code;
}

EXPORTED int concordia_resume(void) {
  if (atomic_load(&gate) == OPEN) return GATE_ALREADY;
  atomic_store(&pauser, 0);
  open_gate();
  return GATE_DONE;
}

EXPORTED int concordia_is_paused(void) { return atomic_load(&gate) == CLOSED; }

EXPORTED uint64_t concordia_held(void) { return atomic_load(&held); }

// What the last pause took, and at its bound, what it had waited for.
EXPORTED void concordia_pause_report(struct gate_report *report) {
  pthread_mutex_lock(&lock);
  *report = last;
  pthread_mutex_unlock(&lock);
}
