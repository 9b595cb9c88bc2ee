// What is known of a kernel: its name, its parameters, and what the policy says of it.
//
// Owns: a table by the driver's handle. Promises: an entry is what its handle means now: what was
// learnt before code was last unloaded is learnt again before it is used; who holds an entry may
// read it for good. Called by whoever watches launches. What a launch's arguments are, says
// arguments.c.
#define _GNU_SOURCE
#include <fnmatch.h>
#include <stdlib.h>
#include <string.h>

#include "protect.h"

enum { SLOTS = 1 << 16, PROBES = 64, PARAMETERS_MAX = 512 };
enum { END_OF_PARAMETERS = 1 };      // CUDA_ERROR_INVALID_VALUE: there is no such parameter
enum { KERNEL_MARKS = 4, KERNEL_TENSOR_MAPS = 64 };  // flags of the cache file's table

static struct kernel *_Atomic table[SLOTS];
static _Atomic uint64_t unloads;  // of code, or of contexts with theirs
static const struct kernel unknown = {.name = "", .count = -1};

static uint64_t slot_of(const void *function) {
  return (uint64_t)(uintptr_t)function * 0x9e3779b97f4a7c15ull >> 48;
}

static void *origin_of(void *function);

static const char *name_of(void *function) {
  const char *name = NULL;
  if (origin_of(function) == function)  // a kernel of a library: the other call is not for it
    return REAL(cuKernelGetName, &name, function) == CUDA_SUCCESS ? name : NULL;
  if (REAL(cuFuncGetName, &name, function) != CUDA_SUCCESS &&
      REAL(cuKernelGetName, &name, function) != CUDA_SUCCESS)
    return NULL;
  return name;
}

// Kernels of libraries, as their own origin, and functions that were made of them: only the former
// know their library. An entry stays; a handle that is used again gets its new meaning.
static struct {
  _Atomic(void *) function;
  _Atomic(void *) kernel;
} origins[SLOTS];

static void note_origin(void *function, void *kernel) {
  uint64_t at = slot_of(function);
  for (int i = 0; i < PROBES; i++, at = (at + 1) % SLOTS) {
    void *seen = NULL;
    if (atomic_compare_exchange_strong(&origins[at].function, &seen, function) ||
        seen == function) {
      atomic_store(&origins[at].kernel, kernel);
      return;
    }
  }
}

static void *origin_of(void *function) {
  uint64_t at = slot_of(function);
  for (int i = 0; i < PROBES; i++, at = (at + 1) % SLOTS) {
    void *seen = atomic_load(&origins[at].function);
    if (seen == function) return atomic_load(&origins[at].kernel);
    if (!seen) return NULL;
  }
  return NULL;
}

CUresult cuLibraryGetKernel(void **kernel, CUlibrary library, const char *name) {
  CUresult result = REAL(cuLibraryGetKernel, kernel, library, name);
  if (result == CUDA_SUCCESS && IS_PROTECTED()) note_origin(*kernel, *kernel);
  return result;
}

CUresult cuLibraryEnumerateKernels(void **kernels, unsigned int count, CUlibrary library) {
  CUresult result = REAL(cuLibraryEnumerateKernels, kernels, count, library);
  unsigned int there = 0;
  if (result != CUDA_SUCCESS || !IS_PROTECTED() ||
      REAL(cuLibraryGetKernelCount, &there, library) != CUDA_SUCCESS)
    return result;
  for (unsigned int i = 0; i < count && i < there; i++) note_origin(kernels[i], kernels[i]);
  return result;
}

CUresult cuKernelGetFunction(CUfunction *function, void *kernel) {
  CUresult result = REAL(cuKernelGetFunction, function, kernel);
  if (result == CUDA_SUCCESS && IS_PROTECTED() && *function != kernel)
    note_origin(*function, kernel);
  return result;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  CUresult result = REAL(cuModuleGetFunction, function, module, name);
  if (result == CUDA_SUCCESS && IS_PROTECTED() && origin_of(*function)) note_origin(*function,
                                                                                    NULL);
  return result;
}

// What its image has, where it was hooked.
static void learn_flags(struct kernel *kernel, void *function) {
  void *home = NULL, *origin = origin_of(function);
  uint32_t flags = KERNEL_UNKNOWN;
  if (origin && REAL(cuKernelGetLibrary, &home, origin) == CUDA_SUCCESS)
    flags = loaded_kernel_flags(home, kernel->name);
  if (origin != function && flags == KERNEL_UNKNOWN &&
      REAL(cuFuncGetModule, &home, function) == CUDA_SUCCESS)
    flags = loaded_kernel_flags(home, kernel->name);
  if (flags == KERNEL_UNKNOWN) flags = 0;
  kernel->has_maps = (flags & KERNEL_TENSOR_MAPS) != 0;
  kernel->is_marking = (flags & KERNEL_MARKS) != 0;
}

static uint64_t hash_of(const char *name) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (; *name; name++) hash = (hash ^ (unsigned char)*name) * 0x100000001b3ull;
  return hash;
}

static CUresult parameter(void *function, size_t index, size_t *offset, size_t *bytes) {
  return origin_of(function) == function
             ? REAL(cuKernelGetParamInfo, function, index, offset, bytes)
             : REAL(cuFuncGetParamInfo, function, index, offset, bytes);
}

