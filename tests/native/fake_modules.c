// The fake driver: modules and libraries. Every image is copied as it was handed in, so that a test can compare its bytes.
#include "fake_driver.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#define CALLED fake_count(__func__)
#define MODULE_MAGIC 0x454c55444f4dull

static struct { unsigned char *image; uint64_t bytes; const void *pointer; } loaded[LIMIT];
static uint64_t loads, alive;

static uint64_t size_of(const unsigned char *image) {
  uint32_t magic;
  memcpy(&magic, image, 4);
  if (magic == 0xBA55ED50) {
    uint64_t body;
    uint16_t header;
    memcpy(&header, image + 6, 2);
    memcpy(&body, image + 8, 8);
    return header + body;
  }
  if (magic == 0x464c457f) {
    uint64_t sections;
    uint16_t count, entry;
    memcpy(&sections, image + 40, 8);
    memcpy(&entry, image + 58, 2);
    memcpy(&count, image + 60, 2);
    return sections + (uint64_t)count * entry;  // tests put the section headers last
  }
  return strlen((const char *)image);
}

static CUresult load(void **handle, const void *image) {
  const unsigned char *bytes = image;
  uint32_t magic;
  if (!handle || !image) return INVALID_VALUE;
  memcpy(&magic, bytes, 4);
  if (magic == 0x466243b1) memcpy(&bytes, (const char *)image + 8, sizeof bytes);
  memcpy(&magic, bytes, 4);
  if (magic == 0xdeadbeef) return INVALID_IMAGE;
  struct module *module = calloc(1, sizeof *module);
  module->magic = MODULE_MAGIC;
  module->bytes = size_of(bytes);
  module->image = malloc(module->bytes + 1);
  memcpy(module->image, bytes, module->bytes);
  pthread_mutex_lock(&fake_lock);
  loaded[loads % LIMIT].image = module->image;
  loaded[loads % LIMIT].bytes = module->bytes;
  loaded[loads++ % LIMIT].pointer = image;
  alive++;
  pthread_mutex_unlock(&fake_lock);
  *handle = module;
  return OK;
}

static CUresult load_file(void **handle, const char *path) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  off_t size = file < 0 ? -1 : lseek(file, 0, SEEK_END);
  if (size <= 0) {
    if (file >= 0) close(file);
    return 301;  // file not found
  }
  unsigned char *bytes = calloc(1, (size_t)size + 1);
  ssize_t got = pread(file, bytes, (size_t)size, 0);
  close(file);
  CUresult result = got == size ? load(handle, bytes) : INVALID_VALUE;
  free(bytes);
  return result;
}

static CUresult unload(struct module *module) {
  if (!module || module->magic != MODULE_MAGIC) return INVALID_HANDLE;
  module->magic = 0;
  pthread_mutex_lock(&fake_lock);
  alive--;
  pthread_mutex_unlock(&fake_lock);
  return OK;
}

static CUresult function_of(struct function **function, struct module *module, const char *name) {
  struct function *made = calloc(1, sizeof *made);
  snprintf(made->name, sizeof made->name, "%s", name);
  made->module = module;
  *function = made;
  return OK;
}

API CUresult cuModuleLoad(void **module, const char *path) { CALLED; return load_file(module, path); }
API CUresult cuModuleLoadData(void **module, const void *image) { CALLED; return load(module, image); }
#ifdef FAKE_RECURSES  // a driver that calls its own public functions comes to whoever stands before it
API CUresult cuModuleLoadDataEx(void **module, const void *image, unsigned count, void *options, void **values) { CALLED; (void)count; (void)options; (void)values; return ((CUresult(*)(void **, const void *))dlsym(RTLD_DEFAULT, "cuModuleLoadData"))(module, image); }
#else
API CUresult cuModuleLoadDataEx(void **module, const void *image, unsigned count, void *options, void **values) { CALLED; (void)count; (void)options; (void)values; return load(module, image); }
#endif
API CUresult cuModuleLoadFatBinary(void **module, const void *image) { CALLED; return load(module, image); }
API CUresult cuModuleUnload(void *module) { CALLED; return unload(module); }
API CUresult cuModuleGetFunction(struct function **function, void *module, const char *name) { return function_of(function, module, name); }
API CUresult cuLibraryLoadData(void **library, const void *image, void *a, void **b, unsigned c, void *d, void **e, unsigned f) { CALLED; (void)a; (void)b; (void)c; (void)d; (void)e; (void)f; return load(library, image); }
API CUresult cuLibraryLoadFromFile(void **library, const char *path, void *a, void **b, unsigned c, void *d, void **e, unsigned f) { CALLED; (void)a; (void)b; (void)c; (void)d; (void)e; (void)f; return load_file(library, path); }
API CUresult cuLibraryUnload(void *library) { CALLED; return unload(library); }
API CUresult cuLibraryGetKernel(struct function **kernel, void *library, const char *name) { return function_of(kernel, library, name); }
API CUresult cuKernelGetFunction(struct function **function, struct function *kernel) { *function = kernel; return OK; }
API CUresult cuFuncGetModule(void **module, struct function *function) { *module = function->module; return OK; }
API CUresult cuFuncGetName(const char **name, struct function *function) { *name = function->name; return OK; }
API CUresult cuKernelGetName(const char **name, struct function *kernel) { *name = kernel->name; return OK; }

uint64_t fake_loads(void) { return loads; }
uint64_t fake_alive(void) { return alive; }
const unsigned char *fake_image(uint64_t index, uint64_t *bytes) {
  if (bytes) *bytes = loaded[index % LIMIT].bytes;
  return loaded[index % LIMIT].image;
}
const void *fake_image_pointer(uint64_t index) { return loaded[index % LIMIT].pointer; }
