// A program with a kernel that stays: says which calls it is told of before and after. For tests.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef int R;
R cuInit(unsigned), cuDevicePrimaryCtxRetain(void **, int), cuCtxSynchronize(void), cuModuleLoadData(void **, const void *), cuModuleUnload(void *), cuModuleGetFunction(void **, void *, const char *);
R cuMemAlloc_v2(uint64_t *, size_t), cuMemFree_v2(uint64_t), cuMemFreeHost(void *), cuMemHostUnregister(void *), cuMemsetD8_v2(uint64_t, unsigned char, size_t);
R cuLaunchKernel(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
R cuLaunchCooperativeKernelMultiDevice(const void *, unsigned, unsigned);

static int is_parked[2], parks[2], wrong;
static void park(void *context) { int i = (int)(intptr_t)context; is_parked[i]++; parks[i]++; }
static void unpark(void *context) { int i = (int)(intptr_t)context; if (--is_parked[i] < 0) wrong++; }
static void say(const char *what) {
  printf("%s %d %d %d%s\n", what, parks[0], parks[1], is_parked[0] + is_parked[1], wrong ? " wrong" : "");
  parks[0] = parks[1] = 0;
}
static void *many(void *function) {
  for (int i = 0; i < 2000; i++) {
    if (i % 3 == 0) cuCtxSynchronize();
    else cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL);
  }
  return NULL;
}
static _Atomic int inside;
static void enter(void *unused) { (void)unused; inside++; }
static void leave(void *unused) { (void)unused; inside--; }

int main(void) {
  int (*add)(void (*)(void *), void (*)(void *), void *) = dlsym(RTLD_DEFAULT, "concordia_park_register");
  int (*drop)(int) = dlsym(RTLD_DEFAULT, "concordia_park_unregister");
  void *context, *module, *function;
  uint64_t address;
  pthread_t threads[4];
  if (!add || !drop) { puts("no shim"); return 0; }
  cuInit(0);
  cuDevicePrimaryCtxRetain(&context, 0);
  cuCtxSynchronize();
  say("nobody");
  int first = add(park, unpark, (void *)0), second = add(park, unpark, (void *)1);
  cuModuleLoadData(&module, ".version 8.0");
  say("load");
  cuModuleGetFunction(&function, module, "nothing");
  say("function");
  cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL);
  say("first launch");
  cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL);
  say("second launch");
  cuMemAlloc_v2(&address, 4096);
  cuMemsetD8_v2(address, 1, 4096);
  say("work");
  cuMemFree_v2(address);
  say("free");
  cuMemFreeHost(malloc(8));
  say("free host");
  cuMemHostUnregister(&address);
  say("unregister");
  cuCtxSynchronize();
  say("synchronize");
  printf("dropped %d\n", drop(first));
  cuModuleUnload(module);
  say("unload");
  cuModuleLoadData(&module, ".version 8.0");
  cuModuleGetFunction(&function, module, "nothing");
  parks[1] = 0;
  cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL);
  say("first launch of new code");
  struct { void *function; unsigned sizes[7]; void *stream, *parameters; } list[2] = {{.function = NULL}};
  cuModuleGetFunction(&list[0].function, module, "update");  // new, and one that was launched before
  list[1].function = function;
  uint64_t words[3] = {0, 0, 0};
  void *parameters[3] = {&words[0], &words[1], &words[2]};
  list[0].parameters = parameters;
  cuLaunchCooperativeKernelMultiDevice(list, 2, 0);
  say("several at once");
  fflush(stdout);
  int status = 0;
  pid_t child = fork();
  if (child == 0) { parks[1] = 0; cuCtxSynchronize(); _exit(parks[0] + parks[1]); }
  waitpid(child, &status, 0);
  printf("told in a child %d\n", WEXITSTATUS(status));
  int once = drop(second), twice = drop(second);
  printf("dropped %d %d\n", once, twice);
  int third = add(enter, leave, NULL);
  for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, many, function);
  int dropped = 0;
  for (int i = 0; i < 200; i++) {
    dropped += drop(third);
    if (inside) wrong++;
    third = add(enter, leave, NULL);
  }
  for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
  printf("many %d %d%s\n", dropped, (int)inside, wrong ? " wrong" : "");
  return 0;
}
