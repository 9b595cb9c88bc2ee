// Images on their way into the driver.
//
// Owns: the hooks of loading and unloading. Promises: what cannot be rewritten in time is loaded as
// it is, and what the driver does not take rewritten is loaded as it is, too; the driver is called
// once for each call, and a second time only after it refused an image of ours. No lock is held
// while it, or the rewriter, is called; no process is started; of CUDA nothing is called but the
// load itself. Called by the program.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "protect.h"
#include "shim.h"

struct loading {
  const void *given, *use;  // by the program; for the driver
  int is_watched, is_replaced, is_opaque;
  CUresult result;
  const char *call, *why;
  struct image image;
  uint64_t key[2], began_ns, own_ns;
  char library[PROCESS_PATH_MAX];
  struct replacement replacement;
};

static _Thread_local int is_inside;  // the driver may load by its own public functions

// Why there is no file to load: what was found of it, and what the rewriter said.
static const char *missing(enum cache_answer found, enum rewriter_answer answer) {
  static const char *const texts[] = {
      "no file though the rewriter said so", "the rewriter has none for it", "the rewriter is still at it",
      "the rewriter was too slow", "no rewriter", "this process has waited long enough"};
  return found == CACHE_FOREIGN ? "its file is another image's" : texts[answer];
}

// Takes the rewritten image, or says why not.
static const char *replaced(struct loading *loading) {
  char mode[16], folder[PROCESS_PATH_MAX];
  uint64_t control = control_address();
  if (!process_setting("cache", folder, sizeof folder)) return "look only";
  enum cache_answer found = cache_load(folder, loading->key, control, &loading->replacement);
  int is_looked_at = !process_setting("mode", mode, sizeof mode) || mode[0] != 'r';
  if (found == CACHE_FOREIGN) coverage_count("files of other images", 1);
  if (found < CACHE_UNCHANGED) {
    int is_awaited = !is_looked_at && control;
    enum rewriter_answer answer = rewriter_ask(&loading->image, loading->key, is_awaited);
    if (is_awaited && answer != REWRITER_READY) return missing(found, answer);
    if (is_awaited) found = cache_load(folder, loading->key, control, &loading->replacement);
  }
  if (is_looked_at) return "look only";
  if (!control) return control_why_not();
  if (found == CACHE_UNCHANGED) return "nothing to hook";
  if (found == CACHE_READY) return NULL;
  return missing(found, REWRITER_READY);
}

static void decide(struct loading *loading) {
  if (!loading->image.size) {
    loading->why = "no image that is known";
    return;
  }
  if (loading->is_opaque) {  // before anything is looked up: the same bytes may be hooked elsewhere
    loading->why = "left as it is, by policy";
    return;
  }
  hash_image(loading->image.bytes, loading->image.size, loading->key);
  loading->why = replaced(loading);
  if (loading->why) {
    cache_release(&loading->replacement);
    return;
  }
  loading->is_replaced = 1;
  loading->use = loading->replacement.image;
}

static void prepare(struct loading *loading) {
  decide(loading);
  loading->own_ns = now_ns() - loading->began_ns;
}

static void begin(struct loading *loading, const char *call) {
  loading->is_watched = process_is_active() && !is_inside;
  loading->call = call;
  if (!loading->is_watched) return;
  is_inside = 1;
  loading->began_ns = now_ns();
}

// Of several that an image may belong to, the first is told, or the one that leaves it as it is.
static void belongs_to(struct loading *loading, const char *library) {
  if (loading->is_opaque) return;
  loading->is_opaque = opaque_library(library);
  if (loading->is_opaque || !*loading->library)
    snprintf(loading->library, sizeof loading->library, "%s", library);
}

static void belongs_to_library_of(struct loading *loading, const void *address) {
  char library[PROCESS_PATH_MAX];
  library_of(address, library, sizeof library);
  belongs_to(loading, library);
}

// An image in memory. It belongs to the library that it lies in, to that of its wrapper, and to the
// one that loads it.
static void begin_data(struct loading *loading, const void *given, const void *caller,
                       const char *call) {
  *loading = (struct loading){.given = given, .use = given};
  begin(loading, call);
  if (!loading->is_watched) return;
  image_find(given, &loading->image);
  if (loading->image.size) belongs_to_library_of(loading, loading->image.bytes);
  belongs_to_library_of(loading, given);
  belongs_to_library_of(loading, caller);
  prepare(loading);
  if (!loading->is_replaced || !loading->image.wrapper) return;
  *loading->replacement.wrapper = *loading->image.wrapper;
  loading->replacement.wrapper->data = loading->replacement.image;
  loading->use = loading->replacement.wrapper;
}

