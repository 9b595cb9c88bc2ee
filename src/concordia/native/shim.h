// What the files of the shim know of each other.
//
// Owns: the internal interface. Promises: nothing here is exported from the library except what
// hooks.def lists and what is marked EXPORTED. How a hook is added: a line in hooks.def, and the
// function of that name in the file that owns the matter. How a launch is watched: a line in
// observers.def, and NAME_before and NAME_after. Hooks run in any thread of a foreign program: no
// lock is held while the driver or the rewriter is called, and nothing here forks.
#pragma once
#include "cuda_abi.h"

#define EXPORTED __attribute__((visibility("default")))

// --- hooks: prototypes, and the driver's own functions
#define HOOK(name, parameters) EXPORTED CUresult name parameters;
#include "hooks.def"
#undef HOOK

struct real {
#define HOOK(name, parameters) CUresult(*name) parameters;
#define CALL(name, parameters) CUresult(*name) parameters;
#include "calls.def"
#include "hooks.def"
#undef HOOK
#undef CALL
};
extern struct real real;  // filled before any hook can be called; not changed afterwards

// The driver's own function; a driver that lacks it says so as one that is too old does.
#define REAL(name, ...) (real.name ? real.name(__VA_ARGS__) : (CUresult)CUDA_ERROR_NOT_FOUND)

// --- launches
enum launch_kind { LAUNCH_KERNEL, LAUNCH_COOPERATIVE, LAUNCH_GRAPH };

struct launch {
  enum launch_kind kind;
  int is_per_thread;  // a null stream is this thread's own (the _ptsz functions)
  void *function;     // CUfunction or CUkernel; of a graph its CUgraphExec
  CUstream stream;
  unsigned int grid[3], block[3], shared_bytes;  // zero for a graph
  void **parameters, **extra;                    // as given; either may be NULL
  const CUlaunchConfig *config;                  // of cuLaunchKernelEx, else NULL
};

void launch_before(const struct launch *launch);
void launch_after(const struct launch *launch, CUresult result);

#define OBSERVER(name)                             \
  void name##_before(const struct launch *launch); \
  void name##_after(const struct launch *launch, CUresult result);
#include "observers.def"
#undef OBSERVER
