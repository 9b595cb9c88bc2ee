// This process: whether it is one of a run.
//
// Owns: the moment it begins, and the moment after a fork. Promises: settled before any hook can be
// called; without CONCORDIA_RUN, with CONCORDIA_DISABLE=1, or with a run folder that is not this
// user's alone every hook only forwards. A child of fork starts anew: it has no context, no images
// and a log of its own. Called by all files. It writes nothing.
#include <pthread.h>
#include <stdlib.h>

#include "shim.h"

static int is_active;

int process_is_active(void) { return is_active; }

static void forked(void) {
#define PART(name) name##_forked();
#include "parts.def"
#undef PART
}

// After resolve.c, and before any code of a library that needs us.
__attribute__((constructor(102))) static void begin(void) {
  const char *run = getenv("CONCORDIA_RUN");
  if (!run || !*run || process_is_disabled() || !process_settle(run)) return;
  if (pthread_atfork(NULL, NULL, forked)) return;
  is_active = 1;
}