static void *mapped(const char *path, uint64_t *bytes) {
  struct stat about;
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  void *memory = MAP_FAILED;
  if (file >= 0 && fstat(file, &about) == 0 && S_ISREG(about.st_mode) && about.st_size > 0 &&
      (uint64_t)about.st_size <= IMAGE_BYTES_MAX) {
    *bytes = (uint64_t)about.st_size;
    // Memory of our own: a file that shrinks must not end the program; and zero behind it.
    memory = mmap(NULL, *bytes + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t done = 0;
    while (memory != MAP_FAILED && done < *bytes) {
      ssize_t got = pread(file, (char *)memory + done, *bytes - done, (off_t)done);
      if (got <= 0) {
        munmap(memory, *bytes + 1);
        memory = MAP_FAILED;
      } else {
        done += (uint64_t)got;
      }
    }
  }
  if (file >= 0) close(file);
  return memory == MAP_FAILED ? NULL : memory;
}

// An image in a file: only a rewritten one is handed over as memory.
static void begin_file(struct loading *loading, const char *path, const void *caller,
                       const char *call) {
  uint64_t bytes = 0;
  *loading = (struct loading){0};
  begin(loading, call);
  if (!loading->is_watched) return;
  void *memory = mapped(path, &bytes);
  belongs_to(loading, path ? path : "");
  belongs_to_library_of(loading, caller);
  if (!memory || !image_find_in_file(memory, bytes, &loading->image)) loading->image.size = 0;
  prepare(loading);
  if (memory) munmap(memory, bytes + 1);
}

// Whether the driver did not take an image of ours: then it is called again, with the original.
static int is_refused(struct loading *loading) {
  if (!loading->is_replaced || loading->result == CUDA_SUCCESS) return 0;
  cache_release(&loading->replacement);
  loading->is_replaced = 0;
  loading->use = loading->given;
  loading->why = "the driver refused what was rewritten";
  return 1;
}

static int is_looked_up(const struct loading *loading) {
  return loading->image.size && !loading->is_opaque;
}

static CUresult end(struct loading *loading, void *const *handle) {
  CUresult result = loading->result;
  if (!loading->is_watched) return result;
  if (loading->is_replaced && handle) loaded_add(*handle, &loading->replacement);
  // its handle may have been that of an image of ours, which went with its context
  else if (result == CUDA_SUCCESS && handle) loaded_drop(loaded_take(*handle));
  if (result != CUDA_SUCCESS) loading->why = "the driver refused the program's own image";
  struct coverage coverage = {.call = loading->call,
                              .library = loading->library,
                              .outcome = loading->is_replaced ? "rewritten" : "original",
                              .why = loading->why,
                              .image = &loading->image,
                              .key = is_looked_up(loading) ? loading->key : NULL,
                              .ns = now_ns() - loading->began_ns,
                              .own_ns = loading->own_ns};
  coverage_image(&coverage);
  is_inside = 0;
  return result;
}

#define CALLER __builtin_return_address(0)

static CUresult unparked(CUresult result) {
  park_end();
  return result;
}

// Beside a kernel that stays these wait until it has left.
#define PARKED(name, ...) (park_begin(), unparked(REAL(name, __VA_ARGS__)))

CUresult cuModuleLoad(CUmodule *module, const char *path) {
  struct loading loading;
  begin_file(&loading, path, CALLER, __func__);
  do
    loading.result = loading.is_replaced ? PARKED(cuModuleLoadData, module, loading.use)
                                         : PARKED(cuModuleLoad, module, path);
  while (is_refused(&loading));
  return end(&loading, module);
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  struct loading loading;
  begin_data(&loading, image, CALLER, __func__);
  do loading.result = PARKED(cuModuleLoadData, module, loading.use);
  while (is_refused(&loading));
  return end(&loading, module);
}

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned int count, void *options,
                            void **values) {
  struct loading loading;
  begin_data(&loading, image, CALLER, __func__);
  do loading.result = PARKED(cuModuleLoadDataEx, module, loading.use, count, options, values);
  while (is_refused(&loading));
  return end(&loading, module);
}

CUresult cuModuleLoadFatBinary(CUmodule *module, const void *image) {
  struct loading loading;
  begin_data(&loading, image, CALLER, __func__);
  do loading.result = PARKED(cuModuleLoadFatBinary, module, loading.use);
  while (is_refused(&loading));
  return end(&loading, module);
}

CUresult cuLibraryLoadData(CUlibrary *library, const void *image, void *jit_options,
                           void **jit_values, unsigned int jit_count, void *options, void **values,
                           unsigned int count) {
  struct loading loading;
  begin_data(&loading, image, CALLER, __func__);
  do
    loading.result = PARKED(cuLibraryLoadData, library, loading.use, jit_options, jit_values,
                            jit_count, options, values, count);
  while (is_refused(&loading));
  return end(&loading, library);
}

// A promise to keep the bytes belongs to memory alone: with a file the driver refuses it.
static int is_kept_by_program(const int *options, unsigned int count) {
  for (unsigned int i = 0; options && i < count; i++)
    if (options[i] == CU_LIBRARY_BINARY_IS_PRESERVED) return 1;
  return 0;
}

CUresult cuLibraryLoadFromFile(CUlibrary *library, const char *path, void *jit_options,
                               void **jit_values, unsigned int jit_count, void *options,
                               void **values, unsigned int count) {
  struct loading loading;
  begin_file(&loading, is_kept_by_program(options, count) ? NULL : path, CALLER, __func__);
  do
    loading.result = loading.is_replaced
                         ? PARKED(cuLibraryLoadData, library, loading.use, jit_options, jit_values,
                                  jit_count, options, values, count)
                         : PARKED(cuLibraryLoadFromFile, library, path, jit_options, jit_values,
                                  jit_count, options, values, count);
  while (is_refused(&loading));
  return end(&loading, library);
}

static CUresult unloaded(CUresult result, struct loaded *taken) {
  park_forget_launches();
  if (result == CUDA_SUCCESS)
    loaded_drop(taken);
  else
    loaded_keep(taken);
  return result;
}

CUresult cuModuleUnload(CUmodule module) {
  struct loaded *taken = loaded_take(module);
  kernels_unloaded();
  return unloaded(PARKED(cuModuleUnload, module), taken);
}

CUresult cuLibraryUnload(CUlibrary library) {
  struct loaded *taken = loaded_take(library);
  kernels_unloaded();
  return unloaded(PARKED(cuLibraryUnload, library), taken);
}
