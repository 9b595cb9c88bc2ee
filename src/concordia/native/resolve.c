// The driver's own functions, and who asks for them by name.
//
// Owns: `real`, and the hooks of cuGetProcAddress. Promises: the driver answers first, by its own
// rules for versions and streams; only a pointer that is one of a hooked export is swapped, for the
// hook of exactly that export. So there is no table of versions that could be wrong. What the
// driver hands out by other ways (export tables) is left alone. Called by the loader, once.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

#include "shim.h"

struct real real;

struct hook {
  const char *name;
  void **slot;  // in `real`
  void *ours;
};

static const struct hook hooks[] = {
#define HOOK(name, parameters) {#name, (void **)(void *)&real.name, (void *)name},
#include "hooks.def"
#undef HOOK
};
static const struct hook calls[] = {
#define CALL(name, parameters) {#name, (void **)(void *)&real.name, NULL},
#include "calls.def"
#undef CALL
};
#define COUNT(array) (sizeof(array) / sizeof(*(array)))

// Runs before any code of a library that needs us: dependencies are initialised first.
__attribute__((constructor(101))) static void resolve(void) {
  for (size_t i = 0; i < COUNT(hooks); i++) {
    void *found = dlsym(RTLD_NEXT, hooks[i].name);
    *hooks[i].slot = found == hooks[i].ours ? NULL : found;
  }
  for (size_t i = 0; i < COUNT(calls); i++) *calls[i].slot = dlsym(RTLD_NEXT, calls[i].name);
}

// The hook for what the driver answered. Two exports may share one address; then the one whose name
// was asked for is meant, and where that does not tell, the answer stays the driver's.
static void *swapped(const char *symbol, void *answer) {
  const struct hook *only = NULL, *named = NULL;
  int matches = 0;
  for (size_t i = 0; i < COUNT(hooks); i++) {
    if (*hooks[i].slot != answer) continue;
    matches++;
    only = &hooks[i];
    if (strcmp(hooks[i].name, symbol) == 0) named = &hooks[i];
  }
  if (matches == 1) return only->ours;
  return named ? named->ours : answer;
}

CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags) {
  CUresult result = REAL(cuGetProcAddress, symbol, function, version, flags);
  if (result == CUDA_SUCCESS && symbol && function && *function)
    *function = swapped(symbol, *function);
  return result;
}

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags,
                             int *status) {
  CUresult result = REAL(cuGetProcAddress_v2, symbol, function, version, flags, status);
  if (result == CUDA_SUCCESS && symbol && function && *function)
    *function = swapped(symbol, *function);
  return result;
}
