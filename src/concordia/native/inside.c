// Threads that are giving work to the driver, and the moment at which none is.
//
// Owns: the count of them, and the door that a point closes. Promises: between inside_close() and
// inside_open() no call that gives work is under way, nor between the driver and its marks: so what
// a point takes and what its copies see is the same; nobody is held for longer than a bound, at
// which protection ends and the call goes on; a point that finds somebody inside for longer than a
// bound is not taken, and those that follow soon do not wait so long. Called by streams.c, saver.c
// and, through ENTERS, by hooks.
#define _GNU_SOURCE
#include <time.h>

#include "protect.h"

enum { SHARDS = 16 };             // threads that call at the same time share no line, mostly
#define LOOK_NS 20000             // a point takes about as long
#ifndef WAIT_INSIDE_NS  // tests have no such time
#define WAIT_INSIDE_NS 2000000    // for calls under way: a launch takes microseconds
#endif
#ifndef REST_NS
#define REST_NS 40000000  // behind a wait in vain: such waits take a twentieth of the time at most
#endif
#define HOLD_NS_MAX 10000000000ull  // of a call: copies are only enqueued, but a queue may be full

static struct {
  _Alignas(64) _Atomic int inside;
} shards[SHARDS];
static _Atomic int is_closed;
static _Atomic unsigned int threads;
static __thread unsigned int thread;  // a number of its own; 0: none yet
static __thread int depth;            // calls of hooks nest where one call is several launches

static _Atomic int *mine(void) {
  if (!thread) thread = 1 + atomic_fetch_add_explicit(&threads, 1, memory_order_relaxed);
  return &shards[thread % SHARDS].inside;
}

static void look_again_later(void) {
  const struct timespec pause = {0, LOOK_NS};
  nanosleep(&pause, NULL);
}

static void wait_for_opening(void) {
  uint64_t began = now_ns();
  while (atomic_load(&is_closed) && IS_PROTECTED()) {
    if (now_ns() - began > HOLD_NS_MAX) {
      protect_lose("a call was held for %llu ms while a point was taken", HOLD_NS_MAX / 1000000);
      return;
    }
    look_again_later();
  }
}

// Announces itself, then looks; inside_close() closes, then counts. Both are sequentially
// consistent, so one of the two sees the other. Whoever sees it open has, by that load, what the
// point before wrote: pairs with the store of inside_open().
int inside_enter(void) {
  if (depth++) return 1;
  atomic_fetch_add(mine(), 1);
  while (__builtin_expect(atomic_load(&is_closed), 0) && IS_PROTECTED()) {
    atomic_fetch_sub(mine(), 1);
    wait_for_opening();
    atomic_fetch_add(mine(), 1);
  }
  return 1;
}

void inside_leave(void) {
  if (--depth == 0) atomic_fetch_sub(mine(), 1);
}

static int is_empty(void) {
  int found = 0;
  for (int i = 0; i < SHARDS; i++) found += atomic_load(&shards[i].inside);
  return found == 0;
}

// Who is in a long call now is likely to be there at the next point. A rest is counted in time and
// not in points: where those are rare, each is worth a wait.
int inside_close(void) {
  static uint64_t failed_ns;  // of whoever has the point; 0: never
  if (depth) return 0;        // in the middle of a call of this thread
  uint64_t began = now_ns();
  int is_rest = failed_ns && began - failed_ns < REST_NS;
  atomic_store(&is_closed, 1);
  while (!is_empty()) {
    uint64_t now = now_ns();
    if (now - began > (is_rest ? LOOK_NS : WAIT_INSIDE_NS)) {
      inside_open();
      if (!is_rest) failed_ns = now;
      return 0;
    }
    look_again_later();
  }
  return 1;
}

void inside_open(void) { atomic_store(&is_closed, 0); }
