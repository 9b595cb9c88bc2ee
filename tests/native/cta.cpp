// The lanes of cta.h: how they exchange values, out of the sanitizer's sight, and how a launch starts and ends, which the sanitizer takes
// from the start and the end of their threads.
#include "cta.h"

#include <pthread.h>

__thread Dim threadIdx;
Warp warps[kCtaLanes / kWarpLanes];
Meeting cta_meeting;

__attribute__((no_sanitize("thread"))) static void meet_hidden(Meeting* meeting, unsigned lanes) { MEET(meeting, lanes); }

__attribute__((no_sanitize("thread"))) void exchange_hidden(Warp* warp, unsigned lane, uint64_t value, uint64_t* all) {
  warp->said[lane] = value;
  meet_hidden(&warp->hidden, kWarpLanes);
  for (unsigned i = 0; i < kWarpLanes; ++i) all[i] = warp->said[i];
  meet_hidden(&warp->hidden, kWarpLanes);
}

struct Launched {
  void (*kernel)(void*);
  void* arguments;
  unsigned lane;
};

static void* run_lane(void* argument) {
  const Launched* mine = static_cast<Launched*>(argument);
  threadIdx.x = mine->lane;
  mine->kernel(mine->arguments);
  return nullptr;
}

// One launch, from its start to its end; false when the system has no threads.
extern "C" bool run_cta(void (*kernel)(void*), void* arguments) {
  Launched lanes[kCtaLanes];
  pthread_t threads[kCtaLanes];
  for (unsigned i = 0; i < kCtaLanes; ++i) {
    lanes[i] = {kernel, arguments, i};
    if (pthread_create(&threads[i], nullptr, run_lane, &lanes[i]) != 0) return false;
  }
  for (unsigned i = 0; i < kCtaLanes; ++i) pthread_join(threads[i], nullptr);
  return true;
}
