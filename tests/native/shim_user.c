// A program that uses the CUDA driver in the ways that programs do, told what to do by its arguments; see tests/test_shim.py.
//
// CALLS (environment) says how it comes to functions: needed (linked), dlopen, dlopen_so, default, resolver, resolver_ptsz.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifdef NEEDED
extern int cuInit(unsigned);
extern int cuGetProcAddress_v2(const char *, void **, int, uint64_t, int *);
#endif

static void *driver;
static const char *calls;
static int (*resolver)(const char *, void **, int, uint64_t, int *);

static void *plain(const char *name) {
  void *found = dlsym(strcmp(calls, "default") == 0 || strcmp(calls, "needed") == 0 ? RTLD_DEFAULT : driver, name);
  if (!found) fprintf(stderr, "no %s: %s\n", name, dlerror()), exit(3);
  return found;
}

// By the resolver where that is asked for; names of symbols, so the version goes first.
static void *get(const char *name) {
  if (strncmp(calls, "resolver", 8) != 0) return plain(name);
  char base[64];
  snprintf(base, sizeof base, "%s", name);
  char *version = strstr(base, "_v");
  if (version) *version = 0;
  void *found = NULL;
  uint64_t flags = strcmp(calls, "resolver_ptsz") == 0 ? 2 : 0;
  if (resolver(base, &found, 13000, flags, NULL) || !found) return plain(name);
  return found;
}
#define CALL(name, ...) ((int (*)())get(#name))(__VA_ARGS__)
#define MUST(name, ...)                                          \
  do {                                                           \
    int result = CALL(name, __VA_ARGS__);                        \
    if (result) printf("%s gave %d\n", #name, result), exit(4);  \
  } while (0)

static void begin(void) {
  calls = getenv("CALLS") ? getenv("CALLS") : "dlopen";
#ifdef NEEDED
  if (strcmp(calls, "needed") == 0) {
    cuInit(0);
    return;
  }
#endif
  driver = dlopen(strcmp(calls, "dlopen_so") == 0 ? "libcuda.so" : "libcuda.so.1", RTLD_NOW | (strcmp(calls, "default") == 0 ? RTLD_GLOBAL : 0));
  if (!driver) printf("no driver: %s\n", dlerror()), exit(5);
  resolver = dlsym(driver, "cuGetProcAddress_v2");
  void *again = NULL;  // the runtime asks the resolver for the resolver
  if (!resolver("cuGetProcAddress", &again, 13000, 0, NULL)) resolver = again;
}

static unsigned char *slurp(const char *path, size_t *bytes) {
  int file = open(path, O_RDONLY);
  struct stat found;
  if (file < 0 || fstat(file, &found)) perror(path), exit(6);
  unsigned char *data = calloc(1, (size_t)found.st_size + 1);
  if (read(file, data, (size_t)found.st_size) != found.st_size) exit(6);
  close(file);
  if (bytes) *bytes = (size_t)found.st_size;
  return data;
}

struct wrapper {
  uint32_t magic, version;
  const void *data;
  void *unused;
};
static void *handles[256];
static int is_library[256], count;
static void *function;
static uint64_t cell;

static void *loader(void *path) {
  void *module = NULL;
  unsigned char *image = slurp(path, NULL);
  MUST(cuModuleLoadData, &module, image);
  return module;
}

static void launch(const char *how, void *stream, uint64_t value) {
  void *parameters[] = {&cell, &value};
  if (!cell) MUST(cuMemAlloc_v2, &cell, (size_t)64);
  if (!function) MUST(cuModuleGetFunction, &function, count ? handles[count - 1] : NULL, "add");
  struct { unsigned sizes[7]; void *stream, *attributes; unsigned count; } config = {{1, 1, 1, 32, 1, 1, 0}, stream, NULL, 0};
  if (!strcmp(how, "kernel")) MUST(cuLaunchKernel, function, 1, 1, 1, 32, 1, 1, 0, stream, parameters, NULL);
  else if (!strcmp(how, "kernel_ex")) MUST(cuLaunchKernelEx, &config, function, parameters, NULL);
  else if (!strcmp(how, "cooperative")) MUST(cuLaunchCooperativeKernel, function, 1, 1, 1, 32, 1, 1, 0, stream, parameters);
  else if (!strcmp(how, "kernel_ptsz")) ((int (*)())plain("cuLaunchKernel_ptsz"))(function, 1, 1, 1, 32, 1, 1, 0, stream, parameters, NULL);
  else if (!strcmp(how, "kernel_ex_ptsz")) ((int (*)())plain("cuLaunchKernelEx_ptsz"))(&config, function, parameters, NULL);
  else if (!strcmp(how, "cooperative_ptsz")) ((int (*)())plain("cuLaunchCooperativeKernel_ptsz"))(function, 1, 1, 1, 32, 1, 1, 0, stream, parameters);
  else printf("launch %s?\n", how), exit(7);
}

static void graph(uint64_t value) {
  static void *executable;
  if (!executable) {
    void *stream, *made;
    ((int (*)())plain("cuStreamCreate"))(&stream, 0);
    ((int (*)())plain("cuStreamBeginCapture_v2"))(stream, 0);
    launch("kernel", stream, value);
    ((int (*)())plain("cuStreamEndCapture"))(stream, &made);
    ((int (*)())plain("cuGraphInstantiateWithFlags"))(&executable, made, 0ull);
  }
  MUST(cuGraphLaunch, executable, NULL);
}

static void load(const char *how, const char *path) {
  unsigned char *image = strstr(how, "file") ? NULL : slurp(path, NULL);
  struct wrapper wrapper = {0x466243b1, 1, image, NULL};
  void **handle = &handles[count];
  int preserved = 1;
  void *values[] = {(void *)1};
  if (!strcmp(how, "load")) MUST(cuModuleLoadData, handle, image);
  else if (!strcmp(how, "load_ex")) MUST(cuModuleLoadDataEx, handle, image, 0, NULL, NULL);
  else if (!strcmp(how, "load_fat")) MUST(cuModuleLoadFatBinary, handle, image);
  else if (!strcmp(how, "load_file")) MUST(cuModuleLoad, handle, path);
  else if (!strcmp(how, "load_wrapped")) MUST(cuModuleLoadData, handle, &wrapper);
  else {
    is_library[count] = 1;
    if (!strcmp(how, "library")) MUST(cuLibraryLoadData, handle, image, NULL, NULL, 0, &preserved, values, 1);
    else if (!strcmp(how, "library_file")) MUST(cuLibraryLoadFromFile, handle, path, NULL, NULL, 0, NULL, NULL, 0);
    else if (!strcmp(how, "library_wrapped")) MUST(cuLibraryLoadData, handle, &wrapper, NULL, NULL, 0, NULL, NULL, 0);
    else printf("load %s?\n", how), exit(7);
  }
  count++;
}

// What a library of image_holder.c has to do with an image: it has the image, as text or in a container, it has the wrapper of one, it loads one.
static void load_held(const char *how, char *paths) {
  char *path = strtok(paths, ":"), *file = strtok(NULL, "");
  void *library = dlopen(path, RTLD_NOW), **handle = &handles[count++];
  if (!library) printf("no %s: %s\n", path, dlerror()), exit(5);
  struct wrapper *wrapper = dlsym(library, "wrapper"), around = {0x466243b1, 1, dlsym(library, "container"), NULL};
  if (file) wrapper->data = slurp(file, NULL);
  if (!strcmp(how, "held_image")) MUST(cuModuleLoadData, handle, dlsym(library, "image"));
  else if (!strcmp(how, "held_container")) MUST(cuModuleLoadData, handle, &around);
  else if (!strcmp(how, "held_wrapper")) MUST(cuModuleLoadData, handle, wrapper);
  else if (((int (*)(void *, void **, const void *))dlsym(library, "load"))(get("cuModuleLoadData"), handle, wrapper->data)) exit(4);
}

static void unload(void) {
  count--;
  if (is_library[count]) MUST(cuLibraryUnload, handles[count]);
  else MUST(cuModuleUnload, handles[count]);
}

static void threads(int number, char *path) {
  pthread_t made[64];
  for (int i = 0; i < number; i++) pthread_create(&made[i], NULL, loader, path);
  for (int i = 0; i < number; i++) pthread_join(made[i], &handles[count++]);
}

// Writes what the driver was handed, one file an image.
static void dump(const char *folder) {
  uint64_t bytes, loads = ((uint64_t(*)(void))plain("fake_loads"))();
  for (uint64_t i = 0; i < loads; i++) {
    char path[512];
    const unsigned char *image = ((const unsigned char *(*)(uint64_t, uint64_t *))plain("fake_image"))(i, &bytes);
    snprintf(path, sizeof path, "%s/%llu", folder, (unsigned long long)i);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(image, 1, bytes, file) != bytes || fclose(file)) exit(8);
  }
}