static void learn_parameters(struct kernel *kernel, void *function) {
  size_t offset, bytes;
  int count = 0;
  kernel->count = -1;
  CUresult result = CUDA_SUCCESS;
  while (count < PARAMETERS_MAX &&
         (result = parameter(function, (size_t)count, &offset, &bytes)) == CUDA_SUCCESS)
    count++;
  if (count == PARAMETERS_MAX || result != END_OF_PARAMETERS) return;
  kernel->parameters = calloc((size_t)count + 1, sizeof *kernel->parameters);
  if (!kernel->parameters) return;
  for (int i = 0; i < count; i++) {
    parameter(function, (size_t)i, &offset, &bytes);
    kernel->parameters[i].offset = (uint32_t)offset;
    kernel->parameters[i].bytes = (uint32_t)bytes;
  }
  kernel->count = count;
}

// Whether it still is what it was: hashing a long name would take longer than a launch.
static int is_same(const struct kernel *kernel, const char *name) {
  return kernel->name == name && kernel->length == strlen(name) &&
         memcmp(kernel->start, name, kernel->length < sizeof kernel->start
                                         ? kernel->length
                                         : sizeof kernel->start) == 0;
}

// Whether what was learnt before is what was learnt now.
static int is_equal(const struct kernel *before, const struct kernel *now) {
  return is_same(before, now->name) && before->hash == now->hash && before->count == now->count &&
         before->is_marking == now->is_marking && before->has_maps == now->has_maps &&
         (now->count <= 0 ||
          memcmp(before->parameters, now->parameters,
                 (size_t)now->count * sizeof *now->parameters) == 0);
}

static void drop(struct kernel *kernel) {
  if (kernel) free(kernel->parameters);
  if (kernel) free((void *)kernel->unseen);
  free(kernel);
}

void kernels_unloaded(void) {
  // sequentially consistent, as the look in kernel_of: who launches code of a handle that was given
  // out again had it from the driver after this
  atomic_fetch_add(&unloads, 1);
}

static struct kernel *learned(void *function, const char *name) {
  struct kernel *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return NULL;
  atomic_init(&kernel->unloads, atomic_load(&unloads));  // before anything is asked
  kernel->unseen = calloc(UNSEEN_REASONS, sizeof *kernel->unseen);
  kernel->function = function;
  kernel->name = name;
  kernel->hash = hash_of(name);
  kernel->length = strlen(name);
  memcpy(kernel->start, name,
         kernel->length < sizeof kernel->start ? kernel->length : sizeof kernel->start);
  for (int i = 0; i < policy.trigger_count; i++)
    if (policy.triggers[i].on == ON_KERNEL && fnmatch(policy.triggers[i].kernel, name, 0) == 0)
      kernel->triggers |= 1u << i;
  for (int i = 0; i < policy.rule_count; i++)
    if (policy.rules[i].kernel[0] && fnmatch(policy.rules[i].kernel, name, 0) == 0)
      kernel->rules |= 1ull << i;
  for (int i = 0; i < policy.trusted_count; i++)
    if (fnmatch(policy.trusted[i], name, 0) == 0) kernel->is_trusted = 1;
  for (int i = 0; i < policy.maps_count; i++)
    if (fnmatch(policy.maps[i], name, 0) == 0) kernel->has_plain_maps = 1;
  learn_parameters(kernel, function);
  learn_flags(kernel, function);
  return kernel;
}

// The entry of a slot once it is of the code that is loaded now; NULL: there is no memory.
static struct kernel *renewed(struct kernel *_Atomic *slot, struct kernel *kernel,
                              const char *name) {
  struct kernel *made = learned(kernel->function, name);
  if (!made) return NULL;
  if (is_equal(kernel, made)) {
    atomic_store(&kernel->unloads, atomic_load(&made->unloads));
    drop(made);
    return kernel;
  }
  // Whoever has the old one may still read it: it stays, as large as one kernel of a module is.
  made->before = kernel;
  if (atomic_compare_exchange_strong(slot, &kernel, made)) return made;
  drop(made);  // another thread was faster: `kernel` is what it has learnt
  return kernel;
}

const struct kernel *kernel_of(void *function) {
  const char *name = function ? name_of(function) : NULL;
  if (!name) return &unknown;
  uint64_t at = slot_of(function);
  for (int i = 0; i < PROBES; i++, at = (at + 1) % SLOTS) {
    // pairs with the exchanges that put entries here
    struct kernel *kernel = atomic_load_explicit(&table[at], memory_order_acquire);
    if (!kernel) {
      struct kernel *made = learned(function, name);
      if (!made) return &unknown;
      if (atomic_compare_exchange_strong(&table[at], &kernel, made)) return made;
      drop(made);
    }
    if (kernel->function != function) continue;
    if (atomic_load(&kernel->unloads) != atomic_load(&unloads) || !is_same(kernel, name))
      kernel = renewed(&table[at], kernel, name);
    return kernel ? kernel : &unknown;
  }
  return &unknown;
}

void kernels_each(void (*see)(const struct kernel *, void *), void *context) {
  for (int i = 0; i < SLOTS; i++) {
    const struct kernel *kernel = atomic_load_explicit(&table[i], memory_order_acquire);
    for (; kernel; kernel = kernel->before) see(kernel, context);
  }
}
