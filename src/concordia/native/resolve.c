// The driver's own functions, and who asks for them by name.
//
// Owns: `real`, and the hooks of cuGetProcAddress. Promises: the driver answers first, by its own
// rules for versions and streams; only a pointer that is one of a hooked export is swapped, for the
// hook of exactly that export. So there is no table of versions that could be wrong; a version that
// has no hook is handed out, and where it may write or launch, protection ends. What the driver
// hands out by other ways (export tables) is left alone. Called by the loader, once.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

#include "protect.h"

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
static const char *const seen_to[] = {  // what must not pass unseen while a program is protected
    "cuLaunchKernel", "cuLaunchKernelEx", "cuLaunchCooperativeKernel", "cuGraphLaunch",
#define HOOK(name, parameters) #name,
#include "protect_hooks.def"
#undef HOOK
};
static void *const of_kept[] = {  // which have nothing to say of other memory
#define HOOK(name, parameters) (void *)name,
#include "pointer_hooks.def"
#undef HOOK
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

static int is_of_threads(const char *name) {
  size_t length = strlen(name);
  return length > 5 && (!strcmp(name + length - 5, "_ptsz") || !strcmp(name + length - 5, "_ptds"));
}

// Of a name without its version and the mark of threads' own streams.
static size_t base_of(const char *name) {
  size_t length = strlen(name);
  if (is_of_threads(name)) length -= 5;
  if (length > 3 && name[length - 3] == '_' && name[length - 2] == 'v') length -= 3;
  return length;
}

static int is_version_of(const char *name, const char *symbol) {
  return base_of(name) == base_of(symbol) && strncmp(name, symbol, base_of(name)) == 0;
}

// A function with a hook that came as something else, perhaps a version newer than this shim.
static void *unhooked(const char *symbol, void *answer) {
  static _Atomic int is_said;
  for (size_t i = 0; i < COUNT(seen_to); i++) {
    if (!is_version_of(seen_to[i], symbol)) continue;
    if (!atomic_exchange(&is_said, 1))
      coverage_note("a function of the driver is not hooked", symbol);
    protect_lose("the driver has a version of %.64s that is not watched", symbol);
    break;
  }
  return answer;
}

static void *wanted(const struct hook *hook) {
  for (size_t i = 0; i < COUNT(of_kept) && !policy.keeps_addresses; i++)
    if (of_kept[i] == hook->ours) return *hook->slot;
  return hook->ours;
}

// The hook for what the driver answered. Several exports may share one address; then the one whose
// name was asked for is meant, else the version of it for the streams that were asked for.
static void *swapped(const char *symbol, uint64_t flags, void *answer) {
  const struct hook *only = NULL, *named = NULL, *version = NULL;
  int matches = 0, wants_threads = (flags & CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM) != 0;
  for (size_t i = 0; i < COUNT(hooks); i++) {
    if (hooks[i].ours == answer) return answer;  // a driver that looks for its names as others do
    if (*hooks[i].slot != answer) continue;
    matches++;
    only = &hooks[i];
    if (strcmp(hooks[i].name, symbol) == 0) named = &hooks[i];
    if (is_version_of(hooks[i].name, symbol) && is_of_threads(hooks[i].name) == wants_threads)
      version = &hooks[i];
  }
  if (matches == 1) return wanted(only);
  if (named) return wanted(named);
  return version ? wanted(version) : unhooked(symbol, answer);
}

CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags) {
  CUresult result = REAL(cuGetProcAddress, symbol, function, version, flags);
  if (result == CUDA_SUCCESS && symbol && function && *function)
    *function = swapped(symbol, flags, *function);
  return result;
}

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags,
                             int *status) {
  CUresult result = REAL(cuGetProcAddress_v2, symbol, function, version, flags, status);
  if (result == CUDA_SUCCESS && symbol && function && *function)
    *function = swapped(symbol, flags, *function);
  return result;
}