static void split(char *word, char **first, char **second) {
  *first = strtok(word, ":");
  *second = strtok(NULL, "");
}

static int run(int argc, char **argv);

static void forked(int argc, char **argv) {
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    int code = run(argc, argv);
    fflush(stdout);
    exit(code);
  }
  int status = 0;
  waitpid(child, &status, 0);
  printf("child %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : -1);
}

static int run(int argc, char **argv) {
  for (int i = 0; i < argc; i++) {
    char word[1024], *what, *with;
    snprintf(word, sizeof word, "%s", argv[i]);
    split(word, &what, &with);
    if (!strcmp(what, "fork")) return forked(argc - i - 1, argv + i + 1), 0;
    if (!strcmp(what, "exit")) _exit(atoi(with));
    if (!strcmp(what, "signal")) kill(getpid(), atoi(with));
    if (!strcmp(what, "begin")) begin();
    else if (!strcmp(what, "context")) {
      void *context;
      MUST(cuDevicePrimaryCtxRetain, &context, with ? atoi(with) : 0);
      ((int (*)())plain("cuCtxSetCurrent"))(context);
    } else if (!strcmp(what, "create")) {
      void *context;
      if (!strcmp(with, "2")) ((int (*)())plain("cuCtxCreate_v2"))(&context, 0, 0);
      else if (!strcmp(with, "3")) ((int (*)())plain("cuCtxCreate_v3"))(&context, NULL, 0, 0, 0);
      else ((int (*)())plain("cuCtxCreate_v4"))(&context, NULL, 0, 0);
    } else if (!strncmp(what, "load", 4) || !strncmp(what, "library", 7)) load(what, with);
    else if (!strncmp(what, "held", 4)) load_held(what, with);
    else if (!strcmp(what, "unload")) unload();
    else if (!strcmp(what, "launch")) launch(with, NULL, 1);
    else if (!strcmp(what, "graph")) graph(1);
    else if (!strcmp(what, "cell")) printf("cell %llu\n", (unsigned long long)*(uint64_t *)(uintptr_t)cell);
    else if (!strcmp(what, "new")) printf("new %d\n", ((int (*)(int))plain("cuBrandNew"))(41));
    else if (!strcmp(what, "has")) printf("has %s %d\n", with, dlsym(driver ? driver : RTLD_DEFAULT, with) != NULL);
    else if (!strcmp(what, "calls")) printf("calls %s %llu\n", with, (unsigned long long)((uint64_t(*)(const char *))plain("fake_calls"))(with));
    else if (!strcmp(what, "alive")) printf("alive %llu\n", (unsigned long long)((uint64_t(*)(void))plain("fake_alive"))());
    else if (!strcmp(what, "dump")) dump(with);
    else if (!strcmp(what, "threads")) threads(8, with);
    else if (!strcmp(what, "mapped")) {
      FILE *maps = fopen("/proc/self/maps", "r");
      char line[1024];
      int found = 0;
      while (fgets(line, sizeof line, maps)) found += strstr(line, with) && strstr(line, "r-xp");
      printf("mapped %s %d\n", with, found);
      fclose(maps);
    } else printf("%s?\n", what), exit(7);
  }
  return 0;
}

int main(int argc, char **argv) { return run(argc - 1, argv + 1); }
